"""`python -m sweeps --until "forecast n=2**17 k=64 within 3%" --budget 1e17`: a sweep that chooses its own next cells.

It trains the study's grid, fits the law, lets the planner choose further cells, trains them, and fits again, until the
goal is reached, is seen to be out of reach, or the budget does not pay for it. Every round is recorded in `rounds.json`
before it trains. On Slurm no process waits: each round ends with a small job that depends on its arrays and decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.format import interval, number
from analysis.questions.cost import cost_of
from analysis.questions.reach import check_point, parse_point
from analysis.questions.rounds import Decision, Goal, Verdict, decide, half_width
from analysis.runs.load import load
from analysis.runs.table import RunTable
from harness.errors import FAILED, UserError
from harness.grid.cells import Grid, make_cells
from harness.grid.study import override_key, study_grids
from harness.process.claim import Claimed, claim
from harness.record.provenance import now
from harness.record.result import FINAL
from harness.record.run import Run
from harness.record.state import state_of
from harness.record.sweepdir import read_rounds, write_rounds
from harness.sweep.execute import Outcome, carry_out
from harness.sweep.request import Request, plan_runs, requested_cells
from harness.terminal import say

CHOSEN = ("sae.n_latents", "sae.k", "train.seed", "stream.seed")
"""Settings that the planner chooses; all others stay those of the study."""


@dataclass(frozen=True)
class Chase:
    """What is chased, and in which sweep."""

    request: Request
    goal: Goal
    budget: float
    """FLOPs of all runs of the sweep."""
    architecture: str
    sweep_dir: Path
    law: str
    goes_on: tuple[str, ...]
    """What a job of the chase gives to `python -m`, to decide and go on."""


def parse_goal(text: str) -> Goal:
    """ "forecast n=2**17 k=64 within 3%". Raises `UserError`."""
    match = re.fullmatch(r"\s*forecast\s+(.+?)\s+within\s+([\d.]+)\s*%\s*", text)
    if match is None:
        raise UserError(f"--until {text!r} (UNTIL) is not of the form 'forecast n=2**17 k=64 within 3%'")
    point, percent = parse_point(match[1]), _positive(match[2], "the percentage of --until (UNTIL)")
    if set(point) != {"n", "k"}:
        raise UserError(f"--until {text!r} (UNTIL) must name n and k, e.g. 'forecast n=2**17 k=64 within 3%'")
    if percent >= 100:
        raise UserError(f"within {percent:g}% is no forecast; choose less than 100 %")
    return Goal(point["n"], point["k"], percent / 100)


def parse_budget(text: str) -> float:
    """FLOPs. Raises `UserError`."""
    return _positive(text, "--budget (BUDGET), the FLOPs of the whole sweep,")


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"{what} must be a positive number, not {text!r}; e.g. 1e17")
    return value


def chase(
    request: Request, goal: Goal, budget: float, *, dry_run: bool, continued: bool, again: str, goes_on: Sequence[str]
) -> Outcome:
    """Train round after round. On a cluster the outcome is `submitted` while rounds are outstanding.

    Args:
        continued: Whether a job of the chase calls, and not a person: cells that failed are not tried again.
        again: What to type to go on after a stop.
        goes_on: What a job of the chase gives to `python -m`, to decide and go on.

    Raises `UserError` for a wrong request.
    """
    runs = plan_runs(requested_cells(request), dry_run=dry_run)
    subject = _subject(request, runs, goal, budget, goes_on)
    if dry_run:
        say(f"the first grid; then rounds of further cells until {goal}, at most {number(budget)} FLOPs in all")
        return carry_out(runs, request.about(), dry_run=True, wait=False)
    subject.sweep_dir.mkdir(parents=True, exist_ok=True)
    try:
        with claim(subject.sweep_dir / "rounds.lock"):
            return _rounds(subject, runs, continued, again)
    except Claimed as held:
        raise UserError(f"another process chases a forecast in this sweep: {held}; wait for it or stop it") from None


def _subject(request: Request, runs: Sequence[Run], goal: Goal, budget: float, goes_on: Sequence[str]) -> Chase:
    assert request.study is not None
    sweep_dirs = {run.sweep_dir for run in runs}
    architectures = sorted({run.config.sae.architecture for run in runs})
    if len(sweep_dirs) > 1 or len(architectures) > 1:
        several = ", ".join(architectures if len(architectures) > 1 else map(str, sorted(sweep_dirs)))
        raise UserError(
            f"a forecast is of one architecture in one sweep, not of {several}; choose one (ARCH=…, SWEEP=…)"
        )
    first = sum(run.flops or 0.0 for run in runs)
    if first > budget:
        raise UserError(
            f"the first grid takes {number(first)} FLOPs, more than --budget (BUDGET) {number(budget)}; raise it, or "
            "begin with fewer cells (WIDTH=…, K=…)"
        )
    return Chase(request, goal, budget, architectures[0], sweep_dirs.pop(), request.study.law, tuple(goes_on))


def _rounds(subject: Chase, first: list[Run], continued: bool, again: str) -> Outcome:
    record = read_rounds(subject.sweep_dir)
    record |= {"goal": str(subject.goal), "budget": subject.budget, "end": None}
    runs, usable = [*first], False
    for entry in record["rounds"]:
        runs += [] if entry["ended"] else _named(subject, entry["runs"])
    while True:
        outcome = _train(subject, runs, continued, again)
        if outcome.submitted or outcome.exit_code not in (0, FAILED):
            return outcome
        continued = False
        table = _table(subject)
        _take_down(record, table, subject.sweep_dir)
        spent = float(np.nansum(table.values("flops"))) if table.has("flops") else 0.0
        result = fit(table, subject.law)
        if record["rounds"] and all(run["came"] is None for run in record["rounds"][-1]["runs"]):
            reason = f"none of the runs of round {len(record['rounds'])} gave a result; harness.status tells why"
            decision = Decision(Verdict.UNSUPPORTED, reason)
        else:
            decision = _decide(subject, table, result, spent, patient=usable)
        usable = result.status.usable
        number_of_round = len(record["rounds"]) + 1
        if decision.verdict is not Verdict.TRAIN:
            return _end(subject, record, decision, result, spent)
        entry = _entry(subject, decision, result, table, spent)
        record["rounds"].append(entry)
        runs = _named(subject, entry["runs"])
        write_rounds(subject.sweep_dir, record)
        say(
            f"round {number_of_round}: {_forecast_words(decision)} after {number(spent)} of {number(subject.budget)} "
            f"FLOPs; {len(runs)} further runs are predicted to give ± {number(100 * (decision.expected or 0.0))} %"
        )


def _train(subject: Chase, runs: list[Run], continued: bool, again: str) -> Outcome:
    """Train what has not ended. A job of the chase leaves alone what has failed."""
    states = {run.run_dir: state_of(run.run_dir).status for run in runs}
    left = [run for run in runs if states[run.run_dir] not in (*FINAL, *(("failed",) if continued else ()))]
    if not left:
        return Outcome(0, (subject.sweep_dir,))
    left = [replace(run, status=states[run.run_dir]) for run in left]
    outcome = carry_out(left, subject.request.about(), dry_run=False, wait=False, command=again)
    if outcome.submitted:
        from harness.places.slurm.submit import submit_decision

        submit_decision(subject.sweep_dir, left[0].config, subject.goes_on)
    return outcome


def _table(subject: Chase) -> RunTable:
    """The finished runs of the architecture."""
    table = load(subject.sweep_dir)
    return table.where(f"not {subject.architecture}", sae=subject.architecture)


def _decide(subject: Chase, table: RunTable, result: FitResult, spent: float, *, patient: bool) -> Decision:
    goal = subject.goal
    sizes = table.values("n")
    if not len(sizes):
        return Decision(Verdict.UNSUPPORTED, "no run of the first grid is done")
    check_point(result, table, goal.point)
    low, high = np.floor(np.log2(sizes.min())), np.floor(np.log2(max(goal.n, sizes.max())))
    n = list(2.0 ** np.arange(low, high + 1))
    k = [float(value) for value in np.unique(np.r_[table.values("k"), goal.k])]
    return decide(result, goal, cost_of(table), spent, subject.budget, n, k, patient)


def _entry(subject: Chase, decision: Decision, result: FitResult, table: RunTable, spent: float) -> dict[str, Any]:
    """A round as `read_rounds` returns it; the names of its runs are not known yet."""
    assert decision.cells is not None and decision.forecast is not None
    n, k = table.values("n"), table.values("k")
    seeds = table.values("seed") if table.has("seed") else np.zeros(len(n))
    runs = []
    for size, active, repeats in decision.cells[["n", "k", "seeds"]].to_numpy(dtype=int).tolist():
        taken = {int(seed) for seed in seeds[(n == size) & (k == active)] if np.isfinite(seed)}
        free = [seed for seed in range(len(taken) + repeats) if seed not in taken][:repeats]
        band = result.predict({"n": np.array([size]), "k": np.array([active])}, "new_run").iloc[0]
        predicted = _band((float(band["value"]), float(band["lo"]), float(band["hi"])))
        runs += [{"n": size, "k": active, "seed": seed, "predicted": predicted, "came": None} for seed in free]
    return {
        "time": now(),
        "goal": str(subject.goal),
        "spent": spent,
        "forecast": _band(decision.forecast),
        "expected": decision.expected,
        "runs": runs,
        "ended": False,
    }


def _band(values: tuple[float, float, float]) -> dict[str, float | None]:
    return {
        name: value if np.isfinite(value) else None for name, value in zip(("value", "lo", "hi"), values, strict=True)
    }


def _named(subject: Chase, planned: Sequence[dict[str, Any]]) -> list[Run]:
    """The runs of a round, with the study's own settings; the record gets their names."""
    request = subject.request
    assert request.study is not None
    kept = [text for text in request.overrides if override_key(text) not in CHOSEN]
    base = _grid_of(subject)
    grids = tuple(
        Grid((*base.overrides, f"sae.n_latents={run['n']}", f"sae.k={run['k']}", *_seeds(run["seed"])), base.only)
        for run in planned
    )
    cells = requested_cells(Request(kept, replace(request.study, grids=grids), request.only))
    made = {_cell(run): run for run in plan_runs(cells, dry_run=False)}
    runs = [made[entry["n"], entry["k"], entry["seed"]] for entry in planned]
    for entry, run in zip(planned, runs, strict=True):
        entry["run"] = run.run_id
    return runs


def _seeds(seed: int) -> tuple[str, str]:
    return f"train.seed={seed}", f"stream.seed={seed}"


def _cell(run: Run) -> tuple[int, int, int]:
    return run.config.sae.n_latents, run.config.sae.k, run.config.train.seed


def _grid_of(subject: Chase) -> Grid:
    """The study's first grid that has cells of the architecture, without the values that the planner chooses."""
    request = subject.request
    assert request.study is not None
    for grid in study_grids(request.study, request.overrides):
        try:
            cells = make_cells([grid], request.only)
        except UserError:
            continue  # it has no cell of the architecture
        if cells[0].config.sae.architecture == subject.architecture:
            kept = [text for text in grid.overrides if override_key(text) not in CHOSEN]
            only = {key: values for key, values in grid.only.items() if key not in CHOSEN}
            return Grid(tuple(kept), only)
    raise AssertionError("the runs come from one of the grids")


def _take_down(record: dict[str, Any], table: RunTable, sweep_dir: Path) -> None:
    """Write into the last round what came of its runs, and say how many were as predicted."""
    if not record["rounds"] or record["rounds"][-1]["ended"]:
        return
    losses = dict(zip(map(str, table.column("run")), table.values("loss"), strict=True))
    entry = record["rounds"][-1]
    inside = ended = 0
    for run in entry["runs"]:
        came = losses.get(run["run"], np.nan)
        if not np.isfinite(came):
            continue
        run["came"], ended = float(came), ended + 1
        low, high = run["predicted"]["lo"], run["predicted"]["hi"]
        inside += (low is None or low <= came) and (high is None or came <= high)
    entry["ended"] = True
    write_rounds(sweep_dir, record)
    say(f"round {len(record['rounds'])}: {inside} of {ended} runs came inside their predicted intervals")
    if ended < len(entry["runs"]):
        say(f"{len(entry['runs']) - ended} of its runs gave no result; the next round goes on without them")


def _end(subject: Chase, record: dict[str, Any], decision: Decision, result: FitResult, spent: float) -> Outcome:
    """Record why the chase ends, and say it."""
    forecast = None if decision.forecast is None else _band(decision.forecast)
    record["end"] = {
        "verdict": decision.verdict.value,
        "reason": decision.reason,
        "spent": spent,
        "forecast": forecast,
    }
    write_rounds(subject.sweep_dir, record)
    words = "" if decision.forecast is None else f": {_forecast_words(decision)}"
    say(f"{decision.verdict.value}{words} after {number(spent)} FLOPs; {decision.reason}")
    if result.regime == "fixed tokens":
        say("the forecast is of runs at the same number of tokens as these, not of converged ones")
    return Outcome(0 if decision.verdict is Verdict.REACHED else FAILED, (subject.sweep_dir,))


def _forecast_words(decision: Decision) -> str:
    assert decision.forecast is not None
    value, low, high = decision.forecast
    return f"forecast {number(value)} {interval(low, high)} (± {number(100 * half_width(decision.forecast))} %)"
