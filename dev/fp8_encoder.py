"""What an encoder product in FP8 would cost in fvu: `python -m dev.fp8_encoder KEY=VALUE…` (those of `harness.launch`).

Trains every cell twice on the CPU in bfloat16, as it is and with the operands of the encoder's product rounded to FP8
(e4m3, a power of two as the scale of each token and of each latent). Products of such numbers are exact in bfloat16, so
this is the product of the matrix units but for the order of its sums. Gradients, and everything else, stay as they are;
evaluations are in float32. Prints fvu and their ratio.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from harness.launch import main as launch
from harness.ops import Ops
from harness.process.runtime import Runtime
from harness.saes import step
from harness.terminal import table

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Every row rounded to e4m3 numbers times a power of two of its own."""
    largest = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=2.0**-100)
    scale = torch.exp2(torch.floor(torch.log2(LARGEST / largest)))
    return ((rows.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(rows.dtype)


class Fp8Encoder:
    """A kernel set whose selections are from rounded operands."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name not in ("select", "select_with_subset"):
            return operation
        return lambda x, W_enc, *others, **named: operation(rounded(x), rounded(W_enc), *others, **named)


def step_in_fp8(sae: Any, params: Any, compute: Any, x: Tensor, runtime: Runtime, *others: Any, **named: Any) -> Any:
    inside = Runtime(runtime.device, runtime.shards, Fp8Encoder(runtime.ops), runtime.stop)  # pyright: ignore[reportArgumentType]
    return step(sae, params, compute, x, inside, *others, **named)


def results(sweep: Path) -> dict[str, float]:
    """Run → fvu."""
    found = {path.parent.name: json.loads(path.read_text())["fvu"] for path in sorted(sweep.glob("*/result.json"))}
    if not found:
        sys.exit(f"no run has ended in {sweep}")
    return found


def main() -> None:
    overrides = [*sys.argv[1:], "cluster=local", "train.device=cpu", "train.precision=bf16", "tracker=none"]
    out = Path(next((word.removeprefix("out=") for word in overrides if word.startswith("out=")), "runs"))
    code = launch([*overrides, "sweep=bf16"])
    with patch("harness.training.state.step", step_in_fp8):
        code = code or launch([*overrides, "sweep=fp8"])
    if code:
        sys.exit(code)
    plain, low = results(out / "bf16"), results(out / "fp8")
    rows = [[name, f"{fvu:.5f}", f"{low[name]:.5f}", f"{low[name] / fvu:.4f}"] for name, fvu in plain.items()]
    print(table(("run", "fvu, bf16", "fvu, FP8 encoder", "ratio"), rows, left=("run",)))


if __name__ == "__main__":
    main()
