"""Whether rows can be trained on: finite, small enough for fp32, not all equal. And how unequal their norms are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from harness.activations.lm.contexts import SPLITS
from harness.errors import UserError
from harness.files import write_json_atomic

CHECKED = "checked.json"
"""Size and modification time of every shard when its values were last checked."""
LARGEST = 1e15
"""Largest absolute value: the square of a larger one, summed over a row and a batch, leaves fp32."""
LARGE_SHARE = 0.5
"""From this share of Σ‖x‖² in 1 % of the rows on, a note says so."""
_BLOCK_ROWS = 4096
_AGAIN = "look for NaN, overflows or a wrong layer in the model, or set activations.lm_precision=fp32"


class Values:
    """Checks the rows of a split as they pass, and keeps their norms."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._first: Tensor | None = None
        self._constant = True
        self._norms: list[np.ndarray] = []

    def add(self, rows: Float[Tensor, "rows d"], path: Path) -> None:
        """Take the rows of the file `path`. Raises `UserError` for a value that is not finite or too large."""
        for block in rows.split(_BLOCK_ROWS):
            x = block.float()
            largest = float(x.abs().max())  # NaN if there is one
            if not largest <= LARGEST:
                raise UserError(f"{path} holds activations of {largest:g}, which cannot be trained on; {_AGAIN}")
            if self._first is None:
                self._first = x[0].clone()
            self._constant = self._constant and bool((x == self._first).all())
            self._norms.append(x.double().norm(dim=1).float().numpy())

    def norms(self) -> dict[str, float]:
        """`median` and `max` of the norms; `top_share`: the share of Σ‖x‖² that the largest 1 % of the rows hold.

        Raises `UserError` if all rows are equal.
        """
        if self._constant:
            name = {"train": "training", "heldout": "held-out"}[self._split]
            count = sum(map(len, self._norms))
            raise UserError(
                f"the {count:,} {name} rows of activations are all equal, so there is nothing to learn; give more "
                f"or other text, or choose another activations.layer or activations.hook"
            )
        norms = np.sort(np.concatenate(self._norms).astype(np.float64))
        squares = np.square(norms)
        top = squares[-max(1, len(squares) // 100) :]
        return {
            "median": float(np.median(norms)),
            "max": float(norms[-1]),
            "top_share": float(top.sum() / squares.sum()),
        }


def check_once(directory: Path) -> None:
    """Check all rows of a store, unless that was done before and its shards have not been written since.

    Raises `UserError` as `Values` does.
    """
    files = {split: sorted(directory.glob(f"{split}-*.safetensors")) for split in SPLITS}
    status = {path.name: path.stat() for paths in files.values() for path in paths}
    found = {name: [state.st_size, state.st_mtime_ns] for name, state in status.items()}
    sidecar = directory / CHECKED
    try:
        earlier = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if earlier == found:
        return
    for split, paths in files.items():
        values = Values(split)
        for path in paths:
            with safe_open(path, framework="pt") as file:
                values.add(file.get_tensor("x"), path)
        values.norms()
    try:
        write_json_atomic(sidecar, found)
    except OSError:
        return  # a store that this user may only read is checked at every opening


def note_on_norms(norms: dict[str, float]) -> str | None:
    """What a user should know of rows a few of which hold most of Σ‖x‖²; None if there is nothing to say."""
    median, largest, share = norms["median"], norms["max"], norms["top_share"]
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
