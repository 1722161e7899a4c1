"""The commands that use a fitted law: `compare`, `predict`, `plan`, `ask`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.fits.compare import compare
from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.format import interval, number
from analysis.laws.catalogue import get
from analysis.laws.law import Law
from analysis.questions.cost import cost_of, fitted_runs, kind_of
from analysis.questions.need import Need, excluded, need
from analysis.questions.paired import paired_errors
from analysis.questions.plan import plan
from analysis.questions.reach import FAR, LARGEST_N, beyond, check_point, is_far, parse_point
from analysis.questions.rounds import half_width
from analysis.report.words import floor_word, level_only, refuse, standing
from analysis.runs.study import read_study
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.files import write_text_atomic
from harness.terminal import say, table


def as_text(frame: pd.DataFrame, digits: int) -> str:
    """A frame as a table for standard output; floats have `digits` significant digits."""
    rows = [
        [f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in row]
        for row in frame.itertuples(index=False)
    ]
    return table(list(frame.columns), rows)


def fit_from(args: argparse.Namespace, table: RunTable, law: Law | None = None) -> FitResult:
    """The fit that a command line describes, of its own law or of another."""
    return fit(
        table,
        args.law if law is None else law,
        robust=args.robust,
        delta=args.delta,
        weights=args.weights,
        ci=args.ci,
        level=args.level,
        starts=args.starts,
        seed=args.random_seed,
        regime=args.regime,
        edges="keep" if args.keep_edges else "leave_out",
    )


def run_compare(args: argparse.Namespace, table: RunTable) -> int:
    """Print the laws of `--laws` side by side; 1 if none can be fitted."""
    args.keep_edges = True  # laws are compared on the same rows
    fits = [fit_from(args, table, get(name)) for name in args.laws.split(",")]
    refused = [refuse(result, table) for result in fits]
    if all(refused):
        return 1
    print(as_text(compare(fits), digits=5))
    for result in fits:
        for entry in () if result.status is Status.FAILED else result.notes:
            print(f"{result.law.name}: {entry}")
    errors = paired_errors(table)
    if errors is not None:
        print(errors.sentence())
    return 0


def run_predict(args: argparse.Namespace, table: RunTable, result: FitResult) -> int:
    """Print the law at the points of `--at`; 1 if it has no finite value there."""
    points = [parse_point(text) for text in args.at]
    given = [name for name in result.law.inputs if all(name in point for point in points)]
    missing = [name for name in result.law.inputs if name not in given and not (name == "d" and result.converges)]
    if missing:
        raise UserError(f"{result.law.name} needs {missing[0]}=… in every --at")
    for point in points:
        check_point(result, table, point, args.far)
    inputs = {name: np.array([point[name] for point in points]) for name in given}
    band = result.forecast(inputs, args.kind)
    sizes = inputs[result.law.scale_input]
    if any(is_far(result, size) for size in sizes):
        band["far"] = ["far" if is_far(result, size) else "" for size in sizes]
    if "d" in band and "d" not in given:
        band["d"] = "converged"
    print(as_text(band, digits=6))
    for line in [*result.band_notes(band), *result.extrapolation_notes(inputs), *standing(result)]:
        print(line)
    if not np.isfinite(band["value"]).all():
        say("error: the law has no finite value there, too far from the runs; choose nearer points")
        return 1
    return 0


def run_plan(args: argparse.Namespace, table: RunTable, result: FitResult) -> int:
    """Print further cells for the forecast at `--target`, and the commands or the study file that run them."""
    target = parse_point(args.target)
    if set(target) != {"n", "k"}:
        raise UserError(f"--target {args.target!r} must name n and k, e.g. 'n=2**20 k=64'")
    check_point(result, table, target, args.far)
    runs = fitted_runs(table, result)
    cost, kind = cost_of(runs), kind_of(runs)
    sizes = np.unique(runs.values("n"))
    largest = max(target["n"], sizes.max())
    n = 2.0 ** np.arange(np.floor(np.log2(sizes.min())), np.floor(np.log2(largest)) + 1)
    k = np.unique(np.r_[runs.values("k"), target["k"]])
    further = plan(result, target, args.budget, cost, list(n), list(k), args.cap)
    print(f"forecast at {args.target} now: {_with_interval(result, target, further.before)}")
    widths = [f"± {number(100 * half_width(band))} %" for band in (further.before, further.after)]
    widths = f"about {widths[0]} now, {widths[1]} after the planned runs"
    print(f"predicted width of that interval: {widths}, if they confirm the law; its middle will move")
    if is_far(result, target["n"]):
        print(f"far: {beyond(result, target['n'])} n of the runs")
    print(as_text(further.cells, digits=4))
    print(f"in all {number(further.flops)} FLOPs")
    for line in standing(result):
        print(line)
    seeds = table.values("seed") if table.has("seed") else np.array([0.0])
    first_seed = int(np.nanmax(seeds)) + 1
    text = further.study(args.name, first_seed, args.overrides.split(), kind)
    sweep = Path(args.source[0])
    if args.out is not None:
        write_text_atomic(Path(args.out), text)
        print(f"written: {args.out}")
    elif len(args.source) == 1 and sweep.is_dir():
        study = read_study(sweep)
        print("\n".join(further.commands(sweep, study.source, study.overrides, first_seed, kind)))
    else:
        print(text, end="")
    return 0


def _with_interval(result: FitResult, target: dict[str, float], refits: tuple[float, float, float]) -> str:
    """The forecast at a point with its profile interval; with that of the planner's refits if the fit has no band."""
    band = result.forecast({name: [size] for name, size in target.items()}).iloc[0]
    value, low, high = (band[name] for name in ("value", "lo", "hi")) if band.notna().all() else refits
    return f"{number(value)} {interval(low if low > 0 else None, high if np.isfinite(high) else None)}"


def run_ask(args: argparse.Namespace, table: RunTable, result: FitResult) -> int:
    """Print the smallest n that is predicted to reach the loss of `--fvu`."""
    try:
        cost = cost_of(fitted_runs(table, result))
    except UserError:
        cost = None  # n does not need a cost
    if args.at_k is not None:
        check_point(result, table, {"k": args.at_k})
    answer = need(result, args.fvu, args.at_k, cost)
    for line in [*_answer(result, answer, args.fvu, args.far), *standing(result)]:
        print(line)
    return 0


def _answer(result: FitResult, answer: Need, loss: float, far: bool) -> list[str]:
    """The answer to `ask` in words."""
    name, wanted = result.law.scale_input, number(loss)
    smallest, largest = (number(end, 4) for end in result.domain[name])
    floor = f"floor at {number(answer.floor)} {interval(*answer.floor_ends)}"
    if excluded(answer, loss):
        only = f" (this floor is the {floor_word(result)} of tokens)" if level_only(result) else ""
        return [f"not reachable: {floor}, above {wanted}{only}"]
    if answer.n is None and answer.floor > 0:
        return [f"no {name} is predicted to reach {wanted}: {floor}; but its interval does not exclude {wanted}"]
    if answer.n is None or answer.n > LARGEST_N:
        return [f"no {name} within reason is predicted to reach {wanted}"]
    if is_far(result, answer.n) and not far:
        if answer.n < result.domain[name][0]:
            return [f"every {name} of the runs (from {smallest}) is predicted to reach {wanted}; --far gives a number"]
        return [f"{wanted} needs {name} beyond {FAR:g} times the largest of the runs ({largest}); --far gives a number"]
    if answer.every:
        return [f"every {name} from {number(answer.n, 4)} on is predicted to reach {wanted}"]
    lines = [f"{name} = {number(answer.n, 4)} {interval(answer.lo, answer.hi)} is predicted to reach {wanted}"]
    if answer.flops is not None:
        lines.append(f"about {number(answer.flops)} training FLOPs at the tokens per run of these data")
    if is_far(result, answer.n):
        lines.append(f"far: {beyond(result, answer.n)} {name} of the runs ({smallest} to {largest})")
    elif answer.extrapolation > 0:
        lines.append(f"extrapolation: {answer.extrapolation:.2f} of the data's span in ln {name} beyond their edge")
    return lines
