"""The controls of the router: experts by chance and by a fixed hash, and THOR's consistency term."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import SaeConfig
from harness.parallel import Solo
from harness.saes import Sae, find_dead, step
from harness.saes.router import chosen_expert, drawn, route
from harness.saes.trained import load
from tests.saes.dense import dense_loss
from tests.saes.test_step import assert_equal_to_autograd
from tests.saes.test_trained import heldout_rows
from tests.tiny import train_tiny
from tests.training.members import runtime


def make_sae(routing: str, consistency: float = 0.0, experts: int = 3) -> Sae:
    return Sae(
        "switch", 6, 8 * experts, 2, experts, True, 2.0, 1 / 32, 3, 0.0, routing=routing, consistency=consistency
    )


def rows(count: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_params(sae: Sae) -> dict[str, torch.Tensor]:
    params = {}
    for seed, name in enumerate(sae.layout()):
        first, *rest = sae.shape(name)
        params[name] = rows(first, rest[0] if rest else 1, seed).reshape(sae.shape(name))
    params["W_dec"] /= params["W_dec"].norm(dim=1, keepdim=True)
    return params


def test_draws_are_uniform_and_belong_to_the_row() -> None:
    x = rows(20_000, 8, 0)
    first, again, other = drawn(x, 1), drawn(x.flip(0), 1).flip(0), drawn(x, 2)
    assert torch.equal(first, again)
    for experts in (2, 7, 64):
        for draw in (first, other):
            counts = torch.bincount(draw % experts, minlength=experts).double()
            expected = len(x) / experts
            # χ² has experts − 1 degrees of freedom
            assert float(((counts - expected) ** 2 / expected).sum()) < experts + 5 * (2 * experts) ** 0.5
        together = float((first % experts == other % experts).double().mean())
        assert together == pytest.approx(1 / experts, abs=0.02)


def test_similar_rows_have_one_hash_and_unrelated_draws() -> None:
    x = rows(500, 6, 1).repeat(2, 1)
    x[500:] += 1e-5
    for routing, low, high in (("hash", 0.99, 1.0), ("random", 0.2, 0.5)):
        sae = make_sae(routing)
        expert, probabilities = chosen_expert(sae, make_params(sae), x, 3)
        assert probabilities is None
        assert low <= float((expert[:500] == expert[500:]).double().mean()) <= high


def test_the_two_experts_of_a_token_differ_and_every_pair_occurs() -> None:
    sae, x = make_sae("random", 1.0), rows(3000, 6, 2)
    routing = route(sae, {}, torch.cat([x, x]), Solo(), 5, pairs=True)
    assert routing.order is not None and routing.counts is not None and routing.scale is None
    expert = torch.empty(6000, dtype=torch.int64)
    expert[routing.order] = torch.arange(3).repeat_interleave(routing.counts)
    pairs = torch.bincount(expert[:3000] * 3 + expert[3000:], minlength=9).view(3, 3)
    assert pairs.diagonal().tolist() == [0, 0, 0]
    assert torch.equal(expert[:3000], chosen_expert(sae, {}, x, 5)[0])
    assert all(400 < int(pairs[a, b]) < 600 for a in range(3) for b in range(3) if a != b)


@pytest.mark.parametrize(("routing", "consistency"), [("hash", 0.0), ("random", 0.0), ("random", 0.7)])
@pytest.mark.parametrize("dead_share", [0.0, 0.5])
def test_step_equals_dense_autograd(routing: str, consistency: float, dead_share: float) -> None:
    sae, x, done = make_sae(routing, consistency), rows(40, 6, 3), 4
    params = make_params(sae)
    silent = torch.where(torch.rand(24, generator=torch.Generator().manual_seed(4)) < dead_share, 20, 0)
    grads = {name: torch.full_like(value, torch.nan) for name, value in params.items()}
    stats = step(
        sae,
        params,
        params,
        x,
        runtime(Solo()),
        find_dead(sae, silent >= 10, Solo(), runtime(Solo()).ops),
        grads,
        done=done,
    )

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    seen = torch.cat([x, x]) if consistency else x
    routed = route(sae, params, seen, Solo(), done + 1, pairs=consistency > 0)
    assert routed.order is not None and routed.counts is not None
    experts = torch.empty(len(seen), dtype=torch.int64)
    experts[routed.order] = torch.arange(3).repeat_interleave(routed.counts)
    expected = dense_loss(
        leaves, seen, k=2, n_experts=3, variance=2.0, aux_alpha=1 / 32, aux_k=3, dead=silent >= 10, experts=experts
    )
    if consistency:
        first, second = expected["reconstruction"].split(len(x))
        expected["loss"] = expected["loss"] + consistency / 2 * (first - second).square().sum(dim=1).mean() / 2.0
    assert_equal_to_autograd(stats, grads, leaves, expected, 1e-9)
    assert float(stats.balance) == 1.0
    assert float(stats.expert_share.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("routing", ["hash", "random"])
def test_a_finished_sae_has_the_recorded_error_and_a_hash_never_learns(routing: str, tmp_path: Path) -> None:
    settings = ["sae=switch", "sae.n_experts=4", f"sae.routing={routing}"]
    run_dir = train_tiny(tmp_path, *settings, *(["sae.consistency=1"] if routing == "random" else []))
    result, trained, x = json.loads((run_dir / "result.json").read_text()), load(run_dir), heldout_rows(run_dir)
    error = (x - trained.forward(x)).double().square().sum(dim=1)
    assert float(error.mean()) == pytest.approx(result["mse"], rel=1e-5)
    assert ("W_r" in trained.params) == (routing == "hash")
    if routing == "hash":
        bound = 1 / trained.sae.d_model**0.5
        other = load(train_tiny(tmp_path / "longer", *settings, "train.tokens=1024"))
        assert torch.equal(trained.params["W_r"], other.params["W_r"])
        assert float(trained.params["W_r"].abs().max()) <= bound


def test_what_makes_no_sense_is_refused() -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("needs sae=switch", {"architecture": "topk", "routing": "hash"}),
        ("choose one of", {"architecture": "switch", "n_experts": 2, "routing": "best"}),
        ("needs sae.routing=random", {"architecture": "switch", "n_experts": 2, "consistency": 1.0}),
        ("two experts or more", {"architecture": "switch", "routing": "random", "consistency": 1.0}),
    ]
    for message, settings in refused:
        with pytest.raises(ValueError, match=message):
            SaeConfig(n_latents=16, k=2, **settings)
