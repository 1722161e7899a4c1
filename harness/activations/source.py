"""What every source of activations offers, whether rows come from a language model or from a known dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.activations.stream import Stream

SAMPLE_ROWS = 32_768


class Statistics(NamedTuple):
    """Of the training rows as they are stored, accumulated in float64."""

    count: int
    mean: Float64[Tensor, " d"]
    mean_sq_norm: float
    """E‖x‖²."""
    variance: float
    """E‖x − mean‖², summed over d."""


@runtime_checkable
class ActivationSource(Protocol):
    """Rows to train on, held-out rows, and what is known about them."""

    id: str
    """Content hash; part of the run_id."""
    d_model: int
    train_rows: int | None
    """Rows of one epoch; None when rows never repeat."""
    heldout_rows: int
    description: dict[str, Any]
    """Model, hook, layer, context, text …: for trackers and exports."""

    @property
    def dictionary(self) -> Float[Tensor, "features d"] | None:
        """The true features, unit norm, where they are known."""
        ...

    def statistics(self, layernorm: bool) -> Statistics:
        """Of the raw rows, or of the rows after `layernorm` (subtract the mean over d, scale to unit norm)."""
        ...

    def sample(self) -> Float[Tensor, "rows d"]:
        """A fixed fair sample of at most 32,768 raw training rows in fp32: geometric median, initialisation."""
        ...

    def stream(self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1) -> Stream:
        """Rank `dp_rank`'s share of the batches. Raises `ValueError` if `dp` does not divide `batch_tokens`."""
        ...

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        """Held-out rows (storage dtype, CPU) and the number of the document each comes from, from the start.

        The order is fixed and shuffled over all rows, so any prefix is a fair sample of rows and documents.
        """
        ...
