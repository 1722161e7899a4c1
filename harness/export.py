"""`python -m harness.export RUN_DIR --format saelens|sparsify|dictionary_learning --out DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from harness.errors import UserError
from harness.saes.export import FORMATS, export
from harness.terminal import path_argument, run_command, say


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m harness.export", description="Write the SAE of a finished run in the format of another tool."
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        warnings = export(arguments.run_dir, arguments.format, arguments.out)
    except UserError as error:
        say(f"error: {error}")
        return 2
    for warning in warnings:
        say(f"warning: {warning}")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
