"""When and what a job saves: one checkpoint of all its members, which stand or fall together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.budget import SAVE_BYTES_PER_S
from harness.parallel import Shards
from harness.process.runtime import Runtime
from harness.process.signals import SAVE, STOP, Interrupted
from harness.record.checkpoint import Checkpoint, load_tensors, save_checkpoint
from harness.training.member import Member


class Checkpoints:
    """The checkpoints of one job. Every rank saves and stops at the same step."""

    def __init__(self, folder: Path, members: Sequence[Member], runtime: Runtime) -> None:
        self._folder, self._runtime = folder, runtime
        self._saved_at = time.monotonic()
        self._save_s = sum(member.state.state_bytes() for member in members) / SAVE_BYTES_PER_S

    def stop_or_save(self, active: Sequence[Member]) -> None:
        """Save if it is time. Raises `Interrupted`, everything saved, when somebody has asked for a stop."""
        train, done = active[0].config.train, active[0].state.done
        shards, stop = self._runtime.shards, self._runtime.stop
        stop.look_at_deadline(self._save_s)
        stop.look_at_step(done)
        requests = STOP * stop.requested
        due = train.checkpoint_every_s and time.monotonic() - self._saved_at >= train.checkpoint_every_s
        if shards.rank == 0 and due:
            requests |= SAVE
        requests = shards.agree(requests)
        by_steps = train.checkpoint_every_steps and done and done % train.checkpoint_every_steps == 0
        if not requests and not by_steps:
            return
        begun = time.monotonic()
        self.save(active)
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - begun
        if requests & STOP:
            raise Interrupted

    def save(self, active: Sequence[Member]) -> None:
        """Save now; every rank calls it at the same step."""
        shards = self._runtime.shards
        for member in active:
            member.metrics.sync()
        counters: dict[str, Any] = {member.run.run_id: member.counters(self._runtime.ops.NAME) for member in active}
        owner = self._folder.parent.name
        save_checkpoint(self._folder, active[0].state.done, _views(active, shards), counters, owner, shards)

    def restore(self, members: Sequence[Member], checkpoint: Checkpoint) -> None:
        """Bring all members to where the checkpoint was saved."""
        assert checkpoint.directory is not None, "a checkpoint that was refused has no tensors"
        shards = self._runtime.shards
        load_tensors(checkpoint.directory, _views(members, shards), shards)
        for member in members:
            member.restore(checkpoint.extra[member.run.run_id], self._runtime)


def _views(members: Sequence[Member], shards: Shards) -> Mapping[str, Tensor]:
    return {
        f"{member.run.run_id}/{name}": view for member in members for name, view in member.state.views(shards).items()
    }
