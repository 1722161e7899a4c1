"""The training loop: one stream of batches, one or several members that train on it.

Reads top to bottom; everything that happens between two steps happens in `between_steps`, so that a run which stops
there and one which goes on are the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from harness.ops import Ops
from harness.parallel import Shards
from harness.process.signals import SAVE, STOP, Interrupted, StopFlag
from harness.training.cell import Cell


def train(
    cells: Sequence[Cell],
    shards: Shards,
    ops: Ops,
    stop: StopFlag,
    save: Callable[[Sequence[Cell]], None],
    finish: Callable[[Cell], None],
) -> None:
    """Train every cell to its end, from wherever its member stands; one that ends earlier leaves, the others go on.

    All cells share store, stream seed, batch size and position. `save` makes one checkpoint of those that still train,
    `finish` completes the record of one that has ended. Raises `Interrupted`, all saved, when `stop` is set.
    """
    active = list(cells)
    first, done = active[0], active[0].member.done
    assert all(cell.member.done == done for cell in active), "cells on one stream stand at one step"
    with first.open_stream(shards) as stream:
        saver = _Saver(active, stop, save)
        for batch in stream.batches(done):
            for cell in active:
                cell.between_steps(shards, stop)
                if cell.ended:
                    finish(cell)
            active = [cell for cell in active if not cell.ended]
            if not active:
                return
            saver.stop_or_save(active, shards)
            for cell in active:
                cell.member.train_step(batch, shards, ops)
            if active[0].member.done == done + 1:
                shards.started()


class _Saver:
    """Saves when it is time and stops when somebody asked, both at the same step on every rank."""

    def __init__(self, cells: Sequence[Cell], stop: StopFlag, save: Callable[[Sequence[Cell]], None]) -> None:
        self._stop, self._save = stop, save
        self._saved_at = time.monotonic()
        self._save_s = sum(cell.member.state_bytes() for cell in cells) / ASSUMED_BYTES_PER_S

    def stop_or_save(self, active: Sequence[Cell], shards: Shards) -> None:
        train, done = active[0].config.train, active[0].member.done
        self._stop.look_at_deadline(self._save_s)
        wanted = STOP * self._stop.requested
        due = train.checkpoint_every_s and time.monotonic() - self._saved_at >= train.checkpoint_every_s
        if shards.rank == 0 and due:
            wanted |= SAVE
        wanted = shards.agree(wanted)
        by_steps = train.checkpoint_every_steps and done and done % train.checkpoint_every_steps == 0
        if not wanted and not by_steps:
            return
        begun = time.monotonic()
        self._save(active)
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - begun
        if wanted & STOP:
            raise Interrupted


ASSUMED_BYTES_PER_S = 1e8
"""Speed of a save before one was measured; a slow network disk."""
