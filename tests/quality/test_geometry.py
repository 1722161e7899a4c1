"""Geometry against dictionaries whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.quality.geometry import DUPLICATE, expert_map, judge, neighbours
from harness.saes.trained import load


def random(n: int, d: int = 64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", [7, 50, 2048])
def test_exact_duplicates_are_counted_once_per_latent(block: int) -> None:
    rows = random(200)
    rows[100:110] = rows[:10] * 3  # ten pairs
    rows[110] = rows[0]  # a third copy adds one latent, not two
    rows[120] = -rows[20]  # the opposite is no duplicate
    found = neighbours(rows, torch.zeros(200, dtype=torch.int64), block)
    assert (found.nearest > DUPLICATE).float().mean() == pytest.approx(21 / 200)
    assert found.nearest[120] < DUPLICATE and found.which[105] == 5


def test_nearest_cosine_may_be_negative() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    found = neighbours(rows, torch.zeros(2, dtype=torch.int64))
    assert (found.nearest < -0.9).all()


def test_experts_in_disjoint_subspaces() -> None:
    groups = torch.arange(80) // 20
    rows = torch.zeros(80, 64)
    for expert in range(4):
        rows[groups == expert, 16 * expert : 16 * expert + 16] = random(20, 16).abs()
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    found = neighbours(rows[order], groups[order])
    table = expert_map(found, groups[order])
    assert table[~torch.eye(4, dtype=torch.bool)].abs().max() < 1e-6
    assert (found.purity == 1).all() and (table.diagonal() > 0.2).all()


def test_random_rows_match_the_simulated_null() -> None:
    """The facts: rows of 576 dimensions, 4,096 per expert, have a mean nearest cosine of .151 (sqrt(2 ln m/d) =
    .170)."""
    rows = torch.randn(4096, 576, generator=torch.Generator().manual_seed(0))
    found = neighbours(rows, torch.zeros(4096, dtype=torch.int64))
    assert float(found.nearest.mean()) == pytest.approx(0.151, abs=0.003)


def test_a_switch_run_has_controls(switch_run: Path) -> None:
    outcome = judge(load(switch_run))
    values = outcome.values
    assert values["expert_purity_chance"].value == 0.5
    assert {"expert_overlap", "expert_overlap_shuffled", "nearest_in_own_expert"} <= set(values)
    assert len(outcome.per_latent["nearest_cosine"]) == 32 and len(outcome.curves["expert_map"]) == 2
