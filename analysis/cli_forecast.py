"""The commands that use a fitted law: `compare`, `predict`, `plan`, `ask`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.fits.compare import compare
from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.format import interval, number
from analysis.laws.catalogue import get
from analysis.questions.cost import cost_of
from analysis.questions.need import need
from analysis.questions.paired import paired_errors
from analysis.questions.plan import plan
from analysis.report.words import refuse
from analysis.runs.study import read_study
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.files import write_text_atomic
from harness.terminal import say, table


def parse_point(text: str) -> dict[str, float]:
    """ "n=2**20 k=64" (or with commas) as numbers; a power is written 2**20 or 2^20. Raises `UserError` otherwise."""
    point = {}
    for part in re.split(r"[\s,]+", text.strip()):
        name, equals, value = part.partition("=")
        base, power, exponent = value.replace("^", "**").partition("**")
        try:
            point[name] = float(base) ** float(exponent) if power else float(base)
        except (ValueError, OverflowError):
            equals = ""
        if not equals or not name or not np.isfinite(point[name]) or point[name] <= 0:
            raise UserError(f"{part!r} is not NAME=NUMBER, e.g. n=2**20 or k=64")
    return point


def as_text(frame: pd.DataFrame, digits: int) -> str:
    """A frame as a table for standard output; floats have `digits` significant digits."""
    rows = [
        [f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in row]
        for row in frame.itertuples(index=False)
    ]
    return table(list(frame.columns), rows)


def run_compare(args: argparse.Namespace, table: RunTable) -> int:
    """Print the laws of `--laws` side by side; 1 if none can be fitted."""
    laws = [get(name) for name in args.laws.split(",")]
    fits = [fit(table, law, ci="wald", weights=args.weights, starts=args.starts) for law in laws]
    refused = [refuse(result, table) for result in fits]
    if all(refused):
        return 1
    print(as_text(compare(fits), digits=5))
    errors = paired_errors(table)
    if errors is not None:
        print(errors.sentence())
    return 0


def run_predict(args: argparse.Namespace, result: FitResult) -> int:
    """Print the law at the points of `--at`; 1 if it has no finite value there."""
    points = [parse_point(text) for text in args.at]
    missing = [name for name in result.law.inputs if any(name not in point for point in points)]
    if missing:
        raise UserError(f"{result.law.name} needs {missing[0]}=… in every --at")
    inputs = {name: np.array([point[name] for point in points]) for name in result.law.inputs}
    band = result.predict(inputs, args.kind)
    print(as_text(band, digits=6))
    for entry in [*result.band_notes(band), *result.extrapolation_notes(inputs)]:
        print(entry)
    if not np.isfinite(band["value"]).all():
        say("error: the law has no finite value there, too far from the runs; choose nearer points")
        return 1
    return 0


def run_plan(args: argparse.Namespace, table: RunTable, result: FitResult) -> int:
    """Print further cells for the forecast at `--target`, and the commands or the study file that run them."""
    target = parse_point(args.target)
    if set(target) != {"n", "k"}:
        raise UserError(f"--target {args.target!r} must name n and k, e.g. 'n=2**20 k=64'")
    cost = cost_of(table)
    sizes = np.unique(table.values("n"))
    largest = max(target["n"], sizes.max())
    n = 2.0 ** np.arange(np.floor(np.log2(sizes.min())), np.floor(np.log2(largest)) + 1)
    k = np.unique(np.r_[table.values("k"), target["k"]])
    further = plan(result, target, args.budget, cost, list(n), list(k), args.cap)
    for name, (value, low, high) in (("now", further.before), ("after the planned runs", further.after)):
        print(f"forecast at {args.target} {name}: {number(value)} {interval(low, high)}")
    print(as_text(further.cells, digits=4))
    print(f"in all {number(further.flops)} FLOPs")
    seeds = table.values("seed") if table.has("seed") else np.array([0.0])
    first_seed = int(np.nanmax(seeds)) + 1
    text = further.study(args.name, first_seed, args.overrides.split())
    sweep = Path(args.source[0])
    if args.out is not None:
        write_text_atomic(Path(args.out), text)
        print(f"written: {args.out}")
    elif len(args.source) == 1 and sweep.is_dir():
        study = read_study(sweep)
        print("\n".join(further.commands(sweep, study.source, study.overrides, first_seed)))
    else:
        print(text, end="")
    return 0


def run_ask(args: argparse.Namespace, table: RunTable, result: FitResult) -> int:
    """Print the smallest n that is predicted to reach the loss of `--fvu`."""
    try:
        cost = cost_of(table)
    except UserError:
        cost = None  # n does not need a cost
    answer = need(result, args.fvu, args.at_k, cost)
    if answer.n is None:
        if answer.floor >= args.fvu:
            print(f"not reachable: floor at {number(answer.floor)}, above {number(args.fvu)}")
        else:
            print(f"not reachable at any n within reason; the fitted floor is {number(answer.floor)}")
        return 0
    print(f"n = {number(answer.n, 4)} {interval(answer.lo, answer.hi)} is predicted to reach {number(args.fvu)}")
    if answer.flops is not None:
        print(f"about {number(answer.flops)} training FLOPs at the tokens per run of these data")
    if answer.extrapolation > 0:
        print(f"extrapolation: {answer.extrapolation:.2f} of the data's span in ln n beyond their edge")
    return 0
