"""From contexts to rows: the forwards of the language model, whose values at the kept positions are the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.activations.lm.contexts import Contexts, kept_positions
from harness.activations.lm.model import HookedModel
from harness.activations.source import DTYPES
from harness.errors import UserError
from harness.process.signals import Interrupted, StopFlag

OnRows = Callable[[int], None]
"""Called with the number of rows after each forward."""


class RowSettings(NamedTuple):
    """What decides the rows, beside the model and the contexts."""

    d_model: int
    dtype: str
    lm_batch: int
    dropped_ids: list[int]
    drop_first: bool


def unit_rows(
    settings: RowSettings,
    hooked: HookedModel,
    contexts: Contexts,
    numbers: Int[np.ndarray, " contexts"],
    stop: StopFlag,
    on_rows: OnRows,
) -> list[Float[Tensor, "rows d"]]:
    """For every hook the rows of some contexts in order, in the storage dtype, on the CPU."""
    begins = np.concatenate([[0], np.cumsum(contexts.rows[numbers + 1] - contexts.rows[numbers])])
    rows = [torch.empty(int(begins[-1]), settings.d_model, dtype=DTYPES[settings.dtype]) for _ in hooked.hooks]
    every_length = contexts.offsets[numbers + 1] - contexts.offsets[numbers]
    with hooked.computing():
        for batch in _length_batches(every_length, settings.lm_batch):
            if stop.requested:
                raise Interrupted
            lengths = every_length[batch].tolist()
            tokens = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            kept = torch.zeros_like(tokens, dtype=torch.bool)
            for line, (context, length) in enumerate(zip(numbers[batch], lengths, strict=True)):
                ids = np.array(contexts.ids[contexts.offsets[context] : contexts.offsets[context + 1]])
                positions = np.flatnonzero(kept_positions(ids, settings.dropped_ids, settings.drop_first))
                tokens[line, :length] = torch.from_numpy(ids)
                mask[line, :length] = 1
                kept[line, positions[: contexts.rows[context + 1] - contexts.rows[context]]] = True
            padded = min(lengths) < max(lengths)
            values = hooked.all_activations(tokens.to(hooked.device), mask.to(hooked.device) if padded else None)
            spans = zip(begins[batch].tolist(), begins[batch + 1].tolist(), strict=True)
            into = torch.from_numpy(np.concatenate([np.arange(begin, end) for begin, end in spans]))
            for value, out in zip(values, rows, strict=True):
                computed = value[kept.to(value.device)].to(out.dtype).cpu()
                if not torch.isfinite(computed).all():
                    raise UserError(
                        f"the model gives values that {settings.dtype} cannot hold (not finite); "
                        f"set activations.dtype=bf16 or fp32, or activations.lm_precision=fp32"
                    )
                out.index_copy_(0, into, computed)
            on_rows(len(into))
    return rows


def _length_batches(lengths: Int[np.ndarray, " contexts"], size: int) -> Iterator[Int[np.ndarray, " batch"]]:
    """Numbers of contexts in batches of similar length, so that there is little padding."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def row_norms(rows: Float[Tensor, "rows d"]) -> Float64[np.ndarray, " rows"]:
    """Euclidean norms in float64."""
    return rows.double().norm(dim=1).numpy()
