"""Compiles every Triton kernel for an H200 (compute capability 9.0) on a machine without a GPU; nothing is launched.

`python -m tests.ops.compile_for_hopper` prints one JSON object: kernel → number of variants, whether one uses the
matrix units, and the most registers, bytes of stack (spills) and bytes of shared memory of a variant.
Not in the interpreter: TRITON_INTERPRET must not be 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from harness.bench.gpu.kernels import EXTREMES
from harness.ops import AdamState, Codes, Hyper, is_whole
from harness.ops.sizes import MOST_PICKED, padded
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
    ops.centred(x, torch.arange(tokens), torch.zeros(d), dtype)
    ops.centred(x, None, torch.zeros(d), dtype)
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


def compile_dense() -> None:
    """The products of Switch at S3's sizes: with and without descriptors, several blocks of tokens, both precisions."""
    from harness.ops.triton import grouped, products

    descriptors, tile_bytes = grouped.DESCRIPTORS, products.TILE_BYTES
    for experts in (8, 32):
        for described in (False, True):
            grouped.DESCRIPTORS = described
            compile_all(768, 32768, 64, 64, experts, torch.bfloat16)
    products.TILE_BYTES = 1 << 17
    compile_all(768, 32768, 64, 64, 32, torch.bfloat16)
    grouped.DESCRIPTORS, products.TILE_BYTES = descriptors, tile_bytes
    compile_all(768, 2048, 32, 24, 4, torch.float32)


def compile_auxk(experts: int, dtype: torch.dtype) -> None:
    """The choice that stays a matrix, and the products from it, as of 5 % dead latents at S1 and S3."""
    from harness.ops import triton as ops

    tokens, d, rows = 24, 768, 256 * experts
    groups, x, weight = even_groups(tokens, rows, experts), torch.zeros(tokens, d), torch.zeros(rows, d, dtype=dtype)
    codes = ops.select(x.to(dtype), weight, torch.zeros(rows), 64, groups, ordered=False)
    assert is_whole(codes.index)
    for scale in (None, torch.ones(tokens)):
        residual, dz, _ = ops.reconstruct(codes, weight, x, scale, groups)
    ops.weight_grads(
        codes, dz, x.to(dtype), residual, groups, (torch.zeros(rows, d), x.new_zeros(rows, d), x.new_zeros(rows))
    )


def resources(binary: Any) -> tuple[int, int]:
    """(registers of a thread, bytes of stack of a thread): a kernel that spills has a stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK"))
    return registers, stack


def main() -> None:
    driver.set_active(Absent())  # type: ignore[arg-type]
    kernels: dict[str, dict[str, Any]] = {}

    def launch(kernel: JITFunction, grid: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> None:
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            assert binary is not None
            registers, stack = resources(binary)
            seen = kernels.setdefault(
                kernel.fn.__name__, {"variants": 0, "matrix_units": False, "registers": 0, "stack": 0, "shared": 0}
            )
            seen["variants"] += 1
            seen["matrix_units"] |= "wgmma" in binary.asm["ptx"]
            for name, value in (("registers", registers), ("stack", stack), ("shared", binary.metadata.shared)):
                seen[name] = max(seen[name], value)

        return compiled

    JITFunction.__getitem__ = launch  # type: ignore[method-assign]
    from harness.ops.triton.selection import keep_positive, select_preactivations

    for width, k, tokens in EXTREMES:
        for dtype in (torch.bfloat16, torch.float32):
            select_preactivations(torch.zeros(min(tokens, 2), width, dtype=dtype), k)
            if padded(width) <= MOST_PICKED:
                keep_positive(torch.zeros(2, padded(width), dtype=dtype)[:, :width], k)
    for dtype in (torch.bfloat16, torch.float32):
        compile_all(768, 8192, 32, 24, 1, dtype)
    compile_all(768, 2048, 32, 24, 4, torch.bfloat16)
    compile_dense()
    for experts, dtype in ((1, torch.bfloat16), (8, torch.bfloat16), (8, torch.float32)):
        compile_auxk(experts, dtype)
    compile_all(4096, 8192, 64, 16, 1, torch.bfloat16)
    compile_all(2688, 8192, 32, 16, 1, torch.bfloat16)
    # numbers equal to 1 become constants of the compiled kernel
    compile_all(1, 500, 1, 1, 1, torch.float32)
    compile_all(33, 40, 1, 300, 4, torch.bfloat16)
    compile_all(33, 40, 1, 300, 4, torch.float32)
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
