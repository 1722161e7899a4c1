"""Which runs are each other's peers: they differ in `train.seed` alone, and one job trains them (`train.mfr_seeds`)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from harness.config import science
from harness.errors import UserError
from harness.record.run import Run


def groups_of(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """The runs, in their order: those with mutual feature regularisation with their peers among `runs`, by ascending
    seed, the others alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_group(run) if run.config.train.peers else str(run.run_dir), []).append(run)
    return [tuple(sorted(group, key=lambda run: run.config.train.seed)) for group in groups.values()]


def _group(run: Run) -> str:
    settings = science(run.config)
    settings["train"].pop("seed", None)
    return f"{run.sweep_dir} {json.dumps(settings, sort_keys=True)}"


def missing_seeds(group: Sequence[Run]) -> list[int]:
    """The seeds of a group's peers that are not in it."""
    present = {run.config.train.seed for run in group}
    return [seed for seed in group[0].config.train.mfr_seeds if seed not in present]


def require_peers(group: Sequence[Run]) -> None:
    """Raises `UserError` if a group is not whole: what a run learns depends on all its peers."""
    if missing := missing_seeds(group):
        seeds = group[0].config.train.mfr_seeds
        raise UserError(
            f"{group[0].run_id} learns from its peers of train.mfr_seeds={seeds}, and the one with "
            f"train.seed={missing[0]}, all else equal (stream.seed too), is not to be trained with it; launch "
            f"train.seed={','.join(map(str, seeds))} in one launch, and remove the directories of peers that have ended"
        )
