"""The table of cells, one row per run, for the report and for the terminal."""

from __future__ import annotations

import math
from typing import Any

from analysis.runs.populations import differing
from analysis.runs.table import RunTable
from harness.terminal import table


def cell_rows(runs: RunTable) -> list[dict[str, Any]]:
    """One row per usable run, sorted by architecture, k, n, seed; missing values are None."""
    frame = runs.frame
    keys = [name for name in ("sae", "n_experts", "k", "n_latents", "seed") if name in frame]
    if "sae" in frame:
        frame = frame.assign(_order=frame["sae"] != "topk")
        keys = ["_order", *keys]
    apart = differing(runs)
    rows = []
    for _, row in frame.sort_values(keys, kind="stable").iterrows():
        rows.append(
            {
                "sae": row.get("sae", ""),
                "n": row.get("n_latents"),
                "k": row.get("k"),
                "experts": _plain(row.get("n_experts")),
                "seed": _plain(row.get("seed")),
                "tokens": _plain(row.get("tokens")),
                "fvu": _plain(row.get("fvu")),
                "se": _plain(row.get("fvu_se")),
                "l0": _plain(row.get("l0")),
                "dead": _plain(row.get("dead_frac")),
                "flops": _plain(row.get("flops")),
                "wall_s": _plain(row.get("wall_s")),
                "speed": _plain(row.get("tokens_per_s")),
                "converged": row.get("converged"),
                "differs": ", ".join(f"{key}={row[key]}" for key in apart),
                "run": str(row[runs.roles["run"]]),
            }
        )
    return rows


def cell_text(runs: RunTable, limit: int = 40) -> str:
    """The runs as a table for standard output: at most `limit` rows, the number of further ones, what was left out."""
    head = ("sae", "n", "k", "E", "seed", "tokens", "fvu", "±se", "l0", "dead %", "time")
    rows = cell_rows(runs)
    apart = any(row["differs"] for row in rows)
    shown = [
        (
            str(row["sae"]),
            _cell(row["n"], ",.0f"),
            _cell(row["k"], "g"),
            _cell(row["experts"], "g"),
            _cell(row["seed"], "g"),
            _cell(row["tokens"], ",.0f"),
            _cell(row["fvu"], ".4f"),
            _cell(row["se"], ".4f"),
            _cell(row["l0"], ".1f"),
            _cell(None if row["dead"] is None else 100 * row["dead"], ".1f"),
            _cell(row["wall_s"], ".0f", " s"),
            *([row["differs"]] if apart else []),
        )
        for row in rows[:limit]
    ]
    head = (*head, "differs") if apart else head
    text = [table(head, shown, left=("differs",), optional=("time", "dead %", "l0"))]
    if len(rows) > limit:
        text.append(f"… and {len(rows) - limit} more runs (all in the report)")
    for reason, count in runs.excluded["reason"].value_counts().items():
        text.append(f"left out: {count} × {reason}")
    return "\n".join(text)


def _plain(value: Any) -> float | None:
    """A finite float or None."""
    try:
        plain = float(value)
    except (TypeError, ValueError):
        return None
    return plain if math.isfinite(plain) else None


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
