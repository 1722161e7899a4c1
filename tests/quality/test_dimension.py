"""Dimensions of rows whose dimension is known."""

from __future__ import annotations

import pytest
import torch

from harness.quality.dimension import neighbour_ratios, participation_ratio, two_nn
from tests.quality.planted import orthonormal


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_points_of_a_flat_or_curved_sheet_have_its_dimension(dimension: int) -> None:
    directions = orthonormal(24)
    flat = normal(3000, dimension) @ directions[:dimension]
    sphere = torch.nn.functional.normalize(normal(3000, dimension + 1), dim=1) @ directions[: dimension + 1]
    for rows in (flat, sphere):
        found = two_nn(rows)
        assert found.se is not None
        assert abs(found.value - dimension) < 0.05 * dimension + 3 * found.se


def test_two_nn_sees_the_sheet_and_the_participation_ratio_the_directions() -> None:
    """A closed curve through 20 dimensions: one-dimensional, though it uses all of them equally."""
    angle = 2 * torch.pi * torch.rand(4000, 1, generator=torch.Generator().manual_seed(1))
    curve = torch.cat([f(angle * frequency) for frequency in range(1, 11) for f in (torch.sin, torch.cos)], dim=1)
    assert participation_ratio(curve) == pytest.approx(20, rel=0.02)
    assert two_nn(curve).value < 1.1


def test_participation_ratio_of_equal_and_of_single_directions() -> None:
    assert participation_ratio(normal(20_000, 16)) == pytest.approx(16, rel=0.01)
    assert participation_ratio(normal(1000, 1) @ normal(1, 16) + 3) == pytest.approx(1, abs=1e-6)
    stretched = normal(50_000, 2) * torch.tensor([3.0, 1.0])
    assert participation_ratio(stretched) == pytest.approx((9 + 1) ** 2 / (81 + 1), rel=0.02)


def test_ratios_do_not_depend_on_blocks_and_leave_out_repeats() -> None:
    rows = normal(2500, 3)
    distance = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.sort(dim=1).values[:, 1:3]
    expected = (nearest[:, 1] / nearest[:, 0]).sort().values
    torch.testing.assert_close(neighbour_ratios(rows), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(neighbour_ratios(torch.cat([rows, rows[:700]])), expected, rtol=1e-6, atol=1e-6)
