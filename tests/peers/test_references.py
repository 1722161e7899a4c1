"""The written-down peers compute our step, so that the bench compares equal work."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.bench.command import installed_peers
from harness.bench.measure import measure, write_data
from harness.bench.ours import Contender
from harness.bench.peer_worker import Build
from harness.bench.shapes import Shape
from tests.ops.sets import kernel_set
from tests.peers import bionemo_like, flashsae_like, sparse_decoder

TOPK, SWITCH = Shape("topk", 24, 96, 5, 64), Shape("switch", 24, 96, 5, 64, 4)
SETTINGS: dict[str, Any] = {
    "precision": "fp32", "ops": "reference", "device": "cpu", "threads": 1, "clock": "wall", "dead": 0.0,
}  # fmt: skip
CASES = pytest.mark.parametrize(
    ("build", "shape"),
    [(bionemo_like.build, TOPK), (bionemo_like.build, SWITCH), (flashsae_like.build, TOPK)],
    ids=["bionemo topk", "bionemo moe", "flashsae"],
)


@CASES
def test_gradients_are_ours(build: Build, shape: Shape, tmp_path: Path) -> None:
    write_data(shape, tmp_path / "data")
    task = SETTINGS | {"data": str(tmp_path / "data"), "d": shape.d, "n": shape.n, "k": shape.k}
    ours = Contender(task | {"experts": shape.experts}, load_file(tmp_path / "data"))
    ours.gradients(ours.ops)
    gradients, _, weight_grads = build(load_file(tmp_path / "data"), shape.k, False)
    for _ in range(2):  # the second time replaces the first
        gradients()
    assert {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(weight_grads())
    for name, gradient in weight_grads().items():
        expected = ours.optimizer.grads[name]
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5, name


@CASES
def test_a_step_runs_under_autocast(build: Build, shape: Shape, tmp_path: Path) -> None:
    """In bf16 a few tokens select other latents, so the gradients are near, not equal."""
    write_data(shape, tmp_path / "data")
    gradients, whole, weight_grads = build(load_file(tmp_path / "data"), shape.k, False)
    gradients()
    exact = {name: gradient.clone() for name, gradient in weight_grads().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients()
        for name, gradient in weight_grads().items():
            assert gradient.dtype is torch.float32
            assert float((gradient - exact[name]).norm() / exact[name].norm()) < 0.3, name
        whole()


@CASES
def test_a_whole_step_moves_the_weights_and_keeps_unit_rows(build: Build, shape: Shape, tmp_path: Path) -> None:
    write_data(shape, tmp_path / "data")
    data = load_file(tmp_path / "data")
    _, whole, weight_grads = build(data, shape.k, True)
    whole()
    # the gradient was projected on the tangent of the rows that the step began with
    along = (weight_grads()["W_dec"] * data["W_dec"]).sum(dim=1)
    assert float(along.abs().max()) < 1e-6
    before = weight_grads()["W_enc"].clone()
    whole()
    assert not torch.equal(before, weight_grads()["W_enc"])


@pytest.mark.slow
def test_the_bench_runs_them_from_a_checkout() -> None:
    peers = installed_peers(Path(sys.executable), ["bionemo_like", "flashsae_like"])
    assert list(peers) == ["bionemo_like", "flashsae_like"]
    for shape, names in ((TOPK, {"bionemo_like", "flashsae_like"}), (SWITCH, {"bionemo_like"})):
        result = measure(shape, peers, SETTINGS, 1)
        assert set(result["peers"]) == names | {f"{name}_steel" for name in names}
        for peer in result["peers"].values():
            assert peer["gradient_difference"] < 1e-5 and peer["step_ms"] > 0 and peer["version"] == "checkout"


@pytest.mark.parametrize(("tokens", "k", "rows", "d"), [(9, 4, 40, 20), (3, 1, 8, 1), (2, 2, 5, 1030)])
def test_the_decoder_kernels_are_the_plain_sums(tokens: int, k: int, rows: int, d: int) -> None:
    """In the interpreter, or compiled on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        kernel_set("triton")  # skips where no kernel can run
    kernels = importlib.import_module("tests.peers.sparse_decoder_kernels")
    random = torch.Generator().manual_seed(0)
    values, gradient = torch.randn(tokens, k, generator=random).relu(), torch.randn(tokens, d, generator=random)
    index = torch.randint(rows, (tokens, k), generator=random)
    weight = torch.randn(rows, d, generator=random)
    for name, given in {
        "decode": (values, index, weight),
        "token_gradients": (gradient, index, weight),
        "weight_gradient": (values, index, gradient, rows),
    }.items():
        moved = [part.to(device) if isinstance(part, torch.Tensor) else part for part in given]
        torch.testing.assert_close(getattr(kernels, name)(*moved).cpu(), getattr(sparse_decoder, name)(*given))
