"""Every architecture of the catalogue against its dense autograd reference, and what must hold for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.architectures import ARCHITECTURES
from harness.parallel import Solo
from harness.saes import Params, Sae, find_dead, step
from harness.saes.batchtopk import prefix_ends
from harness.saes.catalogue import ACTIVATIONS
from harness.saes.step import forward
from tests.ops.sets import FAST, kernel_set
from tests.saes.dense_catalogue import catalogue_loss
from tests.saes.test_step import assert_equal_to_autograd
from tests.training.members import runtime

NEW = [name for name in ARCHITECTURES if name not in ("topk", "switch")]
PENALISED = [name for name in NEW if ARCHITECTURES[name].penalty]


def test_every_name_has_an_activation() -> None:
    assert list(ACTIVATIONS) == list(ARCHITECTURES)


def make_sae(name: str, d_model: int = 6, n_latents: int = 32, k: int = 3, **settings: object) -> Sae:
    traits = ARCHITECTURES[name]
    aux = 1 / 32 if not traits.penalty else 0.0
    sae = Sae(name, d_model, n_latents, k if not traits.penalty else 0, 1, True, 2.0, aux, 5, 0.0)
    return dataclasses.replace(
        sae, prefixes=(0.1, 0.4, 1.0), bandwidth=0.6, threshold_init=0.5, preactivation_penalty=0.02, **settings
    )


def random_params(sae: Sae, generator: torch.Generator) -> Params:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {name: draw(*sae.shape(name)) for name in sae.layout()}
    if sae.traits.unit_decoder:
        params["W_dec"] /= params["W_dec"].norm(dim=1, keepdim=True)
    for name in ("b_enc", "b_dec", "r_mag", "b_mag", "log_threshold"):
        if name in params:
            params[name] *= 0.3
    if "threshold" in params:
        params["threshold"] = params["threshold"].abs()
    return params


def assert_step_equals_dense(sae, params, x, silent, ops_name="reference", tolerance=1e-9, sparsity=0.07, done=3):  # type: ignore[no-untyped-def]
    ops = kernel_set(ops_name)
    dead = find_dead(sae, silent >= 10, Solo(), ops)
    grads = {name: torch.full_like(value, torch.nan) for name, value in params.items()}
    grads |= {"threshold": torch.zeros(1, dtype=x.dtype)} if "threshold" in params else {}
    before = {name: value.clone() for name, value in params.items()}
    stats = step(sae, params, params, x, runtime(Solo(), ops), dead, grads, sparsity=sparsity, done=done)

    leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
    expected = catalogue_loss(
        leaves,
        x,
        architecture=sae.architecture,
        k=sae.k,
        variance=sae.variance,
        sparsity=sparsity,
        aux_alpha=sae.aux_alpha,
        aux_k=sae.aux_k,
        dead=silent >= 10,
        prefixes=tuple(prefix_ends(sae)),
        bandwidth=sae.bandwidth,
        preactivation_penalty=sae.preactivation_penalty,
        prolu=sae.prolu,
    )
    # where residuals hardly differ, AuxK's denominator is a small difference of large sums, and AuxK itself is large
    assert_equal_to_autograd(
        stats, grads, leaves, expected, max(tolerance, 1e-14 * float(expected["aux_loss"].detach()))
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sae, int, int, float, float]:
    name = draw(st.sampled_from(NEW))
    width = draw(st.integers(1, 24))
    k = draw(st.one_of(st.just(1), st.just(width), st.integers(1, width)))
    rule = draw(st.sampled_from(["ste", "relu"]))
    sae = make_sae(name, draw(st.integers(1, 10)), width, k, prolu=rule)
    # everything, nothing or something is active
    shift = draw(st.sampled_from([0.0, 0.0, -50.0, 50.0]))
    return sae, draw(st.integers(1, 20)), draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.3, 1.0])), shift


@settings(max_examples=400, deadline=None)
@given(cases())
def test_step_equals_dense_autograd(case: tuple[Sae, int, int, float, float]) -> None:
    sae, tokens, seed, dead_share, shift = case
    generator = torch.Generator().manual_seed(seed)
    params = random_params(sae, generator)
    params["b_enc"] += shift
    x = torch.randn(tokens, sae.d_model, generator=generator, dtype=torch.float64)
    silent = torch.where(torch.rand(sae.n_latents, generator=generator) < dead_share, 20, 0)
    assert_step_equals_dense(sae, params, x, silent, tolerance=1e-8)


@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("n_latents", [64, 640])
@pytest.mark.parametrize("name", NEW)
def test_kernels_equal_dense_autograd(name: str, n_latents: int, kernels: str) -> None:
    sae = make_sae(name, 24, n_latents, 4)
    generator = torch.Generator().manual_seed(17)
    params = {key: value.float() for key, value in random_params(sae, generator).items()}
    params["W_enc"] /= params["W_enc"].norm(dim=1, keepdim=True)
    x = torch.randn(300, 24, generator=generator)
    silent = torch.where(torch.rand(n_latents, generator=generator) < 0.3, 20, 0)
    assert_step_equals_dense(sae, params, x, silent, kernels, tolerance=5e-4)


@pytest.mark.parametrize("name", [name for name in NEW if ARCHITECTURES[name].per_batch])
def test_ties_are_cut_by_token_then_latent(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    sae = make_sae(name)
    params = random_params(sae, generator)
    for key in ("W_enc", "b_enc"):
        params[key] = params[key][torch.arange(32) // 4 * 4]
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x[10:20] = x[10]
    assert_step_equals_dense(sae, params, x, torch.zeros(32, dtype=torch.int64))


@pytest.mark.parametrize("threshold", [0.0, 0.01, 1.0, 1e6])
def test_batchtopk_is_exact_whatever_threshold_was_expected(threshold: float) -> None:
    generator = torch.Generator().manual_seed(4)
    sae = make_sae("batchtopk")
    params = random_params(sae, generator)
    params["threshold"] = torch.tensor([threshold], dtype=torch.float64)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    for done in (0, 3):
        assert_step_equals_dense(sae, params, x, torch.zeros(32, dtype=torch.int64), done=done)


@pytest.mark.parametrize(("done", "share"), [(0, 1.0), (19, 1.0), (20, 1 / 2), (400, 1 / 21), (10**6, 1 / 100)])
def test_the_threshold_is_a_running_mean_of_the_smallest_kept_values(done: int, share: float) -> None:
    generator = torch.Generator().manual_seed(5)
    sae = make_sae("batchtopk")
    params = random_params(sae, generator)
    params["threshold"].fill_(0.7)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    grads = {key: torch.zeros_like(value) for key, value in params.items()}
    step(sae, params, params, x, runtime(Solo()), None, grads, done=done)
    values = ((x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]).relu().flatten()
    smallest = float(values.sort(descending=True).values[sae.k * 50 - 1])
    assert float(params["threshold"]) == pytest.approx(0.7 + share * (smallest - 0.7))


def test_batchtopk_at_inference_uses_the_threshold_alone() -> None:
    generator = torch.Generator().manual_seed(6)
    sae = make_sae("batchtopk")
    params = random_params(sae, generator)
    params["threshold"] = torch.tensor([0.8], dtype=torch.float64)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    whole = forward(sae, params, params, x, runtime(Solo()))
    alone = [forward(sae, params, params, row[None], runtime(Solo())).residual for row in x]
    torch.testing.assert_close(whole.residual, torch.cat(alone))
    a = (x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    torch.testing.assert_close((whole.codes.values > 0).sum(dim=1), (a > 0.8).sum(dim=1))


@pytest.mark.parametrize("name", NEW)
def test_a_value_that_is_not_finite_reaches_the_loss(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    sae = make_sae(name)
    params = random_params(sae, generator)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    x[3, 2] = torch.nan
    grads = {key: torch.zeros_like(value) for key, value in params.items()}
    stats = step(sae, params, params, x, runtime(Solo()), None, grads, sparsity=0.1, done=1)
    assert not bool(stats.loss.isfinite())


@pytest.mark.parametrize("name", ["jumprelu", "jumprelu_tanh"])
def test_the_jump_s_gradient_is_that_of_the_expected_loss(name: str) -> None:
    """d E[L]/dθ by finite differences over many normal rows: the estimator is right on average, up to the kernel's
    width."""
    generator = torch.Generator().manual_seed(8)
    sae = dataclasses.replace(make_sae(name, 3, 2), bandwidth=0.05, preactivation_penalty=0.3)
    params = random_params(sae, generator)
    # the tanh saturates within the jump, so its slope at both ends is not the mean one; the error is quadratic
    sparsity = 0.2 if name == "jumprelu" else 0.0
    x = torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    grads = {key: torch.zeros_like(value) for key, value in params.items()}
    step(sae, params, params, x, runtime(Solo()), None, grads, sparsity=sparsity, done=1)

    def loss(shift: float, latent: int) -> float:
        moved = {key: value.clone() for key, value in params.items()}
        moved["log_threshold"][latent] += shift
        nothing = {key: torch.zeros_like(value) for key, value in params.items()}
        return float(step(sae, moved, moved, x, runtime(Solo()), None, nothing, sparsity=sparsity, done=1).loss)

    for latent in range(2):
        difference = (loss(0.02, latent) - loss(-0.02, latent)) / 0.04
        assert float(grads["log_threshold"][latent]) == pytest.approx(difference, rel=0.05, abs=2e-3)
