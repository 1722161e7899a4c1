"""`fit`: fits a law to a table of runs, by least squares on ln(loss) from many starts.

docs/analysis.md describes the method and its evidence. In short: the logs are centred; starts come from variable
projection and from a random generator; intervals are profile-F; repeated cells give weights; every doubt is a note.
"""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np

from analysis.fits.bootstrap import cluster_bootstrap, percentile_intervals
from analysis.fits.checks import check_fit
from analysis.fits.design import check_table
from analysis.fits.influence import Edge, doubtful_edge, influence_notes, influences
from analysis.fits.intervals import covariance, noiseless, profile, wald
from analysis.fits.nested import compare_nested
from analysis.fits.problem import Problem, pose, starting_points
from analysis.fits.record import record_notes
from analysis.fits.result import FitResult, failed
from analysis.fits.run_effects import with_run_effects
from analysis.fits.solve import MANY, SAMPLE, Optimum, minimise, minimise_many
from analysis.fits.status import Status, status_of
from analysis.fits.weights import SeedNoise, seed_noise
from analysis.laws.catalogue import get
from analysis.laws.law import Array, Law
from analysis.notes import any_error, by_severity, has, note
from analysis.runs.cells import cell_numbers
from analysis.runs.curves import curve_points
from analysis.runs.identical import without_identical
from analysis.runs.populations import at_best_rate, one_architecture, one_setting
from analysis.runs.regime import REGIMES, one_regime, regime_words
from analysis.runs.table import RunTable
from harness.errors import UserError

SIGNIFICANT_SLOPE = 0.1
"""`weights="auto"` weights only if the noise depends on scale with this p-value. With few repeats the slope of the
noise is itself noise, and weighting by it would do harm."""

EDGE = "does not belong to the fit of the others"
"""How the reason ends for which rows at an edge are left out."""

MISFIT = ("structured_residuals", "large_residuals")
"""Notes by which rows do not follow a law: then others that do not follow it either are not to blame."""


def fit(
    table: RunTable,
    law: str | Law = "sae_nk",
    *,
    robust: str | None = None,
    delta: float = 1e-3,
    weights: str = "auto",
    ci: str = "profile",
    level: float = 0.95,
    starts: int = 64,
    seed: int = 0,
    regime: str = "auto",
    edges: str = "leave_out",
    evaluations: int = 2000,
    resamples: int = 1000,
) -> FitResult:
    """Fit a law to the usable runs of a table.

    Args:
        law: A name of `analysis.laws.catalogue.LAWS`, or a `Law`.
        robust: None, or `huber` with `delta` in units of ln(loss).
        weights: `auto` weights by the variance between seeds if repeats at three or more scales show that it depends
            on scale; `seeds` drops that condition; `none`.
        ci: `profile` (F), `wald`, or `bootstrap` (resampling whole runs). With `huber`, `profile` means `bootstrap`.
        level: Confidence level of every interval.
        starts: Starts of the optimiser; `seed` fixes the random ones.
        regime: Runs at convergence and runs at fixed tokens follow different laws in n: `converged`, `fixed`, `all`, or
            `auto` (the converged runs if they suffice). A law in tokens or FLOPs takes all runs.
        edges: What becomes of the rows at the smallest or largest value of an input if they do not belong to the fit of
            the others: `leave_out`, unless the others do not follow the law either, or `keep`. Both give the note
            `edge_rows`.
        evaluations: Most evaluations of the residuals per start.
        resamples: Bootstrap resamples.

    Returns a `FitResult`. If no fit is possible, its status is `failed` and its notes say why. Raises `UserError` for a
    wrong request: an unknown option, a role without a column, a regime without runs.
    """
    chosen = get(law) if isinstance(law, str) else law
    _check_request(robust, delta, weights, ci, level, starts, seed, regime, edges)
    table = one_architecture(table.use(*chosen.inputs, "loss"), chosen)
    if not follows_tokens(chosen, table):
        table = one_regime(table, regime, lambda part: not any_error(check_table(part, chosen)))
    table = at_best_rate(one_setting(table))
    for role in (*chosen.inputs, "loss"):
        table.column(role)
    table = without_identical(table, chosen.inputs)
    if {"n", "k", "d"} <= set(chosen.inputs):
        table = curve_points(table)
    fit_rows = partial(
        _fit_rows,
        law=chosen,
        huber=delta if robust == "huber" else None,
        weights=weights,
        ci="bootstrap" if robust == "huber" and ci == "profile" else ci,
        level=level,
        starts=starts,
        seed=seed,
        evaluations=evaluations,
        resamples=resamples,
    )
    result, edge = fit_rows(table)
    if edge is None:
        return result
    others, further = result, edge
    whole_runs = edge.input != "d" or not table.column("run").duplicated().any()
    if edges == "leave_out" and whole_runs:
        assert result.problem is not None
        belongs = np.ones(len(table), dtype=bool)
        belongs[result.problem.order[edge.points]] = False
        reason = f"{edge.input} = {edge.value:g} {EDGE}"
        others, further = fit_rows(table.keep(belongs, reason))
    if further is None and not (others.status is Status.FAILED or any(has(others.notes, c) for c in MISFIT)):
        text = f"{edge.text}; they are left out. The fit to all has {edge.with_them}"
        result = others
    else:
        text = f"{edge.text}; they stay in the fit. Without them it has {edge.without}"
    result.notes = by_severity([*result.notes, note("edge_rows", "error", text)])
    result.status = status_of(result.notes, result.intervals.values())
    return result


def _fit_rows(
    table: RunTable,
    law: Law,
    huber: float | None,
    weights: str,
    ci: str,
    level: float,
    starts: int,
    seed: int,
    evaluations: int,
    resamples: int,
) -> tuple[FitResult, Edge | None]:
    """The fit to the rows of a table, all of them, and the rows at an edge that do not belong; see `fit`."""
    notes = check_table(table, law)
    if any_error(notes):
        return failed(law, notes, len(table), table.left_out()), None
    notes += record_notes(table, law)
    inputs = {role: table.values(role) for role in law.inputs}
    y = table.values("loss")
    of_curves = table.column("run").duplicated().any()
    sizes = [values for role, values in inputs.items() if role != "d" or not of_curves]
    cell = cell_numbers([*sizes, *_apart(table, law)])
    noise = None if of_curves else seed_noise(inputs, y, law.scale_input, cell)
    weight, weighting = _weights(noise, inputs[law.scale_input], weights)
    problem = pose(law, inputs, y, weight)
    cell = cell[problem.order]
    runs = [str(run) for run in table.column("run").to_numpy()[problem.order]]
    if problem.points > MANY:
        sample = problem.take(np.linspace(0, problem.points - 1, SAMPLE).astype(int))
        optimum = minimise_many(problem, starting_points(sample, starts, seed), seed, huber, evaluations)
        ci = "wald" if ci == "profile" else ci  # with so many points a profile is a parabola
    else:
        optimum = minimise(problem, starting_points(problem, starts, seed), huber, evaluations)
    if not np.isfinite(optimum.objective):
        raise UserError(f"{law.name} cannot be evaluated on these data; look at their units")
    common = 0.0
    if of_curves and huber is None:
        problem, optimum, common = with_run_effects(problem, optimum, np.array(runs), evaluations)
    result = _assemble(law, problem, optimum, ci, level, runs, huber, resamples, seed)
    notes += check_fit(problem, optimum, result.intervals, noise, runs, cell)
    edge = None
    if huber is None and problem.points <= MANY and result.dof > 0:
        result.influences = influences(problem, optimum.theta, cell, level)
        notes += influence_notes(result.influences, law.scale_input, noiseless(result.rss, problem.points))
        edge = doubtful_edge(problem, optimum.theta, cell)
    result.notes = by_severity(notes)
    result.status = status_of(result.notes, result.intervals.values())
    result.run_variance = common
    result.regime = "" if follows_tokens(law, table) else regime_words(table)
    result.robust = f"huber, delta={huber:g}" if huber is not None else None
    result.columns = {role: table.roles[role] for role in (*law.inputs, "loss")}
    result.domain = {role: (float(values.min()), float(values.max())) for role, values in inputs.items()}
    result.weighting = weighting
    result.inputs, result.y, result.weights = inputs, y, weight
    result.excluded = table.left_out()
    result.data_hash = _hash(problem)
    if law.nested and huber is None and not of_curves and problem.points <= MANY:
        result.nested = compare_nested(law, problem, inputs, y, weight, optimum)
    return result, edge


def _apart(table: RunTable, law: Law) -> list[Array]:
    """What tells cells apart besides the inputs of the law: runs that differ in it are not repeats."""
    apart = "experts" not in law.inputs and table.has("experts") and "experts" not in table.guessed
    return [table.values("experts")] if apart else []


def follows_tokens(law: Law, table: RunTable) -> bool:
    """Whether the law is one in tokens or FLOPs, to which runs of any length belong."""
    return "d" in law.inputs or ("x" in law.inputs and table.roles.get("x") in table.spent)


def _check_request(
    robust: str | None,
    delta: float,
    weights: str,
    ci: str,
    level: float,
    starts: int,
    seed: int,
    regime: str,
    edges: str,
) -> None:
    for name, value, allowed in (
        ("robust", robust, (None, "huber")),
        ("weights", weights, ("auto", "seeds", "none")),
        ("ci", ci, ("profile", "wald", "bootstrap")),
        ("regime", regime, REGIMES),
        ("edges", edges, ("leave_out", "keep")),
    ):
        if value not in allowed:
            raise UserError(f"{name}={value!r} is not known; choose one of: {', '.join(map(str, allowed))}")
    if not 0 < delta < np.inf:
        raise UserError(f"delta={delta:g} of the Huber loss must be positive and finite")
    if not 0.5 <= level < 1:
        raise UserError(f"level={level} must lie between 0.5 and 1")
    if starts < 1:
        raise UserError(f"starts={starts} must be at least 1")
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative")


def _weights(noise: SeedNoise | None, x: Array, how: str) -> tuple[Array | None, dict[str, float]]:
    if how == "none" or noise is None or noise.scales < 3 or noise.pure_error <= 0:
        return None, {}
    if how == "auto" and noise.p_constant > SIGNIFICANT_SLOPE:
        return None, {}
    weight = noise.weights(np.log(x))
    return weight, {"slope": noise.slope, "centre": noise.centre, "mean": float(weight.mean())}


def _assemble(
    law: Law,
    problem: Problem,
    optimum: Optimum,
    ci: str,
    level: float,
    runs: list[str],
    huber: float | None,
    resamples: int,
    seed: int,
) -> FitResult:
    theta = optimum.theta
    residual = problem.residual(theta)
    rss, dof, spare = float(np.sum(residual**2)), problem.dof, problem.points - problem.size
    variance = rss / spare if spare > 0 else float("nan")
    theta_cov = covariance(problem, theta, variance)
    matrix, offset = problem.raw_map()
    if ci == "bootstrap":
        draws = cluster_bootstrap(problem, theta, np.array(runs), resamples, seed, huber)
        theta_cov = np.cov(draws.T).reshape(problem.size, problem.size)
        ends = percentile_intervals(draws @ matrix.T, level)
    else:
        ends = []
        for row in matrix:
            with np.errstate(invalid="ignore"):
                se = float(np.sqrt(row @ theta_cov @ row))
            if dof < 1:
                ends.append((None, None))
            elif ci == "wald":
                ends.append(wald(float(row @ theta), se, dof, level))
            else:
                ends.append(profile(problem, theta, rss, row, se, level))
    intervals = {}
    for name, shift, (low, high) in zip(law.params, offset, ends, strict=True):
        intervals[name] = tuple(
            None if end is None else float(np.exp(end + shift)) if name in law.exp_params else float(end + shift)
            for end in (low, high)
        )
    return FitResult(
        law=law,
        theta=theta,
        means=problem.means,
        y_mean=problem.y_mean,
        theta_cov=theta_cov,
        intervals=intervals,
        rss=rss,
        dof=dof,
        points=problem.points,
        notes=[],
        status=Status.OK,
        level=level,
        ci=ci,
        reached=optimum.reached,
        starts=optimum.starts,
        problem=problem,
        runs=runs,
    )


def _hash(problem: Problem) -> str:
    """sha256 of the law's name and of the numbers that were fitted, in canonical order."""
    digest = hashlib.sha256(problem.law.name.encode())
    for part in (problem.phi, problem.y, problem.root_weight):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
