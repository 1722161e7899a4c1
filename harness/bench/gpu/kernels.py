"""The kernels compiled: every size is launched and compared; then their tests."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.bench.gpu.setting import Setting
from harness.ops import Codes, Groups, reference
from harness.ops.sizes import MOST_PICKED, padded

EXTREMES = [(2_097_152, 512, 8), (2_097_152, 32, 8), (1_048_576, 128, 16), (131_072, 64, 64), (129_024, 32, 64)]
EXTREMES += [(32_768, 32, 512), (1_638, 384, 64), (6_553, 2048, 16), (8_192, 4096, 4), (512, 1, 64)]
"""(pre-activations, k, rows): the shapes of the studies, of AuxK, and the edges of the layout."""


def kernels(setting: Setting) -> None:
    """Every size is launched; then the tests of the kernels, compiled."""
    failed: list[str] = []
    sizes = [(300, 4, 5), (700, 64, 2)] if setting.dry else EXTREMES
    for width, k, tokens in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"selection of {k} among {width} in {dtype}"
            with noted(failed, name):
                rows = awkward_rows(tokens, width, setting.device).to(dtype)
                found, expected = setting.ops.select_preactivations(rows, k), stable_top_k(rows, k)
                same = torch.equal(found.values.nan_to_num(), expected.values.nan_to_num())
                if not same or not torch.equal(found.index, expected.index):
                    failed.append(f"{name}: other latents than a stable sort")
                if padded(width) <= MOST_PICKED and not torch.equal(kept(rows, k), positive(expected, width).to(dtype)):
                    failed.append(f"{name}: another matrix than a stable sort")
    products = [(16, 96, 4, 1)] if setting.dry else PRODUCTS
    for d, rows, k, experts in products:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"products at d={d}, n={rows}, k={k}, {experts} experts in {dtype}"
            with noted(failed, name):
                distance = product_distance(setting, d, rows, k, experts, dtype)
                if not distance < (2e-2 if dtype is torch.bfloat16 else 1e-4):
                    failed.append(f"{name}: relative distance to float64 {distance:.1e}")
    setting.record("kernels.sizes", {"launched": 2 * (len(sizes) + len(products)), "failed": failed})
    if not setting.dry:
        setting.record("kernels.tests", run_tests(setting))


PRODUCTS = [(768, 4096, 32, 1), (2688, 4096, 32, 1), (4096, 8192, 64, 1), (768, 8192, 32, 8), (768, 2048, 384, 1)]
"""(d, latents, k, experts): gathers, cuBLAS on few latents, groups."""


@contextlib.contextmanager
def noted(failed: list[str], name: str) -> Iterator[None]:
    """An exception becomes a line of `failed`: the next size may run."""
    try:
        yield
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")


def awkward_rows(tokens: int, width: int, device: torch.device) -> Tensor:
    """Gaussian rows; the first few have NaN, infinities, zeros of both signs, few distinct numbers, or none above 0."""
    rows = torch.randn(tokens, width, device=device)
    changes = [
        lambda row: row[::7].fill_(torch.nan),
        lambda row: row[1::5].fill_(-torch.nan),
        lambda row: row[::3].fill_(-torch.inf),
        lambda row: row.sign_().mul_(0.0),
        lambda row: row.round_(),
        lambda row: row.clamp_(max=-1.0),
        lambda row: row.fill_(-torch.inf),
    ]
    for row, change in zip(rows[1:], changes, strict=False):
        change(row)
    return rows


def stable_top_k(rows: Tensor, k: int) -> Codes:
    """The k largest by a stable sort: slow, and plainly right. All NaN are equal, and largest."""
    values, index = rows.float().nan_to_num(torch.nan, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True)
    return Codes(values[:, :k], index[:, :k])


def kept(rows: Tensor, k: int) -> Tensor:
    """What AuxK keeps of these rows; NaN as −1."""
    from harness.ops.triton.dense import aligned_rows
    from harness.ops.triton.selection import keep_positive

    matrix = aligned_rows(rows.shape[0], rows.shape[1], rows.dtype, rows.device)
    matrix.copy_(rows)
    keep_positive(matrix, k)
    return matrix.nan_to_num(-1.0, torch.inf)


def positive(codes: Codes, width: int) -> Tensor:
    """The positive values of codes as a matrix; NaN as −1."""
    values = codes.values.clamp(min=0).nan_to_num(-1.0, torch.inf)  # a NaN stays one under clamp
    return values.new_zeros(values.shape[0], width).scatter_(1, codes.index, values)


def product_distance(setting: Setting, d: int, n: int, k: int, experts: int, dtype: torch.dtype) -> float:
    """Largest relative distance (Frobenius) of residual, dz and gradients to the reference in float64."""
    tokens, ops = 256, setting.ops
    generator = torch.Generator(setting.device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=setting.device)

    offsets = torch.arange(experts + 1, device=setting.device) * tokens // experts
    groups = Groups(offsets, tuple(n * g // experts for g in range(experts + 1)))
    x, weight = draw(tokens, d).to(dtype), (draw(n, d) / d**0.5).to(dtype)
    codes = ops.select(x, weight, None, k, groups)
    codes = Codes(codes.values.relu(), codes.index)
    results = []
    for kernels, width in ((ops, torch.float32), (reference, torch.float64)):
        exact = kernels is reference
        W, y = (weight.double(), x.double()) if exact else (weight, x)
        own = Codes(codes.values.to(width), codes.index)
        residual, dz, _ = kernels.reconstruct(own, W, y, None, groups)
        empty = functools.partial(torch.full, fill_value=torch.nan, device=setting.device, dtype=width)
        grads = empty((n, d)), empty((n, d)), empty((n,))
        kernels.weight_grads(own, dz, y, residual, groups, grads)
        results.append([residual, dz, *grads])
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def run_tests(setting: Setting) -> dict[str, Any] | str:
    """The tests marked `gpu`, in processes of their own, side by side where pytest-xdist is installed."""
    if not Path("tests/ops").is_dir():
        return "not run: this is no checkout with tests"
    workers = ["-n", "12", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *workers]
    done = subprocess.run([*command, "tests/ops", "tests/training/test_syncs.py"], capture_output=True, text=True)
    (setting.out / "tests.txt").write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "failed": failed}
