"""What a plan says of rows of massive norm, which the harvest drops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.record.run import Run


def outlier_lines(runs: Sequence[Run]) -> list[str]:
    """A line per store from which rows are or were dropped."""
    from harness.activations.store.manifest import read_manifest
    from harness.activations.store.paths import is_complete, store_path
    from harness.activations.store.values import note_on_outliers

    lines = {}
    for run in {run.store.id: run for run in runs if run.config.activations.outlier_factor}.values():
        config = run.config.activations
        where, store = f"{config.hook} of layer {config.layer}", store_path(config, Path(run.config.out))
        made = note_on_outliers(read_manifest(store)["description"]) if is_complete(store) else None
        rule = f"rows whose norm is above {config.outlier_factor:g} times the median will be dropped"
        lines[run.store.id] = f"{where}: {made or rule}"
    return list(lines.values())
