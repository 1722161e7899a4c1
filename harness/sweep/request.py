"""What a person asks for, as runs: the overrides or the study, the stores that they need, the names that they get."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.budget import schedule_problem
from harness.config import Config
from harness.cost.limits import time_limit
from harness.errors import UserError
from harness.grid.cells import Cell, Grid, Impossible, make_cells, narrow_cells, told_once
from harness.grid.study import Study, overridden, study_grids
from harness.mirror.copies import check as check_tracker
from harness.mirror.wandb_settings import leave_agent, with_environment
from harness.process.device import pick_device
from harness.record.peers import groups_of, require_peers
from harness.record.run import Run
from harness.sweep.runs import UNRESOLVED, find_stores, make_runs, resolve_initial, resolve_precision, with_own_rows
from harness.terminal import listed, say


@dataclass(frozen=True)
class Request:
    overrides: Sequence[str] = ()
    study: Study | None = None
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Key → values: cells with another value are left out."""

    def about(self) -> dict[str, Any]:
        """What `study.json` says of the request: enough to ask for more of the same."""
        about = {"study": "" if self.study is None else self.study.source, "overrides": list(self.overrides)}
        if self.study is None:
            return about
        return about | {key: getattr(self.study, key) for key in ("name", "question", "title", "law")}


def requested_cells(request: Request) -> list[Cell]:
    """Expand and check a request; `train.precision` is resolved. Raises `UserError`."""
    study, overrides = request.study, request.overrides
    grids = [Grid(tuple(overrides))] if study is None else study_grids(study, overrides)
    try:
        cells = make_cells(grids, request.only)
    except Impossible as error:
        if study is None or "sae" not in overridden(overrides):
            raise
        advice = "sae=… takes the place of the SAE in every grid of the study; to choose among its cells: --only"
        raise UserError(f"{error}\n{advice} sae.architecture=…") from None
    cells = [cell._replace(config=_with_tracker(cell.config)) for cell in cells]
    _check_machine(cells)
    _check_sizes(cells)
    _check_schedules(cells, overridden(overrides), {name for grid in grids for name in overridden(grid.overrides)})
    if len({cell.config.cluster.name for cell in cells}) > 1:
        raise UserError("one launch runs here or is submitted, not both; write cluster=local or cluster=slurm")
    return [Cell(cell.label, resolve_initial(resolve_precision(cell.config))) for cell in cells]


def _with_tracker(config: Config) -> Config:
    tracker = with_environment(config.tracker)
    return config if tracker == config.tracker else dataclasses.replace(config, tracker=tracker)


def _check_schedules(cells: Sequence[Cell], typed: Collection[str], named: Collection[str]) -> None:
    """Raises `UserError` if a schedule that was asked for does not fit into its budget.

    `typed`: keys and groups of the command line; `named`: those and the study's. Where a person typed a budget but no
    schedule, or nobody named a schedule, there is only a warning: small budgets are for trying things out.
    """
    problems = [(cell.label, reason) for cell in cells if (reason := schedule_problem(cell.config))]
    if not problems:
        return
    (_, first), *_ = problems
    asked = set(typed if {"train.tokens", "train.flops"} & set(typed) else named)
    if not {"train", "train.warmup_tokens", "train.decay_fraction"} & asked:
        say(f"warning: {len(problems)} of {len(cells)} cells never train at their full learning rate: {first}")
    elif len({reason for _, reason in problems}) == 1:
        raise UserError(f"{len(problems)} of {len(cells)} cells: {first}" if len(cells) > 1 else first)
    else:
        lines = told_once(problems)
        raise UserError("\n".join([f"{len(problems)} of {len(cells)} schedules do not fit their budget:", *lines]))


def _check_machine(cells: Sequence[Cell]) -> None:
    """Raises `UserError` for cells that need a device, kernels or a tracker that this machine does not have."""
    for tracker in {cell.config.tracker.name: cell.config.tracker for cell in cells}.values():
        check_tracker(tracker)
    local = [cell.config for cell in cells if cell.config.cluster.name == "local"]
    for name, device in {(config.ops, config.train.device) for config in local} - {("auto", "auto"), ("auto", "cpu")}:
        from harness.ops import choose_ops

        try:
            picked = pick_device(device)
            if name != "auto":
                choose_ops(name, picked)
        except ValueError as error:
            raise UserError(str(error)) from None


def _check_sizes(cells: Sequence[Cell]) -> None:
    """Raises `UserError` for a batch larger than its store, or a job that would save from its first half on."""
    for label, config in cells:
        batch, rows = config.train.batch_tokens, config.activations.tokens
        reason = ""
        if config.activations.kind != "synthetic" and batch > rows:
            reason = (
                f"train.batch_tokens={batch} exceeds the store's activations.tokens={rows:g}, so that each batch would "
                "hold the same rows several times; lower the first or raise the second"
            )
        elif config.cluster.name == "slurm" and 2 * config.cluster.lead_s > time_limit(config.cluster.time):
            reason = (
                f"cluster.lead_s={config.cluster.lead_s} is more than half of cluster.time={config.cluster.time!r}; "
                "lower the first or raise the second"
            )
        if reason:
            raise UserError(f"{label}: {reason}" if label else reason)


def plan_runs(cells: Sequence[Cell], *, dry_run: bool) -> list[Run]:
    """The runs of requested cells, cheap ones first; notes about them go to the terminal. Writes no file.

    Raises `UserError`. In a dry run a store that needs an unreachable hub stays unresolved.
    """
    if narrow := narrow_cells(cells):
        shown = listed(narrow)
        say(f"warning: {len(narrow)} of {len(cells)} cells have k > n/(4·experts), few latents to choose from: {shown}")
    cells = with_own_rows(cells)
    stores = find_stores([cell.config.activations for cell in cells], tolerant=dry_run)
    for store in stores.values():
        if store.id == UNRESOLVED:
            say(f"note: the activation store is unresolved here, names and states are provisional: {store.problem}")
    runs = make_runs(cells, stores)
    for group in groups_of(runs):
        require_peers(group)
    for run in runs:
        if run.config.train.flops and (reason := schedule_problem(run.config, run.tokens)):
            raise UserError(f"{run.run_id}: {reason}")
    if len(runs) > 1 and leave_agent():
        say("note: a W&B agent started this, and its one run cannot hold several cells; they become runs of their own")
    if len(runs) < len(cells):
        say(f"{len(cells) - len(runs)} of {len(cells)} cells ask for the same run as another one")
    return runs
