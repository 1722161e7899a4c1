"""Architectures at equal sparsity: each against TopK at equal measured L0, at equal n and at equal FLOPs.

Architectures without k end near a target of L0, not at it, so losses are compared at the L0 measured on held-out
rows: TopK is interpolated, log-log, between its runs. Nothing is extrapolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd

from analysis.questions.paired import PairedErrors
from analysis.runs.table import RunTable


@dataclass(frozen=True)
class Point:
    """The repeats of one cell, or a mixture of cells: mean logarithms, and how much each run weighs in them."""

    log_l0: float
    log_loss: float
    log_flops: float
    weights: dict[str, float]


@dataclass(frozen=True)
class Frontier:
    """Loss against L0 of one architecture at one n."""

    architecture: str
    n: float
    points: tuple[Point, ...]
    """By rising L0."""

    def at(self, log_l0: float) -> Point | None:
        """The loss at this L0, between the two nearest cells; None outside their range."""
        return _between(self.points, "log_l0", log_l0)


def frontiers(table: RunTable) -> list[Frontier]:
    """By architecture and n; empty if the table has no architectures or no measured L0."""
    frame = table.frame
    if "sae" not in frame or not all(table.has(role) for role in ("n", "k", "l0", "flops")):
        return []
    n, k, l0, loss, flops, run = (table.roles[role] for role in ("n", "k", "l0", "loss", "flops", "run"))
    kept = frame[(frame[l0] > 0) & (frame[flops] > 0)]
    found = []
    for key, part in kept.groupby(["sae", n]):
        architecture, width = cast("tuple[str, float]", key)
        points = []
        for _, every_rate in part.groupby(k):
            cell = _at_best_rate(every_rate, table.roles.get("lr", ""), loss)
            logs = np.log(cell[[l0, loss, flops]].to_numpy(float)).mean(axis=0)
            weights = {str(name): 1 / len(cell) for name in cell[run]}
            points.append(Point(float(logs[0]), float(logs[1]), float(logs[2]), weights))
        found.append(Frontier(architecture, float(width), tuple(sorted(points, key=lambda point: point.log_l0))))
    return found


def _at_best_rate(cell: pd.DataFrame, lr: str, loss: str) -> pd.DataFrame:
    """The repeats at the learning rate with the least mean log loss."""
    if lr not in cell:
        return cell
    means = pd.Series(np.log(cell[loss]), index=cell.index).groupby(cell[lr]).mean()
    return cell[cell[lr] == means.idxmin()] if len(means) else cell


def _between(points: Sequence[Point], axis: str, at: float) -> Point | None:
    for low, high in itertools.pairwise(sorted(points, key=lambda point: getattr(point, axis))):
        begin, end = getattr(low, axis), getattr(high, axis)
        if begin <= at <= end:
            share = (at - begin) / (end - begin) if end > begin else 0.0
            return _mixture(low, high, share)
    return None


def _mixture(low: Point, high: Point, share: float) -> Point:
    weights = {run: (1 - share) * weight for run, weight in low.weights.items()}
    for run, weight in high.weights.items():
        weights[run] = weights.get(run, 0.0) + share * weight

    def mixed(name: str) -> float:
        return (1 - share) * getattr(low, name) + share * getattr(high, name)

    return Point(mixed("log_l0"), mixed("log_loss"), mixed("log_flops"), weights)


def at_equal_l0(table: RunTable, errors: PairedErrors | None = None, base: str = "topk") -> list[dict[str, Any]]:
    """One row per cell of the other architectures: its loss over that of `base` at its L0, at equal n (`ratio_n`) and
    at equal FLOPs (`ratio_flops`), where `base` is interpolated between its widths too. None where `base` has no runs
    around; `ends_n` and `ends_flops` are the paired 95 % intervals of the ratios, None without `errors`."""
    every = frontiers(table)
    own = {frontier.n: frontier for frontier in every if frontier.architecture == base}
    rows = []
    for frontier in every if own else []:
        if frontier.architecture == base:
            continue
        for point in frontier.points:
            row = {"sae": frontier.architecture, "n": frontier.n, "l0": math.exp(point.log_l0)}
            row["loss"] = math.exp(point.log_loss)
            same = own[frontier.n].at(point.log_l0) if frontier.n in own else None
            row |= _ratio(point, same, "n", errors)
            widths = [found for each in own.values() if (found := each.at(point.log_l0)) is not None]
            row |= _ratio(point, _between(widths, "log_flops", point.log_flops), "flops", errors)
            rows.append(row)
    return rows


def _ratio(point: Point, other: Point | None, name: str, errors: PairedErrors | None) -> dict[str, Any]:
    if other is None:
        return dict.fromkeys((f"ratio_{name}", f"weights_{name}", f"ends_{name}"))
    weights = dict(point.weights)
    for run, weight in other.weights.items():
        weights[run] = weights.get(run, 0.0) - weight
    value = point.log_loss - other.log_loss
    return {f"ratio_{name}": math.exp(value), f"weights_{name}": weights, f"ends_{name}": _ends(weights, value, errors)}


def _ends(weights: dict[str, float], value: float, errors: PairedErrors | None) -> tuple[float, float] | None:
    ends = errors.interval(weights, value) if errors is not None else None
    return None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))


def order(rows: list[dict[str, Any]], name: str, errors: PairedErrors | None = None) -> list[dict[str, Any]]:
    """Per architecture the geometric mean of `ratio_<name>` over its cells, with its interval, best first."""
    means = []
    for architecture in dict.fromkeys(row["sae"] for row in rows):
        chosen = [row for row in rows if row["sae"] == architecture and row[f"ratio_{name}"] is not None]
        if not chosen:
            continue
        value = float(np.mean([math.log(row[f"ratio_{name}"]) for row in chosen]))
        weights: dict[str, float] = {}
        for row in chosen:
            for run, weight in row[f"weights_{name}"].items():
                weights[run] = weights.get(run, 0.0) + weight / len(chosen)
        means.append(
            {"sae": architecture, "ratio": math.exp(value), "ends": _ends(weights, value, errors), "cells": len(chosen)}
        )
    return sorted(means, key=lambda row: row["ratio"])
