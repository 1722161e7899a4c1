"""What every source of activations offers, whether rows come from a language model or from a known dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.activations.statistics import Statistics
from harness.activations.stream import Stream

SAMPLE_ROWS = 32_768
"""Most rows of `ActivationSource.sample`."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Storage dtypes by their names in the configuration (`activations.dtype`)."""


@runtime_checkable
class ActivationSource(Protocol):
    """Rows to train on, held-out rows, and what is known about them."""

    id: str
    """Recipe hash of the store (see `store.identity`); part of the run_id."""
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
