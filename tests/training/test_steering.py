"""`sae.target_l0`: the coefficient of the penalty brings L0 to its target and holds it there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.launch import main
from harness.record import names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
def test_l0_is_held_at_its_target(name: str, tmp_path: Path) -> None:
    asked = ("activations=synthetic", "train=quick", "train.tokens=300e3", f"sae={name}", "sae.n_latents=256")
    assert main([*asked, "sae.target_l0=8", "train.threads=1", "tracker=none", f"out={tmp_path}", "sweep=s"]) == 0
    (result,) = tmp_path.glob(f"s/*/{names.RESULT}")
    assert json.loads(result.read_text())["l0"] == pytest.approx(8, rel=0.03), "held out"
