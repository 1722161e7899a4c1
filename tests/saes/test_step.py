"""The hand-written step against dense autograd: forward, loss and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.parallel import Solo
from harness.saes import Sae, find_dead, step
from tests.ops.sets import kernel_set
from tests.saes.dense import dense_loss
from tests.training.members import runtime


def random_params(sae: Sae, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {"W_enc": draw(sae.n_latents, sae.d_model), "W_dec": draw(sae.n_latents, sae.d_model)}
    params["W_dec"] /= params["W_dec"].norm(dim=1, keepdim=True)
    if sae.enc_bias:
        params["b_enc"] = 0.3 * draw(sae.n_latents)
    params["b_dec"] = 0.2 * draw(sae.d_model)
    if sae.routed:
        params |= {"W_r": draw(sae.n_experts, sae.d_model), "b_r": 0.1 * draw(sae.d_model)}
    return params


def assert_equal_to_autograd(stats, grads, leaves, expected, tolerance: float) -> None:
    """Losses, active latents and every gradient of a step, against `expected` and the gradients of its loss."""
    expected["loss"].backward()
    for name in ("loss", "fvu", "aux_loss"):
        torch.testing.assert_close(getattr(stats, name), expected[name].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(stats.fired, (expected["z"] > 0).sum(dim=0))
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(
            grads[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_step_equals_dense(sae: Sae, params, x, silent, ops_name="reference", tolerance=1e-9) -> None:
    ops = kernel_set(ops_name)
    dead = find_dead(sae, silent >= 10, Solo(), ops)
    grads = {name: torch.full_like(value, torch.nan) for name, value in params.items()}
    grads.setdefault("b_enc", torch.full((sae.n_latents,), torch.nan, dtype=x.dtype))
    stats = step(sae, params, params, x, runtime(Solo(), ops), dead, grads)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    expected = dense_loss(
        leaves,
        x,
        k=sae.k,
        n_experts=sae.n_experts,
        variance=sae.variance,
        aux_alpha=sae.aux_alpha,
        aux_k=sae.aux_k,
        dead=silent >= 10,
        balance_weight=sae.balance_weight,
    )
    assert_equal_to_autograd(stats, grads, leaves, expected, tolerance)
    if sae.routed:
        torch.testing.assert_close(stats.balance, expected["balance"].detach(), rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw) -> tuple[Sae, int, int, float]:
    experts = draw(st.sampled_from([1, 1, 2, 3, 8]))
    routed = experts > 1 or draw(st.booleans())
    width = draw(st.integers(1, 24))
    k = draw(st.one_of(st.just(1), st.just(width), st.integers(1, width)))
    sae = Sae(
        architecture="switch" if routed else "topk",
        d_model=draw(st.integers(1, 12)),
        n_latents=width * experts,
        k=k,
        n_experts=experts,
        enc_bias=draw(st.booleans()),
        variance=draw(st.floats(0.1, 50)),
        aux_alpha=draw(st.sampled_from([0.0, 1 / 32, 1.0])),
        aux_k=draw(st.integers(1, 20)),
        balance_weight=draw(st.sampled_from([0.0, 0.3])) if routed else 0.0,
    )
    return sae, draw(st.integers(1, 30)), draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.3, 1.0]))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_step_equals_dense_autograd(case: tuple[Sae, int, int, float]) -> None:
    sae, tokens, seed, dead_share = case
    generator = torch.Generator().manual_seed(seed)
    params = random_params(sae, generator)
    x = torch.randn(tokens, sae.d_model, generator=generator, dtype=torch.float64)
    silent = torch.where(torch.rand(sae.n_latents, generator=generator) < dead_share, 20, 0)
    assert_step_equals_dense(sae, params, x, silent)


@pytest.mark.parametrize("routed", [False, True])
def test_ties_and_duplicates_go_to_the_lowest_latent(routed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    sae = Sae(
        "switch" if routed else "topk", 6, 32, 3, 4 if routed else 1, True, 2.0, 1 / 32, 5, 0.1 if routed else 0.0
    )
    params = random_params(sae, generator)
    for name in ("W_enc", "b_enc"):
        params[name] = params[name][torch.arange(32) // 4 * 4]
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x[10:20] = x[10]
    assert_step_equals_dense(sae, params, x, torch.where(torch.arange(32) % 3 == 0, 20, 0))


def test_an_expert_without_tokens_gets_no_gradient_but_the_others_do() -> None:
    generator = torch.Generator().manual_seed(5)
    sae = Sae("switch", 4, 24, 2, 3, True, 1.0, 1 / 32, 4, 0.3)
    params = random_params(sae, generator)
    params["W_r"].zero_()
    params["W_r"][1] = torch.tensor([9.0, 0, 0, 0])
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 1
    assert_step_equals_dense(sae, params, x, torch.full((24,), 20))
