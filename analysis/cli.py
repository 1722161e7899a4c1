"""The command line of the analysis: `fit`, `report`, `compare`, `predict`, `plan`, `ask`.

Exit codes: 0 a result (notes may apply), 1 no fit is possible (the note says why), 2 a wrong request.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis.convergence import REGIMES, convergence_table
from analysis.fit import fit
from analysis.laws import LAWS
from analysis.load import load
from analysis.result import FitResult
from analysis.table import ROLES, RunTable
from analysis.words import left_out, refuse
from harness.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Wrong requests as one line, exit code 2."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        return args.handler(args)
    except UserError as problem:
        print(f"analysis: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = None  # the reader of a pipe has gone; nothing is left to say
        return 0
    except OSError as problem:
        print(f"analysis: {problem.filename or ''}: {problem.strerror or problem}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m analysis", description="Scaling laws from records of runs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    one = commands.add_parser("fit", help="fit a law to runs", description="Fit a law to runs and print or store it.")
    _add_sources(one)
    _add_fit_options(one)
    one.add_argument("--out", type=Path, help="write the fit as JSON")
    one.set_defaults(handler=_fit)
    two = commands.add_parser("report", help="write report.html beside the runs of a sweep")
    two.add_argument("sweep", type=Path, help="sweep directory, e.g. runs/quick")
    two.add_argument("--law", choices=sorted(LAWS), help="default: the study's, or what the grid allows")
    two.set_defaults(handler=_report)
    _add_forecasts(commands)
    return parser


def _add_forecasts(commands: Any) -> None:
    three = commands.add_parser("compare", help="several laws on the same runs, by AICc and hold-out")
    _add_sources(three)
    _add_fit_options(three)
    three.add_argument(
        "--laws", default="sae_nk,sae_nk_constant_floor,sae_nk_no_interaction,sae_nk_no_floor", help="comma-separated"
    )
    three.set_defaults(handler=_compare)
    four = commands.add_parser("predict", help="the law at new points, with a band")
    _add_sources(four)
    _add_fit_options(four)
    four.add_argument("--at", action="append", required=True, metavar="'n=2**16 k=64'", help="repeat for more points")
    four.add_argument("--kind", default="mean", choices=["mean", "new_run"])
    four.set_defaults(handler=_predict)
    five = commands.add_parser("plan", help="which further cells narrow a forecast most per FLOP")
    _add_sources(five)
    _add_fit_options(five)
    five.add_argument("--target", required=True, metavar="'n=2**20 k=64'")
    five.add_argument("--budget", type=float, required=True, help="FLOPs to spend")
    five.add_argument("--cap", type=float, help="most FLOPs of one run (default: half of the budget)")
    five.add_argument("--name", default="planned", help="name of the study that is written")
    five.add_argument(
        "--overrides", default="", help="settings of the sweep to repeat, e.g. 'activations=minilm train=quick'"
    )
    five.add_argument("--out", type=Path, help="write the study file (YAML) there instead of printing it")
    five.set_defaults(handler=_plan)
    six = commands.add_parser("ask", help="the smallest n predicted to reach a loss")
    _add_sources(six)
    _add_fit_options(six)
    six.add_argument("--fvu", type=float, required=True, help="the loss to reach")
    six.add_argument("--at-k", type=float, help="active latents; --k NUMBER means the same")
    six.set_defaults(handler=_ask)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        help="sweep directory, .csv/.tsv/.parquet table, or wandb:entity/project/group; several are stacked",
    )
    for role in ROLES:
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"column that holds {role}")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these runs")
    parser.add_argument(
        "--drop-largest-loss", type=int, default=0, metavar="N", help="leave out the N runs with the largest loss"
    )


def _add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--law", default="sae_nk", help=f"one of: {', '.join(LAWS)}")
    parser.add_argument("--robust", choices=["huber"], help="robust loss instead of least squares")
    parser.add_argument("--delta", type=float, default=1e-3, help="δ of the Huber loss, in units of ln(loss)")
    parser.add_argument("--weights", default="auto", choices=["auto", "seeds", "none"])
    parser.add_argument("--ci", default="profile", choices=["profile", "wald", "bootstrap"])
    parser.add_argument("--level", type=float, default=0.95, help="confidence level")
    parser.add_argument(
        "--regime", default="auto", choices=REGIMES, help="runs at convergence or at fixed tokens; never both unasked"
    )
    parser.add_argument("--starts", type=int, default=64)
    parser.add_argument("--random-seed", type=int, default=0, help="seed of the random starts and resamples")


def table_from(args: argparse.Namespace) -> RunTable:
    """The runs that a command line asks for."""
    roles = {role: column for role in ROLES if (column := getattr(args, role)) is not None}
    table = load(args.source, roles)
    for condition in args.where:
        column, mark, value = condition.partition("=")
        if not mark:
            raise UserError(f"--where {condition!r} is not COLUMN=VALUE")
        table = table.where("", **{column: value})
    if args.drop_largest_loss < 0:
        raise UserError(f"--drop-largest-loss {args.drop_largest_loss} must not be negative")
    if args.drop_largest_loss:
        loss = table.values("loss")
        if args.drop_largest_loss >= len(loss):
            raise UserError(f"--drop-largest-loss {args.drop_largest_loss} would leave none of {len(loss)} runs")
        rank = (-loss).argsort(kind="stable").argsort()
        table = table.keep(rank >= args.drop_largest_loss, f"one of the {args.drop_largest_loss} largest losses")
    return table


def fit_from(args: argparse.Namespace, table: RunTable) -> FitResult:
    """The fit that a command line asks for."""
    if args.law not in LAWS:
        raise UserError(f"law {args.law!r} is not known; choose one of: {', '.join(LAWS)}")
    return fit(
        table,
        args.law,
        robust=args.robust,
        delta=args.delta,
        weights=args.weights,
        ci=args.ci,
        level=args.level,
        starts=args.starts,
        seed=args.random_seed,
        regime=args.regime,
    )


def _fit(args: argparse.Namespace) -> int:
    table = table_from(args)
    if args.law == "tokens_to_convergence" and args.loss is None:
        table = convergence_table(table)
    result = fit_from(args, table)
    if args.out is not None:
        result.to_json(args.out)
    if refuse(result, table):
        return 1
    print(result.summary())
    for line in left_out(table):
        print(line)
    print(f"written: {args.out}" if args.out else json.dumps(result.as_dict()["params"]))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from analysis.cli_forecast import run_compare

    return run_compare(args, table_from(args))


def _predict(args: argparse.Namespace) -> int:
    from analysis.cli_forecast import run_predict

    table = table_from(args)
    result = fit_from(args, table)
    return refuse(result, table) or run_predict(args, result)


def _plan(args: argparse.Namespace) -> int:
    from analysis.cli_forecast import run_plan

    if not 0 < args.budget < float("inf"):
        raise UserError(f"--budget {args.budget} must be a positive number of FLOPs")
    table = table_from(args)
    result = fit_from(args, table)
    return refuse(result, table) or run_plan(args, table, result)


def _ask(args: argparse.Namespace) -> int:
    from analysis.cli_forecast import run_ask

    if args.k is not None and args.at_k is None:
        with suppress(ValueError):  # a name: the column that holds k, as in the other commands
            args.k, args.at_k = None, float(args.k)
    table = table_from(args)
    result = fit_from(args, table)
    return refuse(result, table) or run_ask(args, table, result)


def _report(args: argparse.Namespace) -> int:
    from analysis.report import summary_table, write_report

    path = write_report(args.sweep, law=args.law)
    print(summary_table(args.sweep))
    print(f"report: {path}")
    return 0
