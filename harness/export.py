"""`python -m harness.export RUN_DIR --format saelens|sparsify|dictionary_learning|neuronpedia --out DIR`, or
`--push hf:ORG/NAME`."""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import UserError
from harness.saes.export import FORMATS, export
from harness.saes.publish import LICENSE, push
from harness.terminal import Parser, path_argument, run_command, say


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m harness.export",
        description="Hand a finished SAE on: in the format of another tool, or on the hub.",
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="with --push, also a sweep directory")
    parser.add_argument("--format", choices=FORMATS)
    parser.add_argument("--out", type=path_argument, metavar="DIR")
    parser.add_argument("--push", metavar="hf:ORG/NAME", help="publish on the Hugging Face hub, privately at first")
    parser.add_argument("--license", default=LICENSE, metavar="ID", help=f"for the model card; default: {LICENSE}")
    arguments = parser.parse_args(argv)
    if bool(arguments.push) == bool(arguments.format) or bool(arguments.format) != bool(arguments.out):
        parser.error("give either --format and --out, or --push")
    try:
        if arguments.push:
            print(f"published: {push(arguments.run_dir, arguments.push, arguments.license)}")
            return 0
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
