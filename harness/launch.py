"""`python -m harness.launch OVERRIDES…`: a grid of runs, from Hydra overrides or a study file to results.

Exit codes: 0 every cell done, 1 a cell failed or diverged, 2 a wrong request, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import yaml

from harness.config import Config, to_container
from harness.errors import WRONG_REQUEST, UserError
from harness.grid.schema import CONF_DIR, groups
from harness.grid.study import load_study, study_names
from harness.sweep.execute import launch
from harness.sweep.rehearse import rehearse
from harness.sweep.request import Request, requested_cells
from harness.terminal import Parser, python_command, run_command, say


def parse_only(texts: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=A,B` filters of the command line; the schema gives the values their types."""
    only: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--only {text}: write KEY=VALUE or KEY=A,B")
        only[key] = values.split(",")
    return only


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m harness.launch",
        description="Train a grid of sparse autoencoders; finished runs are not trained again.",
        epilog="Exit codes: 0 every cell done, 1 one failed or diverged, 2 wrong request, 75 interrupted (resumable).",
        allow_abbrev=False,
    )
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="Hydra overrides; KEY=A,B sweeps, e.g. sae=topk,switch sae.n_latents=2048,4096 sae.k=16 sweep=mine",
    )
    result.add_argument("--study", metavar="NAME|FILE", help=f"a study file: {', '.join(study_names())}, or a path")
    result.add_argument(
        "--only", action="append", default=[], metavar="KEY=A,B", help="keep only cells with these values"
    )
    result.add_argument("--dry-run", action="store_true", help="show cells, costs and what is done; write nothing")
    result.add_argument(
        "--calibrate", action="store_true", help="time a few steps here for later plans, and leave; with Slurm in a job"
    )
    result.add_argument(
        "--rehearse",
        action="store_true",
        help="try every shape of the grid for a few steps where it will train; keep nothing",
    )
    result.add_argument("--wait", action="store_true", help="with cluster=slurm: return when all runs have ended")
    result.add_argument(
        "--cfg", choices=["job", "hydra", "all"], help="print the composed configuration of the first cell and leave"
    )
    result.add_argument(
        "--info", nargs="?", const="all", metavar="WHAT", help="print configuration groups, their options and studies"
    )
    result.add_argument("-m", "--multirun", action="store_true", help="accepted from habit; sweeps need no flag here")
    result.add_argument("--traceback", action="store_true", help="show the traceback of a wrong request")
    return result


def print_info() -> None:
    print(f"configuration directory: {CONF_DIR}")
    for name, options in groups().items():
        print(f"{name}: {', '.join(options)}")
    print(f"studies: {', '.join(study_names())}")


def print_config(config: Config) -> None:
    print(yaml.safe_dump(to_container(config), sort_keys=False), end="")


def run(arguments: argparse.Namespace) -> int:
    if arguments.info:
        print_info()
        return 0
    study = load_study(arguments.study) if arguments.study else None
    if study is not None:
        from analysis.runs.study import require_law  # takes a second, and only studies have a law

        require_law(study.source, study.law)
    request = Request(arguments.overrides, study, parse_only(arguments.only))
    if arguments.cfg:
        print_config(requested_cells(request)[0].config)
        return 0
    if arguments.rehearse:
        if arguments.dry_run or arguments.calibrate:
            raise UserError("--rehearse does not go with --dry-run or --calibrate; leave one of them out")
        return rehearse(request)
    outcome = launch(request, dry_run=arguments.dry_run, wait=arguments.wait, calibrate=arguments.calibrate)
    if outcome.exit_code == 0 and not (arguments.dry_run or arguments.calibrate) and not outcome.submitted:
        for sweep_dir in outcome.sweep_dirs:
            say(f"for the law and the report: {python_command('analysis', 'report', sweep_dir)}")
    return outcome.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        if arguments.traceback:
            raise
        say(f"error: {error}")
    except OSError as error:
        if arguments.traceback or error.filename is None:
            raise
        say(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
    return WRONG_REQUEST


if __name__ == "__main__":
    run_command(main)
