"""The training loop: one stream of batches, one or several members that train on it.

It reads top to bottom. Everything between two steps happens in `between_steps`, so a run that stops there and goes on
later is the same run as one that never stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import chain

from harness.process.garbage import collected_by_request
from harness.process.runtime import Runtime
from harness.training.checkpoints import Checkpoints
from harness.training.finish import finish
from harness.training.member import Member
from harness.training.mutual import member_groups, take_step

COLLECT_EVERY_STEPS = 1000
"""All ranks collect garbage at the same steps."""


def train(members: Sequence[Member], checkpoints: Checkpoints, runtime: Runtime, started: str) -> None:
    """Train every member to its end, from wherever its state stands; one that ends earlier leaves, the others go on.

    All members share store, stream seed, batch size and position. Peers (`train.mfr_seeds`) take their steps together
    and leave together. `started` is when this attempt began, ISO 8601. Raises `Interrupted`, everything saved, when a
    stop is requested, and `UserError` when peers are missing.
    """
    active, begin = member_groups(members), members[0].state.done
    assert all(member.state.done == begin for member in members), "members on one stream stand at one step"
    with members[0].open_stream(runtime) as stream, collected_by_request():
        for batch in stream.batches(begin):
            for member in chain(*active):
                if not member.ended:
                    member.between_steps(runtime)
            ended = [group for group in active if all(member.ended for member in group)]
            if any(len(group) > 1 for group in ended):
                # a kill between two of their results must leave nothing to train to the others
                checkpoints.save(list(chain(*active)))
            for member in chain(*ended):
                finish(member, runtime, started)
            active = [group for group in active if not all(member.ended for member in group)]
            if not active:
                return
            checkpoints.stop_or_save(list(chain(*active)))
            for group in active:
                take_step([member.state for member in group], batch, runtime)
            done = active[0][0].state.done
            if done % COLLECT_EVERY_STEPS == 0:
                gc.collect()
            if done == begin + 1:
                runtime.shards.started()
