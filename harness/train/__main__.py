"""`python -m harness.train RUN_DIR`: one rank of one run; `torchrun --nproc-per-node N -m harness.train RUN_DIR`.

The run directory's frozen `config.yaml` says everything. Started by the launcher for runs over several ranks; by
hand it does the same. Exit codes: 0 the run has ended (result.json says how), 1 failed, 2 a wrong request, 75 stopped
and resumable.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.activations import open_source
from harness.errors import UserError
from harness.jobs import rundir
from harness.parallel.mesh import mesh, ranks_from_environment
from harness.record.progress import Progress
from harness.record.signals import INTERRUPTED_EXIT_CODE, Interrupted, stop_on_signals
from harness.train.run import pick_device, run_cell

FAILED, WRONG_REQUEST = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.train", description="Train one frozen run, as one rank.")
    parser.add_argument("run_dir", type=Path, help="a directory that holds config.yaml")
    arguments = parser.parse_args(argv)
    ranks = ranks_from_environment()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"rank {ranks.rank}: %(message)s")
    try:
        return _run(arguments.run_dir, ranks.rank, ranks.local_rank)
    except Interrupted:
        return INTERRUPTED_EXIT_CODE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except Exception:
        logging.exception("failed")
        return FAILED


def _run(run_dir: Path, rank: int, local_rank: int) -> int:
    config = rundir.read_config(run_dir)
    if rundir.read_result(run_dir) is not None:
        return 0
    device = pick_device(config.train.device, local_rank)
    progress = Progress(None if rank == 0 else io.StringIO())
    with stop_on_signals() as stop, mesh(config.mesh.dp, config.mesh.shard, device) as shards:
        source = open_source(config.activations, Path(config.out), progress=rank == 0, stop=stop, shards=shards)
        run_cell(run_dir, config, source, stop, progress, max(1, rundir.attempts(run_dir)), shards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
