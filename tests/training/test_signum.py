"""Signum with the schedule-free average: the three sequences, written down a second time, and what it must survive."""

from __future__ import annotations

import torch

from harness.config import TrainConfig
from harness.ops import choose_ops
from harness.parallel import Solo
from harness.training.signum import Signum
from tests.saes.test_catalogue import make_sae, random_params
from tests.training.members import runtime


def test_it_follows_the_three_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = make_sae("topk")
    params = random_params(sae, generator)
    config = TrainConfig(tokens=1e6, optimizer="signum", signum_beta=0.8)
    z = {name: value.clone() for name, value in params.items()}
    x = {name: value.clone() for name, value in params.items()}
    optimizer = Signum(sae, params, config, torch.float64)
    run, total = runtime(Solo(), choose_ops("reference")), 0.0
    for number, lr in enumerate((0.01, 0.02, 0.02, 0.005), start=1):
        for grad in optimizer.grads.values():
            grad.copy_(torch.randn(grad.shape, generator=generator, dtype=torch.float64))
        finite = number != 3
        grads = {name: optimizer.grads[name].clone() for name in params}
        rows = params["W_dec"].clone()
        optimizer.apply(lr, number, torch.tensor(finite), run)
        if not finite:
            continue
        grads["W_dec"] -= (grads["W_dec"] * rows).sum(dim=1, keepdim=True) * rows
        total += lr**2
        for name in params:
            z[name] -= lr * grads[name].sign()
            if name == "W_dec":
                z[name] /= z[name].norm(dim=1, keepdim=True)
            x[name] += (lr**2 / total) * (z[name] - x[name])
            y = 0.2 * z[name] + 0.8 * x[name]
            torch.testing.assert_close(params[name], y / y.norm(dim=1, keepdim=True) if name == "W_dec" else y)
    saved = optimizer.averaged(4)
    torch.testing.assert_close(saved["W_enc"], x["W_enc"])
    torch.testing.assert_close(saved["W_dec"].norm(dim=1), torch.ones(32, dtype=torch.float64))
