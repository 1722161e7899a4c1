"""`sae.target_l0`: the coefficient of the penalty brings L0 to its target and holds it there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from harness.launch import main
from harness.record import names
from harness.training.schedule import evaluation_steps
from harness.training.sparsity import Sparsity
from tests.training.members import small_config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
def test_l0_is_held_at_its_target(name: str, tmp_path: Path) -> None:
    asked = ("activations=synthetic", "train=quick", "train.tokens=300e3", f"sae={name}", "sae.n_latents=256")
    assert main([*asked, "sae.target_l0=8", "train.threads=1", "tracker=none", f"out={tmp_path}", "sweep=s"]) == 0
    (result,) = tmp_path.glob(f"s/*/{names.RESULT}")
    assert json.loads(result.read_text())["l0"] == pytest.approx(8, rel=0.03), "held out"


def test_held_out_l0_is_brought_to_the_target() -> None:
    """L0 falls with λ, and is 1.3 times as high on rows that were not trained on."""
    config = small_config(sae__architecture="relu", sae__k=0, sae__aux_alpha=0.0, sae__target_l0=8.0)
    steering = Sparsity(config, 1.0, torch.device("cpu"))
    l0 = torch.tensor(0.0)
    for done in range(3000):
        l0 = 10.0 / steering.value(done).double().sqrt()
        if done % 500 == 499:
            steering.aim(1.3 * float(l0), float(l0))
        steering.observe(l0, done, 1e-3)
    assert 1.3 * float(l0) == pytest.approx(8.0, rel=1e-3)
    assert float(steering.gap) == pytest.approx(math.log(1.3), rel=1e-3)


def test_held_out_l0_is_measured_until_the_learning_rate_has_decayed() -> None:
    steps = evaluation_steps(small_config(train__decay_fraction=0.2), 1000)
    steered = {"sae__architecture": "relu", "sae__k": 0, "sae__aux_alpha": 0.0, "sae__target_l0": 8.0}
    assert evaluation_steps(small_config(**steered, train__decay_fraction=0.2), 1000) - steps == {800, 900, 950}
    assert evaluation_steps(small_config(**steered, train__schedule="linear"), 1000) - steps == {750}
    assert evaluation_steps(small_config(**steered), 1000) == steps
