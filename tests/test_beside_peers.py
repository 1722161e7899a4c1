"""The comparison with other trainers: coefficients that reach an L0, and losses read off at it. No trainer runs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

from dev.architectures_beside_peers import Asked, Results, at_l0, report, train

LRS, WANTED = [1e-3, 2e-3, 4e-3], [16, 64]


def answer(asked: Asked) -> dict[str, float]:
    """L0 = 40·λ^-0.8 where a coefficient is asked for, else what was asked for; loss = L0^-0.3 at the best rate."""
    l0 = 40 * asked.level**-0.8 if asked.level < 10 else asked.level
    return {"l0": l0, "fvu": l0**-0.3 * (1 + 0.1 * abs(math.log2(asked.lr / 2e-3))) * (1 + 0.001 * asked.seed)}


def test_coefficients_are_found_that_reach_the_wanted_l0(tmp_path: Path) -> None:
    results = Results(tmp_path, "saelens")

    def ask(asked: Asked) -> None:
        results.known[asked.key] = answer(asked)

    assert results.levels("relu", WANTED, LRS) == []
    found = results.levels("relu", WANTED, LRS, ask)
    for level, l0 in zip(found, WANTED, strict=True):
        assert 40 * level**-0.8 == pytest.approx(l0, rel=0.15)
    assert len(results.known) <= 5
    assert results.levels("relu", WANTED, LRS) == found  # what is known is enough


def test_losses_are_read_off_between_the_points_and_hardly_beyond() -> None:
    curve = [(math.log(l0), -0.3 * math.log(l0)) for l0 in (18, 60)]
    for l0 in (16, 18, 30, 64):
        assert at_l0(curve, math.log(l0)) == pytest.approx(-0.3 * math.log(l0))
    assert at_l0(curve, math.log(12)) is None and at_l0(curve[:1], math.log(18)) is None


def test_each_seed_is_trained_at_the_best_rate_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(
        out=tmp_path, architectures=["relu"], l0=WANTED, lrs=LRS, seeds=[0, 1, 2], trainers=""
    )
    for trainer in ("ours", "saelens"):
        asked: list[Asked] = []

        def ask(every: list[Asked], asked: list[Asked] = asked) -> dict[str, dict[str, float]]:
            asked += every
            return {each.key: answer(each) for each in every}

        for _ in range(2):  # the second time everything is known
            train(Results(tmp_path, trainer), arguments, ask)
        assert len(asked) == len({each.key for each in asked})
        assert {each.lr for each in asked if each.seed} == {2e-3}
    lines = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert {"key", "fvu", "l0"} == set(lines[0])
    report(arguments)
    shown = capsys.readouterr().out.splitlines()
    (row,) = [line for line in shown if line.startswith("relu") and " 16 " in line]
    assert f"{16**-0.3 * 1.001:.4f}" in row and "no worse (+0.0%)" in row
