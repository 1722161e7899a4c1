"""The command line of the analysis: `fit`, `report`, `gallery`, `figures`, `compare`, `predict`, `plan`, `ask`.

Exit codes: 0 a result (notes may apply), 1 no fit is possible (the note says why), 2 a wrong request.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis.cli_figures import add_figures
from analysis.cli_forecast import fit_from, run_ask, run_compare, run_plan, run_predict
from analysis.cli_gallery import add_gallery
from analysis.cli_questions import add_questions
from analysis.fits.result import FitResult
from analysis.laws.catalogue import LAWS, OLD_NAMES
from analysis.questions.convergence import TOKENS, convergence_table
from analysis.questions.paired import paired_errors
from analysis.report.words import refuse, used
from analysis.runs.load import load
from analysis.runs.regime import REGIMES
from analysis.runs.table import ROLES, RunTable
from analysis.runs.where import choose
from harness.errors import UserError
from harness.terminal import Parser, path_argument, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        return args.handler(args)
    except UserError as problem:
        say(f"analysis: {problem}")
        return 2
    except BrokenPipeError:
        raise  # `run_command` ends silently
    except OSError as problem:
        say(f"analysis: {problem.filename or ''}: {problem.strerror or problem}")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m analysis", description="Scaling laws from records of runs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    fitting = commands.add_parser(
        "fit", help="fit a law to runs", description="Fit a law to runs and print or store it."
    )
    _add_sources(fitting)
    _add_fit_options(fitting)
    fitting.add_argument("--out", type=path_argument, help="write the fit as JSON")
    fitting.set_defaults(handler=_fit)
    report = commands.add_parser("report", help="write report.html into the directory of a sweep")
    report.add_argument("sweep", type=path_argument, help="sweep directory, e.g. runs/quick")
    report.add_argument(
        "--out", type=path_argument, metavar="FILE", help="default: report.html in the directory of the sweep"
    )
    report.add_argument("--law", help="default: that of the study, or what the grid allows")
    report.set_defaults(handler=_report)
    add_gallery(commands)
    add_figures(commands)
    _add_forecasts(commands)
    for question, run in add_questions(commands):
        _add_sources(question)
        question.set_defaults(law="", handler=lambda args, run=run: run(args, table_from(args)))
    return parser


def _add_forecasts(commands: Any) -> None:
    comparison = commands.add_parser("compare", help="compare several laws on the same runs, by AICc and hold-out")
    _add_sources(comparison)
    _add_fit_options(comparison)
    comparison.add_argument(
        "--laws", default="sae_nk,sae_nk_constant_floor,sae_nk_no_interaction,sae_nk_no_floor", help="comma-separated"
    )
    comparison.set_defaults(handler=_compare)
    prediction = commands.add_parser("predict", help="evaluate the law at new points, with a band")
    _add_sources(prediction)
    _add_fit_options(prediction)
    prediction.add_argument(
        "--at", action="append", required=True, metavar="'n=2**16 k=64'", help="repeat for more points"
    )
    prediction.add_argument("--kind", default="mean", choices=["mean", "new_run"])
    prediction.set_defaults(handler=_predict)
    plan = commands.add_parser("plan", help="choose the further cells that narrow a forecast most per FLOP")
    _add_sources(plan)
    _add_fit_options(plan)
    plan.add_argument("--target", required=True, metavar="'n=2**20 k=64'")
    plan.add_argument("--budget", type=float, required=True, help="FLOPs to spend")
    plan.add_argument("--cap", type=float, help="most FLOPs of one run (default: half of the budget)")
    plan.add_argument("--name", default="planned", help="name of the study file")
    plan.add_argument(
        "--overrides", default="", help="settings to repeat from the sweep, e.g. 'activations=minilm train=quick'"
    )
    plan.add_argument(
        "--out", type=path_argument, help="write the study file (YAML) to this path instead of printing it"
    )
    plan.set_defaults(handler=_plan)
    question = commands.add_parser("ask", help="find the smallest n that is predicted to reach a loss")
    _add_sources(question)
    _add_fit_options(question)
    question.add_argument("--fvu", type=float, required=True, help="the loss to reach")
    question.add_argument("--at-k", type=float, help="active latents; --k NUMBER means the same")
    question.set_defaults(handler=_ask)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        help="sweep directory, .csv/.tsv/.parquet table, or wandb:entity/project/group; several are stacked",
    )
    for role in ROLES:
        derived = f"; {TOKENS} is derived from the runs" if role == "loss" else ""
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"column that holds {role}{derived}")
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="only these runs: sae=topk, 'k<=160', n!=256"
    )
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
        "--regime", default="auto", choices=REGIMES, help="runs at convergence or at fixed tokens; `all` mixes them"
    )
    parser.add_argument(
        "--keep-edges", action="store_true", help="also fit the rows at an edge that do not belong to the others"
    )
    parser.add_argument("--starts", type=int, default=64)
    parser.add_argument("--far", action="store_true", help="also forecast beyond 8 times the largest n of the runs")
    parser.add_argument("--random-seed", type=int, default=0, help="seed of the random starts and resamples")


def table_from(args: argparse.Namespace) -> RunTable:
    """The runs that a command line names. `--loss tokens_to_convergence` makes tokens to convergence the loss."""
    if args.law in OLD_NAMES and args.loss is None:
        args.loss = TOKENS  # under its old name the law was for this quantity
    derived = args.loss == TOKENS
    roles = {role: column for role in ROLES if (column := getattr(args, role)) is not None}
    table = load(args.source, {role: column for role, column in roles.items() if role != "loss" or not derived})
    table = choose(table, args.where)
    if args.drop_largest_loss < 0:
        raise UserError(f"--drop-largest-loss {args.drop_largest_loss} must not be negative")
    if args.drop_largest_loss:
        loss = table.values("loss")
        if args.drop_largest_loss >= len(loss):
            raise UserError(f"--drop-largest-loss {args.drop_largest_loss} would leave none of {len(loss)} runs")
        rank = (-loss).argsort(kind="stable").argsort()
        table = table.keep(rank >= args.drop_largest_loss, f"one of the {args.drop_largest_loss} largest losses")
    return convergence_table(table) if derived else table


def _fit(args: argparse.Namespace) -> int:
    table = table_from(args)
    result = fit_from(args, table)
    if args.out is not None:
        result.to_json(args.out)
    if refuse(result, table):
        return 1
    print("\n".join([*used(result), result.summary()]))
    errors = paired_errors(table)
    if errors is not None:
        print(errors.sentence())
    print(f"written: {args.out}" if args.out else json.dumps(result.as_dict()["params"]))
    return 0


def _say_used(result: FitResult, code: int) -> int:
    """On stderr, which runs an answer is from, if there is one; returns the exit code."""
    for line in () if code else used(result):
        say(line)
    return code


def _compare(args: argparse.Namespace) -> int:
    return run_compare(args, table_from(args))


def _predict(args: argparse.Namespace) -> int:
    table = table_from(args)
    result = fit_from(args, table)
    return _say_used(result, refuse(result, table) or run_predict(args, table, result))


def _plan(args: argparse.Namespace) -> int:
    if not 0 < args.budget < float("inf"):
        raise UserError(f"--budget {args.budget} must be a positive number of FLOPs")
    table = table_from(args)
    result = fit_from(args, table)
    return _say_used(result, refuse(result, table) or run_plan(args, table, result))


def _ask(args: argparse.Namespace) -> int:
    if args.k is not None and args.at_k is None:
        with suppress(ValueError):  # not a number: the name of a column, as in the other commands
            args.k, args.at_k = None, float(args.k)
    table = table_from(args)
    result = fit_from(args, table)
    return _say_used(result, refuse(result, table) or run_ask(args, table, result))


def _report(args: argparse.Namespace) -> int:
    # only the report needs matplotlib and jinja2
    from analysis.report.cells import cell_text
    from analysis.report.closing import closing_lines
    from analysis.report.findings import gather
    from analysis.report.page import write_report

    findings = gather(Path(args.sweep), args.law)
    path = write_report(args.sweep, findings=findings, out=args.out)
    print(cell_text(findings.table))
    for line in closing_lines(findings):
        print(line)
    print(f"report: {path}")
    return 0
