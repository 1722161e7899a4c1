"""Likeness of dictionaries: permuted rows are matched, turned rows are told by their angle."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dev.matched_cosines import likeness, main
from tests.quality.planted import orthonormal
from tests.tiny import train_tiny


def test_rows_are_matched_one_to_one() -> None:
    rows = orthonormal(16)[:8]
    order = torch.arange(8).roll(3)
    assert likeness(rows, 2.5 * rows[order]) == pytest.approx((1.0, 1.0, 0.0), abs=1e-6)
    # every row turned by 60 degrees into a direction of its own
    turned = 0.5 * rows + math.sqrt(0.75) * orthonormal(16)[8:]
    assert likeness(rows, turned) == pytest.approx((0.5, 0.0, 0.5), abs=1e-6)
    # one row for all: only one can have it
    assert likeness(rows, rows[:1].expand(8, -1)).matched == pytest.approx(1 / 8, abs=1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny(tmp_path)
    capsys.readouterr()
    main([str(run), str(run.parent)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "random rows" in lines[0] and "t/topk-n32" in lines[0] and "local" in lines[0]
