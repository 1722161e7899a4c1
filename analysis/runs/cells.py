"""Cells: the points that share all their settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd


def cell_numbers(columns: Iterable[Any]) -> np.ndarray:
    """The number of each point's cell (points,), from 0. Points with equal values in all columns share a cell; missing
    values equal each other."""
    cell = np.zeros(1, dtype=np.int64)
    for values in columns:
        codes, levels = pd.factorize(values, use_na_sentinel=False)
        cell, _ = pd.factorize(cell * len(levels) + codes)
    return cell
