"""How far a step moves the parameters."""

from __future__ import annotations

import pytest
import torch

from harness.config import TrainConfig
from harness.ops import choose_ops
from harness.parallel import Solo
from harness.training.signum import OPTIMIZERS
from tests.saes.test_catalogue import make_sae, random_params
from tests.training.members import runtime


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_thresholds_learn_four_times_as_fast(name: str) -> None:
    sae = make_sae("jumprelu")
    params = random_params(sae, torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in params.items()}
    optimizer = OPTIMIZERS[name](sae, params, TrainConfig(tokens=1e6, optimizer=name), torch.float64)
    for grad in optimizer.grads.values():
        grad.fill_(3.0)
    optimizer.apply(0.01, 1, torch.tensor(True), runtime(Solo(), choose_ops("reference")))
    # the first step of either is the learning rate, whatever the gradient
    torch.testing.assert_close(before["b_enc"] - params["b_enc"], torch.full_like(params["b_enc"], 0.01))
    moved = before["log_threshold"] - params["log_threshold"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.04))
