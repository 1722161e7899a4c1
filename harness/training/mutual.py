"""Members with mutual feature regularisation (`saes.mutual`): who is drawn to whom, and their common step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from harness.activations.whole_contexts import ContextBatch
from harness.process.runtime import Runtime
from harness.record.peers import groups_of, require_peers
from harness.saes import Stats
from harness.saes.mutual import Peers
from harness.training.member import Member
from harness.training.schedule import mfr_weight_at
from harness.training.state import TrainState


def member_groups(members: Sequence[Member]) -> list[list[Member]]:
    """The members of a job, peers together, the others alone.

    Raises `UserError` if one that has steps to do is without its peers. Peers end at the same step, so one that has
    only its record to complete needs none.
    """
    of_run = {member.run.run_dir: member for member in members}
    groups = groups_of([member.run for member in members])
    for group in groups:
        state = of_run[group[0].run_dir].state
        if state.done < state.last and state.diverged_at() is None:
            require_peers(group)
    return [[of_run[run.run_dir] for run in group] for group in groups]


def take_step(group: Sequence[TrainState], batch: Float[Tensor, "tokens d"] | ContextBatch, runtime: Runtime) -> None:
    """One step of an SAE alone, or of peers on the same rows.

    All gradients of peers are taken before the first update, so their order does not matter. Their losses are one:
    where one of them is not finite, none is updated, and all have diverged.
    """
    if len(group) == 1:
        group[0].train_step(batch, runtime)
        return
    found: list[Stats] = []
    for state in group:
        state.begin_step(runtime)
        decoders = [peer.params["W_dec"] for peer in group if peer is not state]
        found.append(state.gradients(batch, runtime, Peers(decoders, mfr_weight_at(state.config, state.done))))
        state.collect_sent(runtime.shards)
    well = torch.stack([state.is_well(stats) for state, stats in zip(group, found, strict=True)]).all()
    for state, stats in zip(group, found, strict=True):
        state.update(stats, well, runtime)
        state.end_step(runtime)
