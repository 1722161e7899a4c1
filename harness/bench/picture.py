"""A picture of the step by part, with its floor and the peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PARTS = {
    "select_ms": "encode and select",
    "decode_ms": "decode, loss, dz",
    "backward_ms": "weight gradients",
    "optimizer_ms": "optimiser",
    "other_ms": "rest",
}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Horizontal bars in units of the encoder product alone, one panel per shape; `path` says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(results), 1, figsize=(8, 2.2 * len(results) + 0.6), squeeze=False)
    for panel, result in zip(panels[:, 0], results, strict=True):
        product = result["gemm_ms_shape"]
        total = sum(result[part] for part in PARTS)
        left = 0.0
        for part, label in PARTS.items():
            # the parts are timed in a step of their own; shown as shares of the undisturbed one
            width = result["step_ms"] * result[part] / total / product
            panel.barh("ours", width, left=left, label=label)
            left += width
        for name, peer in result["peers"].items():
            panel.barh(name, peer["step_ms"] / product, color="0.75")
        panel.axvline(result["floor_ms"] / product, color="k", linestyle="--", linewidth=1, label="floor")
        panel.invert_yaxis()
        panel.set_title(
            f"{result['shape']}: d={result['d']}, n={result['n']}, k={result['k']}, batch {result['batch']}, "
            f"E={result['n_experts']}, {result['precision']}",
            fontsize=9,
        )
        panel.set_xlabel("time of a step / time of the encoder product alone", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
