"""The whole step, AuxK included, on every kernel set in float32: against dense autograd, and bit for bit twice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.config import TrainConfig
from harness.ops import choose_ops
from harness.parallel import Solo
from harness.saes import Sae, find_dead, step
from harness.saes.step import forward
from harness.training.optimizer import Optimizer
from tests.ops.sets import FAST, KERNELS, kernel_set
from tests.saes.test_step import assert_step_equals_dense, random_params
from tests.training.members import runtime

CASES = {
    "sparse": Sae("topk", 24, 640, 4, 1, True, 2.0, 1 / 32, 12, 0.0),
    "dense": Sae("topk", 24, 64, 16, 1, True, 2.0, 1 / 32, 12, 0.0),
    "no bias": Sae("topk", 3, 500, 1, 1, False, 0.7, 1.0, 200, 0.0),
    "switch": Sae("switch", 24, 640, 4, 4, True, 2.0, 1 / 32, 12, 0.3),
    "narrow experts": Sae("switch", 24, 64, 4, 8, False, 2.0, 1 / 32, 3, 0.3),
}


INTERPRETED_LATENTS = {"sparse": 160, "no bias": 80, "switch": 400}
"""Fewer, which take the same paths, for kernels in the interpreter."""


def case(name: str, kernels: str) -> tuple[Sae, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    sae, generator = CASES[name], torch.Generator().manual_seed(17)
    if kernels == "triton":
        sae = dataclasses.replace(sae, n_latents=INTERPRETED_LATENTS.get(name, sae.n_latents))
    params = {key: value.float() for key, value in random_params(sae, generator).items()}
    x = torch.randn(12 if kernels == "triton" else 300, sae.d_model, generator=generator)
    silent = torch.where(torch.rand(sae.n_latents, generator=generator) < 0.3, 20, 0)
    return sae, params, x, silent


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_step_equals_dense_autograd(kernels: str, name: str) -> None:
    sae, params, x, silent = case(name, kernels)
    assert_step_equals_dense(sae, params, x, silent, kernels, tolerance=2e-4)


@pytest.mark.parametrize("kernels", KERNELS)
def test_float64_is_as_exact_as_the_reference(kernels: str) -> None:
    sae, params, x, silent = case("switch", kernels)
    params = {key: value.double() for key, value in params.items()}
    assert_step_equals_dense(sae, params, x.double(), silent, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_step_gives_the_same_bits_twice(kernels: str, name: str) -> None:
    sae, params, x, silent = case(name, kernels)
    ops, runs = kernel_set(kernels), []
    dead = find_dead(sae, silent >= 10, Solo(), ops)
    for _ in range(2):
        grads = {key: torch.full_like(value, torch.nan) for key, value in params.items()}
        grads.setdefault("b_enc", torch.full((sae.n_latents,), torch.nan))
        stats = step(sae, params, params, x, runtime(Solo(), ops), dead, grads)
        runs.append([stats.loss, stats.fired, *grads.values()])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["sparse", "dense", "switch"])
def test_bfloat16_copies_give_the_reference_s_step(kernels: str, name: str) -> None:
    """Master weights and gradients in float32, products of bfloat16 numbers. Powers of two keep pre-activations exact
    in bfloat16, so that both sets select the same latents."""
    sae, params, x, silent = case(name, kernels)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-2, 3, x.shape, generator=generator).float()
    params["b_dec"].zero_()
    params["W_enc"] = torch.randint(-1, 2, params["W_enc"].shape, generator=generator).float()
    if sae.enc_bias:
        params["b_enc"] = torch.randint(-2, 3, (sae.n_latents,), generator=generator).float()
    compute = {key: params[key].bfloat16() for key in ("W_enc", "W_dec")}
    actual, expected = (
        {key: torch.full_like(value, torch.nan) for key, value in params.items()}
        | {"b_enc": torch.full((sae.n_latents,), torch.nan)}
        for _ in range(2)
    )
    (stats, expected_stats) = (
        step(sae, params, compute, x, runtime(Solo(), ops), find_dead(sae, silent >= 10, Solo(), ops), grads)
        for ops, grads in ((kernel_set(kernels), actual), (choose_ops("reference"), expected))
    )
    assert torch.equal(stats.fired, expected_stats.fired)
    torch.testing.assert_close(stats.loss, expected_stats.loss)
    # dense products of the Triton kernels take gradients in bfloat16 too
    tolerance = 1e-4 if kernels == "cpu" else 2e-2
    for key, grad in expected.items():
        torch.testing.assert_close(
            actual[key], grad, rtol=tolerance, atol=tolerance * max(1.0, float(grad.abs().max()))
        )


@pytest.mark.slow
@pytest.mark.parametrize("kernels", FAST)
def test_bfloat16_trains_to_the_same_fvu(kernels: str) -> None:
    """500 steps on sparse combinations of known directions: within 0.5 % of float32."""
    sae = Sae("topk", 64, 512, 8, 1, True, 8.0, 1 / 32, 32, 0.0)
    directions = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=1, keepdim=True)

    def batch(seed: int, tokens: int = 512) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(256, (tokens, 8), generator=generator)
        return (torch.rand(tokens, 8, 1, generator=generator) * directions[index]).sum(dim=1)

    fvu = {}
    for dtype in (torch.float32, torch.bfloat16):
        params = {key: value.float() for key, value in random_params(sae, torch.Generator().manual_seed(2)).items()}
        params["W_enc"] = params["W_dec"].clone()
        params["b_enc"].zero_()
        params["b_dec"].zero_()
        ops = kernel_set(kernels)
        optimizer = Optimizer(sae, params, TrainConfig(tokens=1e6), dtype)
        for number in range(500):
            stats = step(sae, params, optimizer.compute, batch(number), runtime(Solo(), ops), None, optimizer.grads)
            optimizer.apply(1e-3, number + 1, stats.loss.isfinite(), runtime(Solo(), ops))
        held_out = batch(10_000, 8192)
        variance = (held_out - held_out.mean(dim=0)).square().sum()
        fvu[dtype] = float(
            forward(sae, params, optimizer.compute, held_out, runtime(Solo(), ops)).squared.sum() / variance
        )
    assert fvu[torch.float32] < 0.45
    assert fvu[torch.bfloat16] == pytest.approx(fvu[torch.float32], rel=0.005)
