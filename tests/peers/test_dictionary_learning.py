"""The first steps of dictionary_learning's trainer and ours, weight by weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.activations.source import ActivationSource
from harness.ops import choose_ops
from harness.parallel import Solo
from harness.saes import forward
from harness.training.state import TrainState
from tests.peers import paired
from tests.peers.dictionary_learning_topk import installed, make_trainer, matched_to_them, their_params
from tests.training.members import runtime, small_config, source_of

pytestmark = pytest.mark.skipif(
    not installed(), reason="dictionary_learning is not installed (tests/peers/__init__.py says how)"
)


def one_pair(**changes: Any) -> tuple[TrainState, Any, ActivationSource]:
    config = small_config(**changes)
    source, ops = source_of(config), choose_ops("reference")
    probe = paired.new_member(config, source, ops).sae
    member = paired.new_member(matched_to_them(config, probe.variance, probe.d_model), source, ops)
    return member, make_trainer(member), source


def assert_steps_agree(member: TrainState, trainer: Any, source: ActivationSource, steps: int) -> None:
    ops = choose_ops("reference")
    raw, normalised = paired.raw_batches(member, source), paired.normalised_batches(member, source)
    for number, rows, x in zip(range(1, steps + 1), raw, normalised, strict=False):
        loss = trainer.update(number, x)
        member.train_step(rows, runtime(Solo(), ops))
        mean_loss = member.log_line(Solo())["loss"]
        assert mean_loss * member.sae.variance == pytest.approx(loss, rel=1e-5)
        for name, value in their_params(trainer.ae, 1.0).items():
            torch.testing.assert_close(
                member.params[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_first_steps_agree_in_float32() -> None:
    assert_steps_agree(*one_pair(train__warmup_tokens=640, train__decay_fraction=0.25), steps=8)


def test_a_step_with_dead_latents_agrees_in_float32() -> None:
    member, trainer, source = one_pair(sae__n_latents=256, sae__aux_alpha=1.0)
    first = next(iter(paired.normalised_batches(member, source)))
    # theirs leaves out dead latents that fire in the very batch; these do not
    run = forward(member.sae, member.params, member.params, first, runtime(Solo(), choose_ops("reference")))
    used = run.codes.index[run.codes.values > 0]
    dead = torch.ones(256, dtype=torch.bool).index_fill_(0, used, False)
    assert dead.any()
    member.silent[dead] = 1_000_000
    trainer.num_tokens_since_fired[dead] = 1_000_000
    assert_steps_agree(member, trainer, source, steps=1)
    assert member.dead.equal(dead) and trainer.dead_features == int(dead.sum())
