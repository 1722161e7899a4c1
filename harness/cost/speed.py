"""How fast this machine trains: the real step and the real evaluation of a configuration, timed on random rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.activations.source import ActivationSource
from harness.activations.statistics import Statistics
from harness.activations.stream import Stream
from harness.activations.synthetic import Synthetic
from harness.config import Config
from harness.ops import choose_ops
from harness.process.device import pick_device
from harness.process.runtime import alone
from harness.training.evaluate import evaluate
from harness.training.state import make_state

FEW_ROWS = 1024
"""Enough to initialise an SAE whose steps are timed."""
MOST_DRAWN_ROWS = 4096
"""Of synthetic activations, at a time."""
LEAST_REPEATS, MOST_REPEATS = 4, 40


class Speed(NamedTuple):
    step_s: float
    """Seconds of one training step without dead latents."""
    dead_step_s: float
    """Of one with a share of them dead, so that AuxK works."""
    evaluation_s: float
    """Seconds of an evaluation of as many rows as a batch has."""


class _RandomRows:
    """An `ActivationSource` that holds one batch of normal rows."""

    id = "random"
    train_rows: int | None = None
    dictionary: Float[Tensor, "features d"] | None = None

    def __init__(self, rows: int, d_model: int, sample_rows: int = FEW_ROWS) -> None:
        self.d_model, self.heldout_rows, self._sample_rows = d_model, rows, sample_rows
        self.description: dict[str, Any] = {}
        self.rows = torch.randn(rows, d_model, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def statistics(self, layernorm: bool) -> Statistics:
        unit = 1.0 if layernorm else float(self.d_model)
        return Statistics(len(self.rows), torch.zeros(self.d_model, dtype=torch.float64), unit, unit)

    def sample(self) -> Float[Tensor, "rows d"]:
        return self.rows[: self._sample_rows].float()

    def stream(self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1) -> Stream:
        def fill(start: int, end: int, out: Tensor) -> None:
            out.copy_(self.rows[: end - start])

        return Stream(fill, self.d_model, self.rows.dtype, batch_tokens, device, dp_rank, dp)

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        for start in range(0, self.heldout_rows, batch_rows):
            part = self.rows[start : start + batch_rows]
            yield part, torch.arange(start, start + len(part))


def measure_speed(config: Config, d_model: int, seconds: float, dead_share: float) -> Speed:
    """The fastest of a few steps and evaluations of `config` on rows of width `d_model`, in about `seconds` beside a
    first call of each, which loads kernels. The fastest, since what else the machine does meanwhile comes and goes.
    `config.train.precision` is resolved, `dead_share` above 0. The number of threads is left as it was.

    Raises `ValueError` where the kernels do not run on the device, `RuntimeError` where its memory does not suffice.
    """
    device = pick_device(config.train.device)
    runtime = alone(device, choose_ops(config.ops, device))
    threads = torch.get_num_threads()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    try:
        source: ActivationSource = _RandomRows(config.train.batch_tokens, d_model)
        state = make_state(config, source, runtime)
        with source.stream(0, config.train.batch_tokens, device) as stream:
            batch = stream.batch(0)

        def train() -> None:
            state.train_step(batch, runtime)

        every = round(1 / dead_share)

        def train_with_dead() -> None:
            state.silent[::every] = round(config.sae.dead_after_tokens) + config.train.batch_tokens
            train()

        def look() -> None:
            limits = (source.heldout_rows,)
            evaluate(state.sae, state.params, source, state.normalizer, limits, runtime)

        step_s = dead_step_s = _least_s(train, seconds / 3, device)
        if config.sae.aux_alpha:
            state.done = 0  # the list of the dead is made at the first step
            dead_step_s = _least_s(train_with_dead, seconds / 3, device)
        return Speed(step_s, dead_step_s, _least_s(look, seconds / 3, device))
    finally:
        torch.set_num_threads(threads)


def measure_start(config: Config, d_model: int, sample_rows: int) -> float:
    """Seconds that a run needs to begin: normalisation, centre and initial weights from a sample of the store."""
    device = pick_device(config.train.device)
    source: ActivationSource = _RandomRows(sample_rows, d_model, sample_rows)
    begin = time.perf_counter()
    make_state(config, source, alone(device, choose_ops(config.ops, device)))
    return time.perf_counter() - begin


def measure_draw(config: Config, seconds: float) -> float:
    """Seconds that this machine needs for a row of the synthetic activations of `config`."""
    rows = min(config.train.batch_tokens, MOST_DRAWN_ROWS)
    with Synthetic(config.activations, "").stream(0, rows, torch.device("cpu")) as stream:
        steps = itertools.count()
        return _least_s(lambda: stream.batch(next(steps)), seconds, torch.device("cpu")) / rows


def _least_s(action: Callable[[], object], seconds: float, device: torch.device) -> float:
    def timed() -> float:
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed()
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < LEAST_REPEATS or (time.perf_counter() < end and len(samples) < MOST_REPEATS):
        samples.append(timed())
    return min(samples)
