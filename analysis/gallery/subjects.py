"""The SAEs of a gallery: what the record says about each, and what was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs.study import read_study
from harness.errors import UserError
from harness.record import names
from harness.record.quality import read_qualities, read_table
from harness.record.result import read_result

METRIC = "examples"
VERSION = 1
"""Of the metric: the one whose tables are understood."""


@dataclass(frozen=True)
class Subject:
    """An SAE whose examples were collected."""

    name: str
    directory: Path
    result: dict[str, Any]
    """`result.json`; empty for an SAE that another tool wrote."""
    qualities: dict[str, dict[str, Any]]
    """Metric → what it found."""

    @property
    def text(self) -> tuple[Any, ...]:
        """What tells texts apart: examples of SAEs with the same are from the same contexts."""
        settings = self.qualities[METRIC]["settings"]
        return settings["store"], settings["tokens"]

    def setting(self, name: str, otherwise: Any = None) -> Any:
        return self.result.get(name, otherwise)

    @property
    def kind(self) -> tuple[Any, Any]:
        """Architecture and k: SAEs of one kind differ in width."""
        return self.setting("sae", "other"), self.setting("k")

    def value(self, metric: str, name: str) -> float | None:
        return self.qualities.get(metric, {}).get("values", {}).get(name, {}).get("value")

    def lines(self, metric: str, curve: str = "latents") -> list[dict[str, Any]]:
        return self.qualities.get(metric, {}).get("curves", {}).get(curve, [])

    def table(self, name: str, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Raises `UserError` if it cannot be read."""
        return read_table(self.directory, METRIC, name, columns)

    def decoder(self) -> np.ndarray:
        """Decoder rows of norm 1, float32 (n, d)."""
        return self.table("per_latent", ["decoder"])["decoder"].astype(np.float32)


def gather(targets: Sequence[Path]) -> tuple[list[Subject], list[str]]:
    """The SAEs of run directories, of sweeps and of results of foreign SAEs, and a note per SAE that is left out.

    Raises `UserError` when a target is no directory, none has examples, or a file is damaged.
    """
    found: dict[Path, Subject] = {}
    notes = []
    for target in targets:
        if not target.is_dir():
            raise UserError(f"there is no directory {target}")
        single = (target / names.QUALITY).is_dir() or (target / names.CONFIG).is_file()
        for path in [target] if single else sorted(path for path in target.iterdir() if path.is_dir()):
            qualities = read_qualities(path)
            version = qualities.get(METRIC, {}).get("version", VERSION)
            if version != VERSION:
                notes.append(
                    f"{path.name} is left out: its examples are of version {version}, not {VERSION}; collect them again"
                )
            elif METRIC in qualities:
                found[path.resolve()] = Subject(path.resolve().name, path, read_result(path) or {}, qualities)
            elif (path / names.RESULT).is_file():
                notes.append(f"{path.name} is left out: its examples were not collected")
    if not found:
        where = " ".join(map(str, targets))
        raise UserError(
            f"no SAE of {where} has examples; collect them with: python -m harness.evaluate {where} "
            "--metrics examples --tokens 32768"
        )
    subjects = sorted(found.values(), key=lambda each: (*map(str, each.kind), each.setting("n_latents", 0), each.name))
    _require_different([subject.name for subject in subjects])
    return subjects, notes


def _require_different(run_names: Sequence[str]) -> None:
    double = next((name for name in run_names if run_names.count(name) > 1), None)
    if double is not None:
        raise UserError(f"two SAEs are named {double}: make a gallery of each")


def title_of(targets: Sequence[Path]) -> str:
    """The title of a sweep; otherwise the names of the targets."""
    if len(targets) == 1 and not (targets[0] / names.QUALITY).is_dir():
        return read_study(targets[0]).title
    return " and ".join(target.resolve().name for target in targets)
