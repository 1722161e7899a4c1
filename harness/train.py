"""`python -m harness.train JOB_DIR…`: one rank of one job; `torchrun --nproc-per-node N -m harness.train RUN_DIR`.

JOB_DIR is the directory of a run or of a pack, with everything frozen in it. The launcher and the scripts of Slurm jobs
start this for jobs of several ranks; by hand it does the same. Exit codes: 0 all runs have ended (result.json says
how), 1 failed, 2 a wrong request, 75 stopped and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.places.ranks import end_with_starter
from harness.process.rank import run_as_rank
from harness.terminal import Parser
from harness.training.jobs import train_jobs


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.train", description="Train frozen jobs, as one rank.")
    parser.add_argument("jobs", type=Path, nargs="+", metavar="JOB_DIR", help="a run's directory, or a pack's")
    parser.add_argument("--claimed", action="store_true", help="the starting process has the claims; end with it")
    parser.add_argument("--saved-is-success", action="store_true", help="exit 0, not 75, when stopped and saved")
    parser.add_argument("--store-dir", default="", metavar="DIR", help="read the store from here (a node-local copy)")
    parser.add_argument("--stop-after", type=int, default=0, metavar="STEPS", help="save and stop after so many steps")
    arguments = parser.parse_args(argv)
    if arguments.claimed:
        end_with_starter()
    return run_as_rank(
        lambda: train_jobs(
            arguments.jobs,
            arguments.store_dir,
            claim_here=not arguments.claimed,
            stop_after=arguments.stop_after,
        ),
        saved_is_success=arguments.saved_is_success,
    )


if __name__ == "__main__":
    sys.exit(main())
