"""Compiles every Triton kernel for an H200 (compute capability 9.0) on a machine without a GPU; nothing is launched.

`python -m tests.ops.compile_for_hopper` prints one JSON object: kernel → how many variants, and which use the matrix
units. Not in the interpreter: TRITON_INTERPRET must not be 1.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from harness.ops import AdamState, Codes, Hyper
from tests.ops.test_kernels import even_groups


class Absent:
    """Stands for the driver of a GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_all(d: int, rows: int, k: int, tokens: int, experts: int, dtype: torch.dtype) -> None:
    """Call every operation once on these sizes; what the kernels would have written is not looked at."""
    from harness.ops import triton as ops

    groups = even_groups(tokens, rows, experts)
    x, weight, bias = torch.zeros(tokens, d), torch.zeros(rows, d, dtype=dtype), torch.zeros(rows)
    ops.select(x.to(dtype), weight, bias, k, groups)
    index = torch.zeros((tokens, k), dtype=torch.int64)
    for span, own in groups.spans:
        index[span] = own.start
    codes = Codes(torch.zeros(tokens, k), index)
    ops.reconstruct(codes, weight, x, torch.ones(tokens), groups)
    ops.reconstruct(codes, weight, x, None, groups, lambda partial: partial)
    out = torch.zeros(rows, d), torch.zeros(rows, d), torch.zeros(rows)
    ops.weight_grads(codes, codes.values, x.to(dtype), x, groups, out)
    param = torch.zeros(rows, d)
    ok, state = torch.tensor(True), AdamState(param, param)
    copy = weight if dtype is torch.bfloat16 else None
    ops.update(param, param, state, Hyper(1e-3, 0.9, 0.999, 1e-8, 3, None, True, True), ok, copy)
    rated = Hyper(1e-3, 0.9, 0.999, 1e-8, 3, torch.tensor(1.0), rates=torch.zeros(2))
    ops.update(bias, bias, AdamState(bias, bias), rated, ok)
    ops.project(param, param)


def main() -> None:
    driver.set_active(Absent())  # type: ignore[arg-type]
    variants: dict[str, list[bool]] = {}

    def launch(kernel: JITFunction, grid: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> None:
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            assert binary is not None
            variants.setdefault(kernel.fn.__name__, []).append("wgmma" in binary.asm["ptx"])

        return compiled

    JITFunction.__getitem__ = launch  # type: ignore[method-assign]
    for dtype in (torch.bfloat16, torch.float32):
        compile_all(768, 8192, 32, 24, 1, dtype)
    compile_all(768, 2048, 32, 24, 4, torch.bfloat16)
    compile_all(4096, 4096, 16, 16, 1, torch.bfloat16)
    # numbers equal to 1 become constants of the compiled kernel
    compile_all(1, 500, 1, 1, 1, torch.float32)
    compile_all(33, 40, 1, 300, 4, torch.bfloat16)
    print(json.dumps({name: {"variants": len(uses), "matrix_units": any(uses)} for name, uses in variants.items()}))


if __name__ == "__main__":
    main()
