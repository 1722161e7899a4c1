"""The commands that answer one question about runs: `isoflop`, `multiplier`, `frontier`, `best-rates`, `description`,
`layers`, `suite`, `manifolds`, `mutual`, `versus`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from analysis.cli_forecast import as_text
from analysis.fits.status import Status
from analysis.format import interval, number
from analysis.questions.description import description_lengths
from analysis.questions.frontier import frontier, frontier_law
from analysis.questions.isoflop import isoflop
from analysis.questions.layers import DIMENSIONS, hooks, layer_laws, rank_correlation, suite
from analysis.questions.learning_rate import best_rates
from analysis.questions.manifolds import regimes
from analysis.questions.mutual import mutual
from analysis.questions.paired import paired_errors
from analysis.questions.setting_ratios import setting_ratios
from analysis.report.findings import compared_architectures
from analysis.report.words import law_sentences, losses_words, multiplier_sentences, rate_sentences
from analysis.runs.axes import AXES, at_equal_flops, axis_words
from analysis.runs.curves import evaluations
from analysis.runs.populations import at_best_rate, one_setting
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
            row = [number(entry.k), number(entry.experts), AXES[axis], value, interval(result.lo, result.hi)]
            rows.append([*row, losses_words(result, "loss")])
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


def run_description(args: argparse.Namespace, runs: RunTable) -> int:
    """Print, at several errors, the n whose codes take the fewest bits."""
    rows = []
    for found in description_lengths(one_setting(runs), args.at_fvu or ()):
        where = "inside the grid" if found.inside else "at an edge of the grid"
        sizes = " ".join(f"{n}:{number(bits)}" for n, bits in zip(found.n, found.bits, strict=True))
        at = found.n.index(found.best)
        seeds = " ".join(map(str, found.by_seed)) or "–"
        rows.append([found.sae, number(found.fvu), str(found.best), where, number(found.k[at]), seeds, sizes])
    print(table(["sae", "fvu", "best n", "minimum", "k there", "best n by seed", "n:bits per token"], rows))
    return 0


def run_layers(args: argparse.Namespace, runs: RunTable) -> int:
    """Print the exponent of width at every hook, and how it goes with the dimension of the rows."""
    laws = layer_laws(runs)
    rows = []
    for law in laws:
        known = [number(law.dimensions[name]) if name in law.dimensions else "–" for name in DIMENSIONS]
        exponent = [number(law.exponent), interval(*law.interval)]
        rows.append([law.place, law.sae, number(law.k), str(law.sizes), *exponent, *known])
    print(table(["hook", "sae", "k", "sizes", "exponent", "95 % interval", *DIMENSIONS], rows))
    for sae, k in dict.fromkeys((law.sae, law.k) for law in laws):
        part = [law for law in laws if (law.sae, law.k) == (sae, k)]
        for name in DIMENSIONS:
            tested = rank_correlation(part, name)
            if tested is not None:
                rho, p = tested
                print(f"{sae}, k = {k:g}: rank correlation of the exponent with {name} {number(rho)} (p = {number(p)})")
    return 0


def run_suite(args: argparse.Namespace, runs: RunTable) -> int:
    """Print fvu, L0 and losses of the language model by hook and layer."""
    print(as_text(suite(runs).rename(columns=lambda name: str(name).removeprefix("quality.downstream.")), digits=4))
    apart = hooks(runs)
    for _, run in runs.excluded.iterrows():
        place = ", ".join(f"{column}={run[column]}" for column in apart)
        print(f"left out: {place} ({run[runs.roles['run']]}): {run['reason']}")
    return 0


def run_manifolds(args: argparse.Namespace, runs: RunTable) -> int:
    """Print whether further latents find further features of synthetic activations, or tile those they have."""
    rows = []
    for found in regimes(runs):
        says = {True: "latents tile manifolds", False: "latents find features", None: "undecided"}[found.tiles]
        exponents = [number(found.found), interval(*found.found_interval), number(found.loss)]
        rows.append([found.cell, str(found.sizes), *exponents, interval(*found.loss_interval), says])
    heads = ["cell", "sizes", "features ~ n^", "95 % interval", "loss ~ n^−", "95 % interval", "regime"]
    print(table(heads, rows))
    return 0


def run_versus(args: argparse.Namespace, runs: RunTable) -> int:
    """Print the loss with each value of a setting over that with its base value."""
    base = {}
    for text in args.by:
        column, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--by {text}: write COLUMN=VALUE, where VALUE is the base, e.g. sae.routing=learned")
        base[column] = value
    rows = [
        [entry.cell, entry.setting, number(entry.ratio), interval(*entry.interval), number(entry.loss), str(entry.runs)]
        for entry in setting_ratios(runs, base)
    ]
    loss = runs.roles["loss"]
    print(table(["cell", "setting", f"{loss} / base", "95 % interval", loss, "runs"], rows))
    return 0


def run_mutual(args: argparse.Namespace, runs: RunTable) -> int:
    """Print what mutual feature regularisation does to the loss and to the cosines between SAEs."""
    rows = []
    for entry in mutual(runs):
        cosines = [entry.peers, entry.strangers, entry.without, entry.chance]
        about = [entry.cell, number(entry.weight), str(entry.runs), number(entry.ratio), interval(*entry.interval)]
        rows.append([*about, *("-" if cosine is None else number(cosine) for cosine in cosines)])
    loss = runs.roles["loss"]
    heads = ["cell", "weight", "runs", f"{loss} / without", "95 % interval", "cosine of peers", "of others", "without"]
    print(table([*heads, "chance"], rows))
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
    descriptions = commands.add_parser("description", help="the n whose codes take the fewest bits at equal fvu")
    descriptions.add_argument("--at-fvu", type=float, action="append", help="fvu at which to compare; repeat for more")
    layers = commands.add_parser("layers", help="the exponent of width at every hook, and the dimension of its rows")
    suites = commands.add_parser("suite", help="fvu, L0, KL and ΔCE by hook and layer")
    manifolds = commands.add_parser(
        "manifolds", help="whether latents find features or tile manifolds (synthetic runs)"
    )
    mutuals = commands.add_parser("mutual", help="what mutual feature regularisation does to loss and features")
    versus = commands.add_parser("versus", help="what a setting does to the loss, paired by held-out document")
    versus.add_argument(
        "--by", action="append", required=True, metavar="COLUMN=BASE", help="a setting and its base; repeat for more"
    )
    return [
        (isoflops, run_isoflop),
        (multipliers, run_multiplier),
        (fronts, run_frontier),
        (rates, run_best_rates),
        (descriptions, run_description),
        (layers, run_layers),
        (suites, run_suite),
        (manifolds, run_manifolds),
        (versus, run_versus),
        (mutuals, run_mutual),
    ]
