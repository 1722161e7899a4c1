"""The commands that answer one question about runs: `isoflop`, `multiplier`, `frontier`, `best-rates`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from analysis.cli_forecast import as_text
from analysis.fits.status import Status
from analysis.format import interval, number
from analysis.questions.frontier import frontier, frontier_law
from analysis.questions.isoflop import isoflop
from analysis.questions.learning_rate import best_rates
from analysis.questions.paired import paired_errors
from analysis.report.findings import compared_architectures
from analysis.report.words import law_sentences, multiplier_sentences, rate_sentences
from analysis.runs.axes import AXES, at_equal_flops, axis_words
from analysis.runs.curves import evaluations
from analysis.runs.populations import at_best_rate
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.terminal import say, table

Command = Callable[[argparse.Namespace, RunTable], int]


def run_isoflop(args: argparse.Namespace, runs: RunTable) -> int:
    """Print the best n at each budget, for every k; 1 if no k allows it."""
    if args.budgets < 1:
        raise UserError(f"--budgets {args.budgets} must be at least 1")
    runs = at_equal_flops(runs)
    answered = False
    for k in sorted(set(runs.values("k"))) if runs.has("k") else [None]:
        part = runs if k is None else runs.where("another k", **{runs.roles["k"]: k})
        try:
            found = isoflop(part, args.budgets)
        except UserError as problem:
            say(f"k = {k:g}: {problem}" if k is not None else str(problem))
            continue
        answered = True
        print(f"{'' if k is None else f'k = {k:g}: '}best n at equal {axis_words(runs.roles)}")
        print(as_text(found.minima, digits=4))
        if found.law is not None:
            law = found.law
            print(f"n goes as C^{number(law.values['p'])} {interval(*law.intervals['p'])}")
        for entry in found.notes:
            print(entry)
    return 0 if answered else 1


def run_frontier(args: argparse.Namespace, runs: RunTable) -> int:
    """Print the lowest loss at each compute, and its law if there are enough points; 1 if there is no point."""
    runs = at_equal_flops(runs)
    curves = evaluations(runs)
    front = frontier(runs, curves)
    if front.empty:
        say(f"{runs.name}: no run has a loss and FLOPs")
        return 1
    print(f"lowest loss against {axis_words(runs.roles)}{_together(runs)}")
    print(as_text(front[["flops", "loss", "tokens", "run"]], digits=4))
    if len(front) > 4:
        law = frontier_law(runs, curves)
        if law.status is not Status.FAILED:
            print(" ".join(law_sentences(law, [])))
        for entry in law.notes:
            print(entry)
    return 0


def _together(runs: RunTable) -> str:
    """What a frontier is taken over besides the sizes, in words."""
    several = []
    if "sae" in runs.frame and runs.frame["sae"].nunique() > 1:
        several.append(f"sae = {', '.join(sorted(map(str, runs.frame['sae'].unique())))}")
    if runs.has("k") and len(levels := sorted(set(runs.values("k")))) > 1:
        several.append(f"k = {', '.join(f'{k:g}' for k in levels)}")
    return f", the lowest over {' and '.join(several)} (choose with --where)" if several else ""


def run_multiplier(args: argparse.Namespace, runs: RunTable) -> int:
    """Print how much less compute Switch needs than TopK, on every axis; 1 if nothing can be compared."""
    if args.at_loss is not None and not 0 < args.at_loss < math.inf:
        raise UserError(f"--at-loss {args.at_loss:g} must be positive and finite")
    found = [entry for entry in compared_architectures(runs, args.at_loss) if entry.x == "flops"]
    if not found:
        say(f"{runs.name}: no k has three sizes of both TopK and Switch; nothing to compare")
        return 1
    for sentence in multiplier_sentences(found):
        print(sentence)
    rows = []
    for entry in found:
        for axis, result in entry.by_axis:
            value = "–" if result.value is None else number(result.value)
            at = "every loss of these runs" if result.at_loss is None else f"loss {number(result.at_loss)}"
            row = [number(entry.k), number(entry.experts), AXES[axis], value, interval(result.lo, result.hi), at]
            rows.append(row)
    if rows:
        print(table(["k", "experts", "counted in", "TopK / Switch", "95 % interval", "holds at"], rows))
    for entry in dict.fromkeys(entry for comparison in found for entry in comparison.multiplier.notes):
        print(entry)
    return 0


def run_best_rates(args: argparse.Namespace, runs: RunTable) -> int:
    """Print the best learning rate of every n and k, and its slope in n; 1 if every cell was run at one rate."""
    runs = runs.use("n", "k", "lr", "loss")
    if runs.has("lr") and len(at_best_rate(runs)) == len(runs):
        say(f"{runs.name}: every cell was run at one learning rate; run several, e.g. train.lr_factor=2,4,8")
        return 1
    kinds = runs.frame["sae"].unique() if "sae" in runs.frame else [None]
    for kind in kinds:
        part = runs if kind is None else runs.where("another architecture", sae=kind)
        found = best_rates(part, paired_errors(part))
        if kind is not None:
            print(f"{kind}:")
        shown = found.rates if found.rates["as_good"].notna().any() else found.rates.drop(columns="as_good")
        print(as_text(shown, digits=4))
        for line in [*rate_sentences(found), *map(str, found.notes)]:
            print(line)
    return 0


def add_questions(
    commands: argparse._SubParsersAction,
) -> list[tuple[argparse.ArgumentParser, Command]]:
    """Add the commands; returns each parser with its function, to be given sources and a handler."""
    isoflops = commands.add_parser("isoflop", help="the best n at each compute budget, for every k")
    isoflops.add_argument("--budgets", type=int, default=8, help="number of budgets to read training curves at")
    multipliers = commands.add_parser("multiplier", help="how much less compute Switch needs than TopK, on every axis")
    multipliers.add_argument("--at-loss", type=float, help="loss at which to compare")
    fronts = commands.add_parser("frontier", help="the lowest loss at each compute, and its law")
    rates = commands.add_parser("best-rates", help="the best learning rate of every n and k")
    return [(isoflops, run_isoflop), (multipliers, run_multiplier), (fronts, run_frontier), (rates, run_best_rates)]
