"""The interface of a source of activations: a store of a language model's rows, or a known dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.activations.statistics import Statistics
from harness.activations.stream import Batches

SAMPLE_ROWS = 32_768
"""Most rows of `ActivationSource.sample`."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Storage dtypes by their names in the configuration (`activations.dtype`)."""


@runtime_checkable
class ActivationSource(Protocol):
    """Rows to train on, held-out rows, and facts about them."""

    id: str
    """Recipe hash of the store (see `store.identity`); part of the run_id."""
    d_model: int
    heldout_rows: int
    description: dict[str, Any]
    """Kind, model, hook, layer, context, text …: for trackers and exports."""

    @property
    def train_rows(self) -> int | None:
        """Rows of one epoch; None when rows never repeat."""
        ...

    @property
    def dictionary(self) -> Float[Tensor, "features d"] | Float[Tensor, "features width d"] | None:
        """The true features, unit norm; for points on spheres orthonormal rows of their span, and zeros up to the
        widest. None for a language model."""
        ...

    def statistics(self, layernorm: bool) -> Statistics:
        """Of the raw training rows, or with `layernorm` of the rows after `layernorm_rows`."""
        ...

    def sample(self) -> Float[Tensor, "rows d"]:
        """A fixed, fair sample of at most `SAMPLE_ROWS` raw training rows in fp32, for the initialisation."""
        ...

    def stream(self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1) -> Batches:
        """The share of replica `dp_rank` of `dp` in every batch; `seed` orders the rows (store) or draws them.

        Raises `ValueError` if `dp` does not divide `batch_tokens`.
        """
        ...

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        """All held-out rows in batches (storage dtype, CPU), each row with the number of its document.

        The order is fixed and shuffled over all rows, so every prefix is a fair sample of rows and documents.
        """
        ...
