"""`python -m harness.places.slurm begin|end|evaluated ARRAY_DIR INDEX [EXIT_CODE]`: called by job scripts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.places.slurm.task import begin, end, evaluated
from harness.terminal import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.places.slurm", description="Called by job scripts.")
    parser.add_argument("when", choices=["begin", "end", "evaluated"])
    parser.add_argument("array", type=Path, metavar="ARRAY_DIR")
    parser.add_argument("index", type=int, metavar="SLURM_ARRAY_TASK_ID")
    parser.add_argument("exit_code", type=int, nargs="?", default=0, help="of the ranks")
    arguments = parser.parse_args(argv)
    if arguments.when == "begin":
        print(begin(arguments.array, arguments.index))
        return 0
    if arguments.when == "evaluated":
        return evaluated(arguments.array, arguments.index, arguments.exit_code)
    return end(arguments.array, arguments.index, arguments.exit_code)


if __name__ == "__main__":
    sys.exit(main())
