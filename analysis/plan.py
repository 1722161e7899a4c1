"""What to run next: the cells that narrow a forecast most per FLOP, and what is needed to reach a loss.

The planner is c-optimal design by greedy choice: with the Fisher information M = JᵀWJ/s² of the runs at hand, the
forecast at the target has variance gᵀM⁻¹g (g the gradient of ln(loss) there). A further run with gradient j and noise
s² lowers it by (gᵀM⁻¹j)² / (s² + jᵀM⁻¹j); the cell with the largest fall per FLOP is added until the budget is spent.

Both g and M depend on the coefficients, which the runs at hand know badly: a design that is best for the estimate alone
can be poor for the truth (worst when the estimate has lost its floor). So the fall is that of the mean log variance
over refits to data simulated from the fit: c-optimality averaged over what the coefficients may be.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.frames import Frame, pd
from analysis.intervals import condition, critical_t
from analysis.law import Array
from analysis.problem import starting_points
from analysis.result import FitResult, Status
from analysis.solve import minimise
from analysis.table import RunTable
from harness.errors import UserError

Cost = Callable[[float, float], float]
"""(n, k) → training FLOPs of one run."""

RIDGE = 1e-10
"""Relative to the largest information: keeps directions that the data do not determine finite."""

SIMULATIONS = 24
"""Refits to simulated data over which a plan is judged, beside the fit itself."""

SINGULAR = 1e4
"""Condition number of the scaled Jacobian above which a refit has lost a coefficient."""

POWERS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Greedy choice by fall per price^power; the best of the resulting plans is taken."""


LARGEST_LOG = 700.0
"""Of a number that double precision holds."""

PLANNED_KEYS = {
    *("sae", "sae.architecture", "sae.n_latents", "sae.k", "sae.n_experts", "train.seed", "sweep", "out"),
}
"""Overrides of a sweep that a plan replaces by its own."""


@dataclass
class Plan:
    """Cells to run and what they are worth."""

    cells: Frame
    """n, k, seeds (how many repeats), flops (of all of them)."""
    before: tuple[float, float, float]
    """(value, lo, hi) of the forecast now; lo and hi from refits where the estimate has lost a coefficient."""
    after: tuple[float, float, float]
    """The same with the planned runs, were they to confirm the law."""
    flops: float

    def commands(self, sweep: Path, study: str, overrides: Sequence[str], first_seed: int) -> list[str]:
        """Commands that run the plan into the sweep that it came from, with its settings: `make sweep` for one that
        came from a study, else `python -m harness.launch`. `overrides` are those that the sweep was asked for with."""
        kept = [text for text in overrides if text.partition("=")[0].lstrip("+~") not in PLANNED_KEYS]
        lines = []
        for (k, seeds), cells in self.cells.groupby(["k", "seeds"]):
            widths = ",".join(f"{n:.0f}" for n in cells["n"])
            numbers = ",".join(str(first_seed + i) for i in range(int(seeds)))
            if study:
                words = {"STUDY": study, "SWEEP": sweep.name, "OUT": str(sweep.parent), "ARCH": "topk"}
                words |= {"WIDTH": widths, "K": f"{k:.0f}", "SEEDS": numbers}
                words |= {"ARGS": shlex.join(kept)} if kept else {}
                # make expands dollars
                line = [f"{name}={shlex.quote(text.replace('$', '$$'))}" for name, text in words.items()]
                lines.append(" ".join(["make sweep", *line]))
            else:
                cell = ["sae=topk", f"sae.n_latents={widths}", f"sae.k={k:.0f}", f"train.seed={numbers}"]
                where = [f"sweep={sweep.name}", f"out={sweep.parent}"]
                lines.append(shlex.join(["python", "-m", "harness.launch", *kept, *cell, *where]))
        return lines

    def study(self, name: str, first_seed: int, overrides: Sequence[str] = ()) -> str:
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
            settings = f'sae=topk, sae.n_latents={cell["n"]:.0f}, sae.k={cell["k"]:.0f}, "train.seed={seeds}"'
            lines.append(f"  - {{name: n{cell['n']:.0f} k{cell['k']:.0f}, overrides: [{settings}]}}")
        return "\n".join(lines) + "\n"


def plan(
    result: FitResult,
    target: dict[str, float],
    budget: float,
    cost: Cost,
    n: Sequence[float],
    k: Sequence[float],
    cap: float | None = None,
    most_runs: int = 200,
) -> Plan:
    """Choose further cells (n, k, repeats) for the forecast of an n–k law at `target`, e.g. {"n": 2**20, "k": 64}.

    Args:
        budget: FLOPs to spend in all. `cap`: most FLOPs of a single run (default: half of the budget).
        n, k: Candidate sizes; every pair whose cost is within the cap is a candidate.

    Raises `UserError` when the law is not one of n and k, the fit failed, or nothing is affordable.
    """
    law = result.law
    if set(law.inputs) != {"n", "k"} or result.status is Status.FAILED or result.problem is None or result.dof < 1:
        raise UserError(f"planning needs a finished fit of a law in n and k with its runs; this one is {law.name}")
    if result.space != "log":
        raise UserError("planning counts relative errors: fit with space='log'")
    at = float(result.log_value({name: [target[name]] for name in law.inputs})[0])
    if not abs(at) < LARGEST_LOG:
        said = " ".join(f"{name}={target[name]:g}" for name in law.inputs)
        raise UserError(f"the law has no finite value at {said}, too far from the runs; choose a nearer target")
    cap = budget / 2 if cap is None else cap
    pairs = [(a, b) for a in n for b in k if b <= a and cost(a, b) <= min(cap, budget)]
    if not pairs:
        raise UserError(f"no candidate costs at most {min(cap, budget):.3g} FLOPs; raise --budget or allow smaller n")
    grid = {"n": np.array([a for a, _ in pairs], float), "k": np.array([b for _, b in pairs], float)}
    price = np.array([cost(a, b) for a, b in pairs])
    spot = {name: np.array([target[name]], float) for name in law.inputs}
    thetas = _identified(result, [result.theta, *_plausible(result)])
    worlds = [_world(result, theta, grid, spot) for theta in thetas]
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


def _plausible(result: FitResult) -> list[Array]:
    """Coefficients of refits to data simulated from the fit (its values, its residual noise)."""
    assert result.problem is not None
    rng, problem = np.random.default_rng(0), result.problem
    fitted = problem.law.log_value(result.theta, problem.phi)
    spread = math.sqrt(result.variance) / problem.root_weight
    thetas = []
    for _ in range(SIMULATIONS):
        simulated = replace(problem, y=fitted + spread * rng.standard_normal(problem.points))
        thetas.append(minimise(simulated, starting_points(simulated, 4, 0), evaluations=200).theta)
    return thetas


def _identified(result: FitResult, thetas: list[Array]) -> list[Array]:
    """Those at which the runs at hand determine every coefficient, however badly; all when there are none such.

    Where the floor has vanished the forecast looks certain for want of a floor, and says nothing of which runs help.
    """
    assert result.problem is not None
    kept = [theta for theta in thetas if condition(result.problem.jacobian(theta)) < SINGULAR]
    return kept or thetas


def _world(
    result: FitResult, theta: Array, grid: dict[str, Array], target: dict[str, Array]
) -> tuple[Array, Array, Array]:
    """(M⁻¹ of the runs at hand, gradients of the candidates, gradient at the target), were `theta` the truth."""
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
    """Indices of the chosen candidates, one entry a run: the largest fall of the mean log variance per price^power.

    `cov` (worlds, params, params), `g` (worlds, params), `jac` (worlds, candidates, params).
    """
    left, chosen = budget, []
    while len(chosen) < most and (price <= left).any():
        reach = jac @ cov
        variance = np.einsum("wp,wpq,wq->w", g, cov, g)[:, None]
        fall = np.einsum("wcp,wp->wc", reach, g) ** 2 / (noise + np.einsum("wcp,wcp->wc", reach, jac))
        share = np.clip(fall / np.maximum(variance, 1e-300), 0.0, 1 - 1e-9)
        worth = -np.log1p(-share).mean(axis=0) / price**power
        pick = int(np.argmax(np.where(price <= left, worth, -1.0)))
        cov = _updated(cov, jac, [pick], noise)
        left -= price[pick]
        chosen.append(pick)
    return chosen


def _updated(cov: Array, jac: Array, picks: Sequence[int], noise: float) -> Array:
    """`cov` of every world after further runs at the picked candidates."""
    for pick in picks:
        reach = np.einsum("wpq,wq->wp", cov, jac[:, pick])
        gain = noise + np.einsum("wp,wp->w", reach, jac[:, pick])
        cov = cov - np.einsum("wp,wq->wpq", reach, reach) / gain[:, None, None]
    return cov


def _mean_log_variance(cov: Array, g: Array) -> float:
    return float(np.log(np.maximum(np.einsum("wp,wpq,wq->w", g, cov, g), 1e-300)).mean())


def _typical(cov: Array, g: Array, estimate_first: bool) -> float:
    """Variance at the target: that of the estimate, or the median over refits where the estimate says nothing."""
    variance = np.einsum("wp,wpq,wq->w", g, cov, g)
    return float(variance[0] if estimate_first else np.median(variance))


def _band(at: float, variance: float, dof: int, level: float) -> tuple[float, float, float]:
    half = critical_t(dof, level) * (math.sqrt(variance) if variance > 0 else math.nan)
    return math.exp(at), math.exp(max(at - half, -LARGEST_LOG)), math.exp(min(at + half, LARGEST_LOG))


def cost_of(table: RunTable) -> Cost:
    """FLOPs of a run like those of the table: `harness.budget` where its settings are recorded, else a fit of them.

    Tokens per run are the median of the table's.
    """
    frame = table.frame
    if {"d_model", "train.batch_tokens", "tokens"} <= set(frame) and frame["d_model"].notna().all():
        from harness.budget import flops_per_token
        from harness.config import SaeConfig

        d_model, batch = int(frame["d_model"].median()), int(frame["train.batch_tokens"].median())
        tokens = float(frame["tokens"].median())

        def exact(n: float, k: float) -> float:
            sae = SaeConfig(architecture="topk", n_latents=round(n), k=round(k))
            return tokens * sum(flops_per_token(sae, d_model, batch).values())

        return exact
    if not table.has("flops"):
        raise UserError(f"{table.name}: costs are unknown; name the column of training FLOPs with --flops")
    design = np.stack([np.ones(len(table)), np.log(table.values("n")), np.log(table.values("k"))], axis=1)
    c = np.linalg.lstsq(design, np.log(table.values("flops")), rcond=None)[0]
    return lambda n, k: float(np.exp(c[0] + c[1] * np.log(n) + c[2] * np.log(k)))


@dataclass
class Need:
    """The smallest n (and FLOPs) predicted to reach a loss; None where it cannot be reached or bounded."""

    n: float | None
    lo: float | None
    hi: float | None
    flops: float | None
    floor: float
    extrapolation: float
    """How far n lies outside the data, in their span of ln n."""


def need(result: FitResult, loss: float, k: float | None = None, cost: Cost | None = None) -> Need:
    """Smallest n at which the law reaches `loss` (at k, for a law in n and k), with the band's own crossings."""
    name = result.law.scale_input
    others = {} if k is None else {"k": k}
    if set(result.law.inputs) != {name, *others}:
        raise UserError(f"{result.law.name} needs {', '.join(result.law.inputs)}; give the others (e.g. --at-k 64)")
    if not 0 < loss < math.inf:
        raise UserError(f"loss {loss} must be positive and finite")
    low, high = result.domain[name]
    sizes = np.geomspace(low / 1e3, high * 1e9, 4000)
    band = result.predict({name: sizes, **{other: np.full(len(sizes), value) for other, value in others.items()}})
    floor = float(result.floor({name: [high], **{other: [value] for other, value in others.items()}})[0])
    n = _first_below(sizes, band["value"].to_numpy(), loss)
    flops = None if n is None or cost is None or k is None else cost(n, k)
    best, worst = (_first_below(sizes, band[edge].to_numpy(), loss) for edge in ("lo", "hi"))
    far = 0.0 if n is None else float(result.extrapolation({name: [n], **{o: [v] for o, v in others.items()}})[0])
    return Need(n, best, worst, flops, floor, far)


def _first_below(x: Array, y: Array, level: float) -> float | None:
    """Smallest x from which on y ≤ level holds next, interpolated in logs; None when it never does."""
    below = np.flatnonzero(y <= level)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or not np.isfinite(y[i - 1]):
        return float(x[i])
    share = (math.log(y[i - 1]) - math.log(level)) / max(math.log(y[i - 1]) - math.log(y[i]), 1e-300)
    return float(np.exp(math.log(x[i - 1]) + share * (math.log(x[i]) - math.log(x[i - 1]))))
