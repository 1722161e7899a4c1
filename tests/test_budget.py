"""The formulas of `harness.budget` against counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import budget
from harness.config import SaeConfig
from harness.ops import Ops, choose_ops, reference
from harness.parallel import Solo
from harness.saes import find_dead, initial_params, resolve_sae, step
from harness.saes.mutual import Peers, draw_to_peers
from tests.training.members import runtime, small_config

D = 32
DENSE = reference.DENSE_ROWS_PER_K


def sae_config(**changes) -> SaeConfig:
    settings = {"architecture": "topk", "n_latents": 56, "k": 8, "aux_k": 16} | changes
    return SaeConfig(**settings)


def step_flops(config: SaeConfig, tokens: int, n_dead: int, ops: Ops = reference) -> int:
    """Products that torch counts in one step; gathers and element-wise work are not among them."""
    sae = resolve_sae(config, D, 1.0, 1.0)
    params = initial_params(sae, torch.zeros(1, D, dtype=torch.float64), 0, Solo(), torch.device("cpu"), torch.float32)
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(0))
    dead = find_dead(sae, torch.arange(config.n_latents) < n_dead, Solo(), ops)
    with FlopCounterMode(display=False) as counter:
        step(sae, params, params, x, runtime(Solo(), ops), dead, grads)
    return counter.get_total_flops()


def test_dense_parts_of_topk_equal_the_counted_products() -> None:
    config, tokens = sae_config(), 256  # n ≤ 7·k: every use of the codes is a dense product
    parts = budget.flops_executed_per_token(config, D, tokens, 0, DENSE)
    counted = step_flops(config, tokens, 0)
    bias_gradient = 2 * config.n_latents * D  # Σ dz @ W_enc, once per step
    assert counted == tokens * (parts["encoder"] + parts["decode"] + parts["gradients"]) + bias_gradient


def test_auxk_costs_what_the_dead_latents_cost_and_nothing_without_them() -> None:
    config, tokens = sae_config(), 256
    alive, dying = (budget.flops_executed_per_token(config, D, tokens, dead, DENSE) for dead in (0, 40))
    assert alive["auxk"] == 0
    assert step_flops(config, tokens, 40) - step_flops(config, tokens, 0) == tokens * dying["auxk"]


def test_the_cpu_kernels_take_dead_latents_from_the_encoders_product() -> None:
    config, tokens, dead = sae_config(), 256, 40
    # products on other threads are not counted
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counted = step_flops(config, tokens, dead, choose_ops("cpu")) - step_flops(config, tokens, 0, choose_ops("cpu"))
    finally:
        torch.set_num_threads(threads)
    parts = budget.flops_executed_per_token(config, D, tokens, dead, DENSE, encodes_dead=False)
    # torch counts the products of decoding and of dz, but none that is added to a gradient
    assert counted == tokens * parts["auxk"] / 2 == tokens * 2 * 2 * dead * D


def test_switch_encodes_one_expert_per_token_and_adds_a_router() -> None:
    config, tokens = sae_config(architecture="switch", n_experts=4, n_latents=224, balance_weight=0.1), 512
    parts = budget.flops_executed_per_token(config, D, tokens, 0, DENSE)
    once = 2 * config.n_latents * D + 2 * config.n_experts * D
    counted = step_flops(config, tokens, 0) - once
    assert counted == tokens * (parts["encoder"] + parts["decode"] + parts["gradients"] + parts["router"])


def test_the_comparison_with_peers_equals_the_counted_products() -> None:
    """In `flops` and in the executed FLOPs alike: it is exact, so nothing is left to the kernels."""
    config, tokens = sae_config(), 256
    nominal, executed = (
        budget.flops_per_token(config, D, tokens, peers=3),
        budget.flops_executed_per_token(config, D, tokens, 0, DENSE, peers=3),
    )
    assert nominal["mutual"] == executed["mutual"] and "mutual" not in budget.flops_per_token(config, D, tokens)
    own, *others = torch.randn(4, config.n_latents, D, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        draw_to_peers(own, Peers(others, 1.0), Solo(), torch.zeros_like(own))
    assert counter.get_total_flops() == tokens * nominal["mutual"]


def test_closed_form_is_the_sparse_algorithm_with_nominal_auxk() -> None:
    config = sae_config(n_latents=4096, k=16, aux_k=0)
    parts = budget.flops_per_token(config, 384, 1024)
    assert parts["encoder"] == 2 * 384 * 4096
    assert parts["decode"] == 2 * 16 * 384 and parts["gradients"] == 6 * 16 * 384
    assert budget.aux_k(config, 384) == 256 and parts["auxk"] == 8 * 256 * 384
    assert budget.flops_per_token(sae_config(aux_alpha=0.0), 384, 1024)["auxk"] == 0
    assert parts["optimizer"] == pytest.approx((12 * budget.params(config, 384) + 7 * 4096 * 384) / 1024)
    signum = budget.flops_per_token(config, 384, 1024, "signum")
    # a step against the sign, two interpolations; two sequences with unit rows, one gradient projected
    assert signum["optimizer"] == pytest.approx((9 * budget.params(config, 384) + 10 * 4096 * 384) / 1024)
    assert {part for part in parts if signum[part] != parts[part]} == {"optimizer"}


@pytest.mark.parametrize("architecture", ["topk", "switch"])
@pytest.mark.parametrize("enc_bias", [True, False])
def test_params_counts_every_trained_number(architecture: str, enc_bias: bool) -> None:
    config = sae_config(architecture=architecture, n_experts=4 if architecture == "switch" else 1, enc_bias=enc_bias)
    sae = resolve_sae(config, D, 1.0, 1.0)
    params = initial_params(sae, torch.zeros(1, D, dtype=torch.float64), 0, Solo(), torch.device("cpu"), torch.float32)
    assert budget.params(config, D) == sum(value.numel() for value in params.values())


def test_memory_of_the_weights_counts_master_gradient_and_moments() -> None:
    config = small_config()
    assert budget.memory_bytes(config, 16, 1 << 25, 0)["weights"] == 16 * budget.params(config.sae, 16)
    averaged = small_config(train__ema=0.9)
    assert budget.memory_bytes(averaged, 16, 1 << 25, 0)["weights"] == 20 * budget.params(config.sae, 16)
