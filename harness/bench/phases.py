"""What a rank does between its start and its end, once each, so that its memory can be read after each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from harness import budget
from harness.activations.source import SAMPLE_ROWS
from harness.activations.statistics import Statistics
from harness.config import Config
from harness.ops import Ops
from harness.parallel import Shards
from harness.process.runtime import Runtime
from harness.record.checkpoint import save_checkpoint
from harness.saes.dead import DeadLatents
from harness.saes.mutual import Peers
from harness.saes.sae import Sae
from harness.saes.weights import write_weights
from harness.training.evaluate import heldout_errors
from harness.training.state import TrainState, make_state

Rows = Callable[[int, int], Tensor]
"""(rows, dimensions) → float32 numbers on the host."""


class Phases(NamedTuple):
    planned: int
    phases: dict[str, int]
    """Phase → its peak, in bytes of one rank."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class FakeRows:
    """An `ActivationSource` of rows that `draw` makes."""

    id, dictionary, train_rows = "fake", None, None

    def __init__(self, d_model: int, rows: int, draw: Rows, sample: int = SAMPLE_ROWS) -> None:
        self.draw, self._sample = draw, sample
        self.d_model, self.heldout_rows, self.description = d_model, rows, dict[str, Any]()

    def statistics(self, layernorm: bool) -> Statistics:
        square = 1.0 if layernorm else float(self.d_model)
        return Statistics(SAMPLE_ROWS, torch.zeros(self.d_model, dtype=torch.float64), square, 0.9 * square)

    def sample(self) -> Tensor:
        return self.draw(self._sample, self.d_model)

    def heldout(self, batch_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(0, self.heldout_rows, batch_rows):
            yield self.draw(batch_rows, self.d_model).bfloat16(), torch.zeros(batch_rows).long()


def phases(config: Config, source: Any, runtime: Runtime, folder: Path | None = None) -> Iterator[str]:
    """Yield the name of each part when it has ended. `folder`: where to save; None: the weights are only gathered."""
    shards, device = runtime.shards, runtime.device
    with patch("harness.training.state.find_dead", planned_dead):
        state = make_state(config, source, runtime)
        yield "start"
        rows = config.train.batch_tokens // shards.dp
        raw, ahead = (source.draw(rows, source.d_model).bfloat16().to(device) for _ in range(2))
        _step(state, raw, runtime)
        _step(state, ahead, runtime)
        yield "step"
    weights = state.optimizer.averaged(state.done)
    heldout_errors(state.sae, weights, source, state.normalizer, source.heldout_rows, runtime)
    del weights
    yield "evaluation"
    if folder is not None:
        save_checkpoint(folder, state.done, state.views(shards), {}, "memory", shards)
        yield "checkpoint"
    weights = state.optimizer.averaged(state.done)
    if folder is not None:
        write_weights(folder / "sae", weights, set(filter(state.is_cut, weights)), shards)
    else:
        for name in [] if shards.size > 1 else filter(state.is_cut, weights):
            shards.gather(weights[name])
    yield "weights"


def _step(state: TrainState, raw: Tensor, runtime: Runtime) -> None:
    """A step. Peers are in the plans of their own runs, so the own decoder stands for theirs."""
    peers = state.config.train.peers
    if not peers:
        state.train_step(raw, runtime)
        return
    state.begin_step(runtime)
    stats = state.gradients(raw, runtime, Peers([state.params["W_dec"]] * peers, 1.0))
    state.update(stats, state.is_well(stats), runtime)
    state.end_step(runtime)


def planned_dead(
    sae: Sae, dead: Tensor, shards: Shards, ops: Ops, share: float = budget.PLANNED_DEAD
) -> DeadLatents | None:
    """As many dead latents as the plan expects, or another share."""
    count = math.ceil(share * dead.shape[0])
    if sae.aux_alpha == 0 or not count:
        return None
    groups = dead.shape[0] // sae.latents_per_expert if sae.routed else 1
    length = min(dead.shape[0] // groups, ops.list_length(count // groups))
    rows = torch.zeros(length * groups, dtype=torch.int64, device=dead.device)
    offsets = tuple(range(0, (groups + 1) * length, length))
    barred = torch.zeros(length * groups, device=dead.device) if ops.list_length(1) > 1 else None
    return DeadLatents(rows, offsets, max(1, min(sae.aux_k, length)), count * shards.shard, barred)
