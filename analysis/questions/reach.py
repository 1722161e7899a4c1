"""Where a fitted law may be asked: near enough to its runs, and at sizes that can exist."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from analysis.fits.result import FitResult
from analysis.runs.table import RunTable
from harness.errors import UserError

FAR = 8.0
"""Forecasts beyond this multiple of the largest size of the runs, or below this part of the smallest, must be asked
for."""

LARGEST_N = 1e12
"""Number of latents above which no SAE makes sense."""


def parse_point(text: str) -> dict[str, float]:
    """ "n=2**20 k=64" (or with commas) as numbers; a power is written 2**20 or 2^20. Raises `UserError` otherwise."""
    point = {}
    for part in re.split(r"[\s,]+", text.strip()):
        name, equals, value = part.partition("=")
        base, power, exponent = value.replace("^", "**").partition("**")
        try:
            point[name] = float(base) ** float(exponent) if power else float(base)
        except (ValueError, OverflowError):
            equals = ""
        if not equals or not name or not np.isfinite(point[name]) or point[name] <= 0:
            raise UserError(f"{part!r} is not NAME=NUMBER, e.g. n=2**20 or k=64")
    return point


def beyond(result: FitResult, size: float) -> str:
    """How far a size outside those that were fitted is from the nearest of them, in words."""
    low, high = result.domain[result.law.scale_input]
    return f"{size / high:.3g} times the largest" if size > high else f"1/{low / size:.3g} of the smallest"


def is_far(result: FitResult, size: float) -> bool:
    """Whether a size is beyond the stated span of forecasts."""
    low, high = result.domain[result.law.scale_input]
    return max(size / high, low / size) > FAR * (1 + 1e-9)


def check_point(result: FitResult, table: RunTable, point: Mapping[str, float], far: bool = True) -> None:
    """Raises `UserError` if no SAE can have the sizes of `point`, or one is far beyond the runs and `far` is False."""
    n, k = point.get("n"), point.get("k")
    width = _width(table)
    for role, size in point.items():
        if not np.isfinite(size):
            raise UserError(f"{role} = {size:g} is not a number of anything; give a finite one")
    if k is not None and k < 1:
        raise UserError(f"k = {k:g} is less than one active latent; choose k from 1 on")
    if k is not None and width is not None and k > width:
        raise UserError(f"k = {k:g} is more than the {width:g} dimensions of the activations; choose a smaller k")
    if k is not None and n is not None and k > n:
        raise UserError(f"k = {k:g} is more than n = {n:g} latents; choose a smaller k")
    if n is not None and not 1 <= n <= LARGEST_N:
        raise UserError(f"n = {n:g} is no number of latents of an SAE (1 to {LARGEST_N:g})")
    name = result.law.scale_input
    if not far and name in point and is_far(result, point[name]):
        raise UserError(
            f"{name} = {point[name]:g} is {beyond(result, point[name])} of the runs; a forecast more than a factor of "
            f"{FAR:g} outside needs --far"
        )


def _width(table: RunTable) -> float | None:
    """Dimensions of the activations, if the table says so."""
    widths = table.frame["d_model"].dropna().unique() if "d_model" in table.frame else []
    return float(widths[0]) if len(widths) == 1 else None
