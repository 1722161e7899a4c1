"""Whether rows can be trained on: finite, small enough for fp32, not all equal. And how unequal their norms are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from safetensors import safe_open
from torch import Tensor

from harness.activations.lm.contexts import SPLITS
from harness.activations.store.verify import identity_of
from harness.errors import UserError
from harness.files import write_json_atomic

CHECKED = "checked.json"
"""Size and modification time of every shard when its values were last checked."""
LARGEST = 1e15
"""Largest absolute value: the square of a larger one, summed over a row and a batch, leaves fp32."""
LARGE_SHARE = 0.5
"""From this share of Σ‖x‖² in 1 % of the rows on, a note says so."""
_BLOCK_ROWS = 4096
_SUMMED_AT_ONCE = 2**20
_AGAIN = "look for NaN, overflows or a wrong layer in the model, or set activations.lm_precision=fp32"


class Facts(NamedTuple):
    """What is known of some rows of a split."""

    first: Float[Tensor, " d"]
    """The first of them."""
    constant: bool
    """Whether all others are equal to it."""
    norms: Float32[np.ndarray, " rows"]


def facts_of(rows: Float[Tensor, "rows d"], path: Path) -> Facts:
    """`Facts` of the rows of the file `path`. Raises `UserError` for a value that is not finite or too large."""
    first, constant, norms = rows[0].float(), True, list[np.ndarray]()
    for block in rows.split(_BLOCK_ROWS):
        x = block.float()
        largest = float(x.abs().max())  # NaN if there is one
        if not largest <= LARGEST:
            raise UserError(f"{path} holds activations of {largest:g}, which cannot be trained on; {_AGAIN}")
        constant = constant and bool((x == first).all())
        norms.append(x.double().norm(dim=1).float().numpy())
    return Facts(first, constant, np.concatenate(norms))


def norms(split: str, parts: Sequence[Facts]) -> dict[str, float]:
    """`median` and `max` of the norms; `top_share`: the share of Σ‖x‖² that the largest 1 % of the rows hold.

    `parts` are all rows of the split. Raises `UserError` if all rows are equal.
    """
    sorted_norms = np.concatenate([part.norms for part in parts])
    if all(part.constant and torch.equal(part.first, parts[0].first) for part in parts):
        name = {"train": "training", "heldout": "held-out"}[split]
        raise UserError(
            f"the {len(sorted_norms):,} {name} rows of activations are all equal, so there is nothing to learn; give "
            f"more or other text, or choose another activations.layer or activations.hook"
        )
    sorted_norms.sort()
    rows = len(sorted_norms)
    middle = sorted_norms[(rows - 1) // 2 : rows // 2 + 1].astype(np.float64)
    return {
        "median": float(middle.mean()),
        "max": float(sorted_norms[-1]),
        "top_share": _sum_of_squares(sorted_norms[-max(1, rows // 100) :]) / _sum_of_squares(sorted_norms),
    }


def _sum_of_squares(values: Float32[np.ndarray, " rows"]) -> float:
    """As `np.square(values.astype(np.float64)).sum()`, bit for bit, without two copies of everything in float64: numpy
    halves long sums like this."""
    if len(values) <= _SUMMED_AT_ONCE:
        return float(np.square(values.astype(np.float64)).sum())
    half = len(values) // 2
    half -= half % 8
    return _sum_of_squares(values[:half]) + _sum_of_squares(values[half:])


def check_once(directory: Path) -> None:
    """Check all rows of a store, unless that was done before and its shards have not been written since.

    Raises `UserError` as `facts_of` and `norms` do.
    """
    files = {split: sorted(directory.glob(f"{split}-*.safetensors")) for split in SPLITS}
    found = {path.name: identity_of(path) for paths in files.values() for path in paths}
    try:
        earlier = json.loads((directory / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if earlier == _written(found):
        return
    for split, paths in files.items():
        facts: list[Facts] = []
        for path in paths:
            with safe_open(path, framework="pt") as file:
                facts.append(facts_of(file.get_tensor("x"), path))
        norms(split, facts)
    record_values(directory, found)


def record_values(directory: Path, identities: dict[str, list[int]]) -> None:
    """Write down that all rows were checked when the shards had these identities (`verify.identity`)."""
    with suppress(OSError):  # a store that this user may only read is checked at every opening
        write_json_atomic(directory / CHECKED, _written(identities))


def _written(identities: dict[str, list[int]]) -> dict[str, list[int]]:
    """Size and modification time."""
    return {name: identity[:2] for name, identity in identities.items()}


def note_on_norms(found: dict[str, float]) -> str | None:
    """What a user should know of rows a few of which hold most of Σ‖x‖²; None if there is nothing to say."""
    median, largest, share = found["median"], found["max"], found["top_share"]
    if share < LARGE_SHARE:
        return None
    ratio = f"{largest / median:,.0f} times the median norm" if median else f"a norm of {largest:g}, the median is 0"
    return (
        f"1 % of the training rows hold {share:.1%} of the sum of squared norms (the largest has {ratio}): fvu "
        f"measures mostly these rows"
    )


def note_on_outliers(description: dict[str, Any]) -> str | None:
    """How many rows of massive norm a store left out; None if none were to be."""
    outliers = description.get("outliers")
    if outliers is None:
        return None
    dropped, factor = outliers["dropped"], outliers["factor"]
    return (
        f"dropped {dropped['train']:,} training and {dropped['heldout']:,} held-out rows whose norm is above "
        f"{factor:g} times the median ({outliers['median_norm']:.4g})"
    )
