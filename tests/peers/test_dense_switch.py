"""Whole trajectories against dense autograd and torch's Adam, in float64."""

from __future__ import annotations

import pytest
import torch

from harness.ops import choose_ops
from harness.parallel import Solo
from tests.peers import paired
from tests.peers.dense_switch import train_dense
from tests.training.members import runtime, small_config, source_of

SETTINGS = {
    "train__precision": "fp64",
    "train__warmup_tokens": 640,
    "train__decay_fraction": 0.25,
    "train__clip_norm": 0.05,
    "sae__aux_alpha": 0.25,
    "sae__dead_after_tokens": 128,
    "sae__aux_k": 2,
}
SWITCH = {"sae__architecture": "switch", "sae__n_experts": 4, "sae__balance_weight": 0.1}


@pytest.mark.parametrize("architecture", [{}, SWITCH], ids=["topk", "switch"])
@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_a_trajectory_equals_dense_autograd(architecture: dict, steps: int) -> None:
    config = small_config(train__tokens=64 * steps, **SETTINGS, **architecture)
    source, ops = source_of(config), choose_ops("reference")
    member = paired.new_member(config, source, ops)
    start, losses, dead = paired.copy_of(member.params), [], 0.0
    for rows in paired.raw_batches(member, source):
        member.train_step(rows, runtime(Solo(), ops))
        line = member.log_line(Solo())
        losses.append(line["loss"])
        dead += line["n_dead"]
    assert dead > 0, "AuxK took part"
    params, expected = train_dense(member.sae, config, start, paired.normalised_batches(member, source), member.last)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    for name, value in params.items():
        torch.testing.assert_close(member.params[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    ours = paired.judge(member, member.params, source, ops)
    assert paired.judge(member, params, source, ops).fvu == pytest.approx(ours.fvu, rel=1e-10)
