"""The training loop: one stream of batches, one or several members that train on it.

Reads top to bottom; everything that happens between two steps happens in `between_steps`, so that a run which stops
there and one which goes on are the same run.
"""

from __future__ import annotations

import time

from harness.ops import Ops
from harness.parallel import Shards
from harness.record.signals import SAVE, STOP, Interrupted, StopFlag
from harness.train.cell import Cell


def train(cells: list[Cell], shards: Shards, ops: Ops, stop: StopFlag) -> None:
    """Train every cell to its end, from wherever its member stands.

    All cells share store, stream seed, batch size and position. Raises `Interrupted`, with everything saved, when
    `stop` is set.
    """
    active = [cell for cell in cells if not cell.ended]
    if not active:
        return
    first = active[0]
    done = first.member.done
    assert all(cell.member.done == done for cell in active), "cells on one stream stand at one step"
    with first.open_stream(shards) as stream:
        saved_at = time.monotonic()
        for batch in stream.batches(done):
            for cell in active:
                cell.between_steps(shards, stop)
            active = [cell for cell in active if not cell.ended]
            if not active:
                return
            saved_at = _stop_or_save(active, shards, stop, saved_at)
            for cell in active:
                cell.member.train_step(batch, shards, ops)
            if done == first.member.done - 1:
                shards.started()


def _stop_or_save(active: list[Cell], shards: Shards, stop: StopFlag, saved_at: float) -> float:
    """Save when it is time, stop when somebody asked, both at the same step on every rank."""
    train, done = active[0].config.train, active[0].member.done
    wanted = STOP * stop.requested
    if shards.rank == 0 and train.checkpoint_every_s and time.monotonic() - saved_at >= train.checkpoint_every_s:
        wanted |= SAVE
    wanted = shards.agree(wanted)
    by_steps = train.checkpoint_every_steps and done and done % train.checkpoint_every_steps == 0
    if not wanted and not by_steps:
        return saved_at
    for cell in active:
        cell.save(shards)
    if wanted & STOP:
        raise Interrupted
    return time.monotonic()
