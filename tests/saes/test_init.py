"""Initial weights, normalisation, and the geometric median."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.ops import reference
from harness.parallel import Solo
from harness.saes import Sae, geometric_median, initial_params, make_normalizer, match_norm
from harness.saes.init import _generator, _unit_rows
from harness.saes.step import forward
from tests.training.members import runtime

CPU = torch.device("cpu")


class Part(Solo):
    """The rows of one of several shards, without exchanges."""

    def __init__(self, rank: int, shard: int) -> None:
        self.shard_rank, self.shard = rank, shard

    def rows(self, count: int) -> slice:
        return slice(self.shard_rank * count // self.shard, (self.shard_rank + 1) * count // self.shard)


def make_sae(n: int = 4096, routed: bool = False) -> Sae:
    return Sae("switch" if routed else "topk", 8, n, 4, 8 if routed else 1, True, 1.0, 1 / 32, 4, 0.0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("routed", [False, True])
def test_init_does_not_depend_on_how_it_is_cut(routed: bool, tied: bool) -> None:
    sae, center = make_sae(3000 if not routed else 3200, routed), torch.arange(8.0, dtype=torch.float64)
    whole = initial_params(sae, center[None], 7, Solo(), CPU, torch.float32, tied)
    parts = [initial_params(sae, center[None], 7, Part(rank, 4), CPU, torch.float32, tied) for rank in range(4)]
    for name, cut in sae.layout().items():
        if cut == "latent_rows":
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
        else:
            assert all(torch.equal(part[name], whole[name]) for part in parts)


def test_an_untied_encoder_has_unit_directions_of_its_own_and_the_same_decoder() -> None:
    sae, center = make_sae(routed=True), torch.arange(8.0, dtype=torch.float64)
    tied, untied = (
        initial_params(sae, center[None], 0, Solo(), CPU, torch.float32, choice) for choice in (True, False)
    )
    assert all(torch.equal(tied[name], untied[name]) for name in tied if name != "W_enc")
    torch.testing.assert_close(untied["W_enc"].norm(dim=1), torch.ones(4096))
    cosine = (untied["W_enc"] * untied["W_dec"]).sum(dim=1)
    assert abs(float(cosine.mean())) < 0.03 and float(cosine.std()) == pytest.approx(8**-0.5, rel=0.05)


def test_init_is_parallel_unit_norm_and_seeded() -> None:
    sae, center = make_sae(routed=True), torch.arange(8.0, dtype=torch.float64)
    params = initial_params(sae, center[None], 0, Solo(), CPU, torch.float32)
    assert torch.equal(params["W_enc"], params["W_dec"])
    assert params["W_enc"].data_ptr() != params["W_dec"].data_ptr()
    torch.testing.assert_close(params["W_dec"].norm(dim=1), torch.ones(4096))
    assert torch.equal(params["b_dec"], center.float()) and torch.equal(params["b_r"], center.float())
    assert params["b_dec"].data_ptr() != params["b_r"].data_ptr()
    assert params["W_r"].abs().max() <= 1 / math.sqrt(8)
    other = initial_params(sae, center[None], 1, Solo(), CPU, torch.float32)
    assert not torch.equal(params["W_dec"], other["W_dec"]) and not torch.equal(params["W_r"], other["W_r"])


def test_match_norm_gives_reconstructions_the_norm_of_the_inputs() -> None:
    sae = make_sae(512)
    params = initial_params(sae, torch.zeros(1, 8, dtype=torch.float64), 0, Solo(), CPU, torch.float64)
    x = 3 * torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    match_norm(sae, params, x, runtime(Solo(), reference))
    run = forward(sae, params, params, x, runtime(Solo(), reference))
    reconstruction = run.centred - run.residual
    assert float(reconstruction.square().sum() / run.centred.square().sum()) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 10**6))
def test_geometric_median_is_a_minimum(rows: int, d: int, seed: int) -> None:
    x = torch.randn(rows, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    median = geometric_median(x, tolerance=1e-12, most_iterations=5000)

    def mean_distance(point: torch.Tensor) -> float:
        return float((x - point).norm(dim=1).mean())

    best = mean_distance(median)
    for direction in torch.randn(8, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        assert best <= mean_distance(median + 1e-2 * direction) + 1e-6


def test_geometric_median_withstands_outliers() -> None:
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    x[:100] += 1e4
    assert geometric_median(x).norm() < 1


def test_scale_brings_the_mean_square_norm_to_d() -> None:
    x = 7 * torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)) + 2
    normalizer = make_normalizer("scale", 16, float(x.square().sum(1).mean()))
    y = normalizer(x, torch.float32)
    assert float(y.square().sum(1).mean()) == pytest.approx(16, rel=1e-5)
    torch.testing.assert_close(normalizer.squared_unit(x) * y.square().sum(1), x.square().sum(1), rtol=1e-4, atol=1e-3)


def test_layernorm_centres_and_scales_each_row_to_norm_one() -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 9 + 4
    normalizer = make_normalizer("layernorm", 16, 123.0)
    y = normalizer(x, torch.float64)
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(50, dtype=torch.float64))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(50, dtype=torch.float64))
    assert torch.isfinite(normalizer(torch.ones(3, 16), torch.float32)).all()


@pytest.mark.parametrize("rows", [slice(0, 3000), slice(1500, 2100)])
def test_directions_are_the_numbers_of_earlier_versions(rows: slice) -> None:
    """They drew all rows at once, in float64."""
    blocks = [torch.randn(1024, 48, dtype=torch.float64, generator=_generator(5, 1, block)) for block in range(3)]
    drawn = torch.cat(blocks)[rows]
    before = (drawn / drawn.norm(dim=1, keepdim=True)).to(torch.float32)
    assert torch.equal(_unit_rows(5, rows, 48, CPU, torch.float32), before)
