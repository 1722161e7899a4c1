"""The training loop: one stream of batches, one or several members that train on it.

It reads top to bottom. Everything between two steps happens in `between_steps`, so a run that stops there and goes on
later is the same run as one that never stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from harness.process.garbage import collected_by_request
from harness.process.runtime import Runtime
from harness.training.checkpoints import Checkpoints
from harness.training.finish import finish
from harness.training.member import Member

COLLECT_EVERY_STEPS = 1000
"""All ranks collect garbage at the same steps."""


def train(members: Sequence[Member], checkpoints: Checkpoints, runtime: Runtime, started: str) -> None:
    """Train every member to its end, from wherever its state stands; one that ends earlier leaves, the others go on.

    All members share store, stream seed, batch size and position. `started` is when this attempt began, ISO 8601.
    Raises `Interrupted`, everything saved, when a stop is requested.
    """
    active = list(members)
    first, begin = active[0], active[0].state.done
    assert all(member.state.done == begin for member in active), "members on one stream stand at one step"
    with first.open_stream(runtime) as stream, collected_by_request():
        for batch in stream.batches(begin):
            for member in active:
                member.between_steps(runtime)
                if member.ended:
                    finish(member, runtime, started)
            active = [member for member in active if not member.ended]
            if not active:
                return
            checkpoints.stop_or_save(active)
            for member in active:
                member.state.train_step(batch, runtime)
            if active[0].state.done % COLLECT_EVERY_STEPS == 0:
                gc.collect()
            if active[0].state.done == begin + 1:
                runtime.shards.started()
