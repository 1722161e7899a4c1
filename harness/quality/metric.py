"""What a metric is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.config import ActivationsConfig
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.trained import TrainedSae


@dataclass(frozen=True)
class Subject:
    """A finished SAE to be judged."""

    name: str
    directory: Path
    """`quality/` is written in it."""
    weights: str
    """Hash of its weights."""
    activations: ActivationsConfig
    """Where its activations come from."""
    out: Path
    """The output directory, which holds the store and what is shared."""
    weight_bytes: int
    load: Callable[[], TrainedSae]
    foreign: bool = False
    """Whether another tool wrote it, so that it may not belong to the activations."""


@dataclass(frozen=True)
class Outcome:
    """What a metric found for one SAE."""

    tokens: int
    """Tokens that were used."""
    values: dict[str, Value]
    per_latent: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Column → a number per latent, or a row of numbers."""
    per_document: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Column → a sum per document."""
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])
    """Points of curves that belong to the values, e.g. fvu at several k."""
    tables: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Further tables by name, each of columns like those per latent, or of strings."""


def _nothing(_judge: str) -> dict[str, Any]:
    return {}


class Metric(NamedTuple):
    name: str
    version: int
    """Raised when the same settings would give other numbers."""
    about: str
    """What it measures, in a line."""
    run: Callable[[Sequence[Subject], Shared], Iterator[tuple[Subject, Outcome]]]
    """Judges SAEs of the same activations; each outcome comes when it is complete. Raises `Interrupted`."""
    settings: Callable[[str], dict[str, Any]] = _nothing
    """Judge of explanations → what else decides its values; kept with the result."""
