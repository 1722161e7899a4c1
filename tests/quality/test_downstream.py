"""Downstream losses where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from harness.quality.downstream import (
    FEW,
    ablation_splices,
    calibration,
    clean_of,
    delta_ce,
    losses,
    outcome,
    point,
    references,
    spliced_sums,
)
from harness.quality.shared import Shared
from harness.record.quality import Value


def test_cross_entropy_and_the_direction_of_kl() -> None:
    clean, spliced = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
    ids = torch.tensor([[0, 1, 0]])
    ce, kl = losses(spliced.expand(1, 3, 2) + 3, clean_of(clean.expand(1, 3, 2) - 1), ids)
    torch.testing.assert_close(ce, torch.full((1, 2), math.log(2)))
    forward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    torch.testing.assert_close(kl, torch.full((1, 3), forward))
    assert abs(forward - backward) > 0.02


def test_anchors(shared: Shared) -> None:
    """Identity costs nothing; ablations recover nothing; shuffled reconstructions are worse than the mean."""
    generator = torch.Generator().manual_seed(0)
    splices = ablation_splices(shared) | {
        "identity": lambda rows, _places: rows,
        "shuffled": lambda rows, _places: rows[torch.randperm(len(rows), generator=generator)] * 1.5,
        "half": lambda rows, _places: rows + 0.1 * torch.randn(rows.shape, generator=generator),
    }
    sums = spliced_sums(shared, splices)
    everything = spliced_sums(shared, splices, everything=True, contexts=FEW)
    clean = sums["clean"]
    assert abs(delta_ce(sums["identity"], clean).value) < 1e-4 and point(sums["identity"], clean)["kl"] < 1e-6
    assert point(sums["mean"], clean)["fvu"] == pytest.approx(1)
    assert point(sums["shuffled"], clean)["kl"] > point(sums["mean"], clean)["kl"]
    found = references(shared)

    def recovered(name: str) -> dict[str, Value]:
        own = {"policy": sums[name], "clean": clean, "all": everything[name], "clean_all": everything["clean"]}
        return outcome(shared, found, own).values

    assert recovered("zero")["loss_recovered_zero"].value == pytest.approx(0, abs=1e-6)
    assert recovered("zero")["loss_recovered_zero_all"].value == pytest.approx(0, abs=1e-6)
    assert recovered("mean")["loss_recovered_mean"].value == pytest.approx(0, abs=1e-6)
    for name in ("zero", "mean", "zero_all", "mean_all"):
        assert recovered("identity")[f"loss_recovered_{name}"].value == pytest.approx(1, abs=1e-4)
    half = recovered("half")
    assert 0 < half["kl"].value < point(sums["mean"], clean)["kl"] and (half["kl"].se or 0) > 0
    # isotropic noise lies on the calibration curve of isotropic noise
    assert half["kl_over_noise"].value == pytest.approx(1, rel=0.25)


def test_calibration_curves_rise(shared: Shared) -> None:
    curves = calibration(references(shared))
    for points in curves.values():
        assert len(points) >= 4
        assert [each["fvu"] for each in points] == sorted(each["fvu"] for each in points)
        assert points[0]["kl"] < points[-1]["kl"]


def test_position_zero_and_massive_rows_keep_their_value(shared: Shared) -> None:
    text = shared.text
    assert not text.kept[:, 0].any() and text.kept[:, 1:].float().mean() > 0.9
    seen = []

    def note(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        torch.testing.assert_close(rows, text.hidden.flatten(0, 1)[places])
        return rows

    spliced_sums(shared, {"note": note})
    assert sum(seen) == int(text.kept.sum())
    spliced_sums(shared, {"note": note}, everything=True)
    assert sum(seen) == int(text.kept.sum()) + text.ids.numel()


def test_references_are_computed_once(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    references(shared)
    monkeypatch.setattr("harness.quality.downstream.spliced_sums", None)
    assert set(references(shared)) >= {"zero", "mean", "zero_all", "mean_all", "clean_few"}


def test_held_out_text_was_not_trained_on(shared: Shared) -> None:
    """Every context is whole, from a document that the store holds out."""
    text = shared.text
    assert text.ids.shape[1] == 16 and text.documents > 4
    late = text.hidden[:, 6:].flatten(0, 1)  # early positions have few tokens before them, and may repeat
    held = {tuple(row.tolist()) for row in late[:200].round(decimals=3)}
    stored = {tuple(row.tolist()) for row in shared.source.sample().round(decimals=3)}
    assert not held & stored
