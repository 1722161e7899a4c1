"""What to run next: the cells that narrow a forecast most per FLOP, and the size that a loss needs.

The planner is c-optimal design by greedy choice. With the Fisher information M = JᵀWJ/s² of the existing runs, the
forecast at the target has variance gᵀM⁻¹g (g the gradient of ln(loss) there). A further run with gradient j and noise
s² lowers it by (gᵀM⁻¹j)² / (s² + jᵀM⁻¹j). The planner adds the cell with the largest fall per FLOP until the budget is
spent.

Both g and M depend on the coefficients, which the existing runs determine badly: the best design for the estimate can
be poor for the truth (worst if the estimate has lost its floor). So the planner lowers the mean log variance over
refits to data simulated from the fit: it averages c-optimality over plausible coefficients.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from analysis.fits.intervals import condition, critical_t
from analysis.fits.problem import starting_points
from analysis.fits.result import FitResult
from analysis.fits.solve import minimise
from analysis.fits.status import Status
from analysis.laws.law import Array
from analysis.questions.cost import TOPK, Cost, Kind
from harness.errors import UserError

RIDGE = 1e-10
"""Relative to the largest information; it keeps undetermined directions finite."""

SIMULATIONS = 24
"""Refits to simulated data that judge a plan together with the fit itself."""

SINGULAR = 1e4
"""A refit has lost a coefficient if the condition number of its scaled Jacobian is above this."""

MOST_SEEDS = 5
"""Most repeats of one cell in a plan. With more, the error of the law itself outweighs that of the seeds; the planner
does not see it, as it takes the law for true."""

POWERS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Each gives a plan by greedy choice of the fall per price^power; the best plan is taken."""

LARGEST_LOG = 700.0
"""Logarithm of about the largest number in double precision."""

PLANNED_KEYS = {
    *(
        "sae",
        "sae.architecture",
        "sae.n_latents",
        "sae.k",
        "sae.n_experts",
        "train.seed",
        "stream.seed",
        "sweep",
        "out",
    ),
}
"""Overrides of a sweep that a plan replaces with its own."""


@dataclass
class Plan:
    """Cells to run, and the forecast with and without them."""

    cells: pd.DataFrame
    """n, k, seeds (number of repeats), flops (of all repeats)."""
    before: tuple[float, float, float]
    """(value, lo, hi) of the forecast now. If the estimate has lost a coefficient, lo and hi come from the refits."""
    after: tuple[float, float, float]
    """The same with the planned runs, if they confirm the law."""
    flops: float
    """Of the whole plan."""

    def commands(
        self, sweep: Path, study: str, overrides: Sequence[str], first_seed: int, kind: Kind = TOPK
    ) -> list[str]:
        """Commands that add the plan to its sweep with the sweep's own settings.

        Args:
            study: The study that the sweep came from: the commands are `make sweep` lines. Empty: they call
                `python -m harness.launch`.
            overrides: The overrides with which the sweep was launched.
            first_seed: Seed of the first repeat.
            kind: Architecture and number of experts of the cells.
        """
        kept = [text for text in overrides if text.partition("=")[0].lstrip("+~") not in PLANNED_KEYS]
        lines = []
        for key, cells in self.cells.groupby(["k", "seeds"]):
            k, seeds = cast("tuple[float, int]", key)
            widths = ",".join(f"{n:.0f}" for n in cells["n"])
            numbers = ",".join(str(first_seed + i) for i in range(seeds))
            if study:
                variables = {"STUDY": study, "SWEEP": sweep.name, "OUT": str(sweep.parent), "ARCH": kind[0]}
                variables |= {"EXPERTS": str(kind[1])} if kind[1] > 1 else {}
                variables |= {"WIDTH": widths, "K": f"{k:.0f}", "SEEDS": numbers}
                variables |= {"ARGS": shlex.join(kept)} if kept else {}
                # make expands dollars
                line = [f"{name}={shlex.quote(text.replace('$', '$$'))}" for name, text in variables.items()]
                lines.append(" ".join(["make sweep", *line]))
            else:
                cell = [*_overrides_of(kind), f"sae.n_latents={widths}", f"sae.k={k:.0f}", f"train.seed={numbers}"]
                cell.append("stream.seed=${train.seed}")
                where = [f"sweep={sweep.name}", f"out={sweep.parent}"]
                lines.append(shlex.join(["python", "-m", "harness.launch", *kept, *cell, *where]))
        return lines

    def study(self, name: str, first_seed: int, overrides: Sequence[str] = (), kind: Kind = TOPK) -> str:
        """A study file (YAML) that runs the plan with `python -m harness.launch --study`."""
        lines = (
            []
            if overrides
            else ["# Add the sweep's own settings to `overrides`, e.g. activations=minilm, train=quick."]
        )
        lines += [
            "question: Runs planned to narrow a forecast.",
            f'title: "{name}"',
            "law: sae_nk",
            f"sweep: {name}",
            f"overrides: [{', '.join(overrides)}]",
            "grids:",
        ]
        for _, cell in self.cells.iterrows():
            seeds = ",".join(str(first_seed + i) for i in range(int(cell["seeds"])))
            settings = [*_overrides_of(kind), f"sae.n_latents={cell['n']:.0f}", f"sae.k={cell['k']:.0f}"]
            settings += [f'"train.seed={seeds}"', '"stream.seed=${train.seed}"']
            lines.append(f"  - {{name: n{cell['n']:.0f} k{cell['k']:.0f}, overrides: [{', '.join(settings)}]}}")
        return "\n".join(lines) + "\n"


def _overrides_of(kind: Kind) -> list[str]:
    architecture, experts = kind
    return [f"sae={architecture}", *([f"sae.n_experts={experts}"] if experts > 1 else [])]


def plan(
    result: FitResult,
    target: dict[str, float],
    budget: float,
    cost: Cost,
    n: Sequence[float],
    k: Sequence[float],
    cap: float | None = None,
    most_runs: int = 200,
    truths: Sequence[Array] | None = None,
) -> Plan:
    """Choose further cells (n, k, repeats) for the forecast of an n–k law at `target`, e.g. {"n": 2**20, "k": 64}.

    Args:
        budget: FLOPs to spend in all.
        cost: (n, k) → FLOPs of one run.
        n, k: Candidate sizes; every pair whose cost is within the cap is a candidate.
        cap: Most FLOPs of one run (default: half of the budget).
        most_runs: Most runs of the plan.
        truths: What `plausible_truths(result)` gives, where several plans are made from one fit.

    Raises `UserError` if the law is not one of n and k, the fit failed, the target is too far, or no candidate is
    affordable.
    """
    law = result.law
    if set(law.inputs) != {"n", "k"} or result.status is Status.FAILED or result.problem is None or result.dof < 1:
        raise UserError(f"planning needs a finished fit of a law in n and k with its runs; this one is {law.name}")
    at = float(result.log_value({name: [target[name]] for name in law.inputs})[0])
    if not abs(at) < LARGEST_LOG:
        point = " ".join(f"{name}={target[name]:g}" for name in law.inputs)
        raise UserError(f"the law has no finite value at {point}, too far from the runs; choose a nearer target")
    cap = budget / 2 if cap is None else cap
    pairs = [(a, b) for a in n for b in k if b <= a and cost(a, b) <= min(cap, budget)]
    if not pairs:
        raise UserError(f"no candidate costs at most {min(cap, budget):.3g} FLOPs; raise --budget or allow smaller n")
    grid = {"n": np.array([a for a, _ in pairs], float), "k": np.array([b for _, b in pairs], float)}
    price = np.array([cost(a, b) for a, b in pairs])
    goal = {name: np.array([target[name]], float) for name in law.inputs}
    thetas = _identified(result, [result.theta, *(plausible_truths(result) if truths is None else truths)])
    worlds = [_world(result, theta, grid, goal) for theta in thetas]
    start, jac, g = (np.stack(parts) for parts in zip(*worlds, strict=True))
    noise = result.variance
    plans = [_greedy(start, g, jac, price, noise, budget, most_runs, power) for power in POWERS]
    chosen = min(plans, key=lambda picks: _mean_log_variance(_updated(start, jac, picks, noise), g))
    after = _updated(start, jac, chosen, noise)
    counts = np.bincount(chosen, minlength=len(pairs))
    rows = [
        {"n": pairs[i][0], "k": pairs[i][1], "seeds": int(counts[i]), "flops": float(counts[i] * price[i])}
        for i in np.flatnonzero(counts)
    ]
    return Plan(
        pd.DataFrame(rows, columns=["n", "k", "seeds", "flops"]),
        _band(at, _typical(start, g, thetas[0] is result.theta), result.dof, result.level),
        _band(at, _typical(after, g, thetas[0] is result.theta), result.dof + len(chosen), result.level),
        float(price[chosen].sum()) if len(chosen) else 0.0,
    )


def plausible_truths(result: FitResult) -> list[Array]:
    """Coefficients of refits to data simulated from the fit (its values, its residual noise); none without its data."""
    if result.problem is None:
        return []
    rng, problem = np.random.default_rng(0), result.problem
    fitted = problem.law.log_value(result.theta, problem.phi)
    spread = math.sqrt(result.variance) / problem.root_weight
    thetas = []
    for _ in range(SIMULATIONS):
        simulated = replace(problem, y=fitted + spread * rng.standard_normal(problem.points))
        thetas.append(minimise(simulated, starting_points(simulated, 4, 0), evaluations=200).theta)
    return thetas


def _identified(result: FitResult, thetas: list[Array]) -> list[Array]:
    """The coefficients at which the existing runs determine every coefficient, however badly; all if there are none.

    A fit without a floor makes the forecast look certain, and cannot tell which runs would help.
    """
    assert result.problem is not None
    kept = [theta for theta in thetas if condition(result.problem.jacobian(theta)) < SINGULAR]
    return kept or thetas


def _world(
    result: FitResult, theta: Array, grid: dict[str, Array], target: dict[str, Array]
) -> tuple[Array, Array, Array]:
    """(M⁻¹ of the existing runs, gradients of the candidates, gradient at the target) if `theta` is the truth."""
    return _inverse_information(result, theta), _gradients(result, theta, grid), _gradients(result, theta, target)[0]


def _gradients(result: FitResult, theta: Array, inputs: dict[str, Array]) -> Array:
    logs = {name: np.log(values) - result.means[name] for name, values in inputs.items()}
    return result.law.jacobian(theta, result.law.features(logs))


def _inverse_information(result: FitResult, theta: Array) -> Array:
    assert result.problem is not None
    jac = result.problem.jacobian(theta)
    information = jac.T @ jac / result.variance
    scale = np.sqrt(np.maximum(np.diag(information), RIDGE * np.diag(information).max()))
    scaled = information / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    return np.linalg.inv(scaled) / np.outer(scale, scale)


def _greedy(
    cov: Array, g: Array, jac: Array, price: Array, noise: float, budget: float, most: int, power: float
) -> list[int]:
    """Indices of the chosen candidates, one per run: each lowers the mean log variance most per price^power.

    `cov` (worlds, params, params), `g` (worlds, params), `jac` (worlds, candidates, params).
    """
    remaining, chosen, repeats = budget, [], np.zeros(len(price), dtype=int)
    while len(chosen) < most and (possible := (price <= remaining) & (repeats < MOST_SEEDS)).any():
        reach = jac @ cov
        variance = np.einsum("wp,wpq,wq->w", g, cov, g)[:, None]
        fall = np.einsum("wcp,wp->wc", reach, g) ** 2 / (noise + np.einsum("wcp,wcp->wc", reach, jac))
        share = np.clip(fall / np.maximum(variance, 1e-300), 0.0, 1 - 1e-9)
        worth = -np.log1p(-share).mean(axis=0) / price**power
        pick = int(np.argmax(np.where(possible, worth, -1.0)))
        cov = _updated(cov, jac, [pick], noise)
        remaining -= price[pick]
        repeats[pick] += 1
        chosen.append(pick)
    return chosen


def _updated(cov: Array, jac: Array, picks: Sequence[int], noise: float) -> Array:
    """`cov` of every world after further runs at the candidates `picks`."""
    for pick in picks:
        reach = np.einsum("wpq,wq->wp", cov, jac[:, pick])
        gain = noise + np.einsum("wp,wp->w", reach, jac[:, pick])
        cov = cov - np.einsum("wp,wq->wpq", reach, reach) / gain[:, None, None]
    return cov


def _mean_log_variance(cov: Array, g: Array) -> float:
    return float(np.log(np.maximum(np.einsum("wp,wpq,wq->w", g, cov, g), 1e-300)).mean())


def _typical(cov: Array, g: Array, estimate_first: bool) -> float:
    """Variance at the target: that of the estimate, or the median over the refits if the estimate was dropped."""
    variance = np.einsum("wp,wpq,wq->w", g, cov, g)
    return float(variance[0] if estimate_first else np.median(variance))


def _band(at: float, variance: float, dof: int, level: float) -> tuple[float, float, float]:
    half = critical_t(dof, level) * (math.sqrt(variance) if variance > 0 else math.nan)
    return math.exp(at), math.exp(max(at - half, -LARGEST_LOG)), math.exp(min(at + half, LARGEST_LOG))
