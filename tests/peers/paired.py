"""What both comparisons share: the activations, the settings, our side of a pair, the common judge and the table."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.activations.store.read import Store
from harness.config import Config, from_container
from harness.grid.compose import compose_settings, hydra_session
from harness.ops import Ops
from harness.parallel import Solo
from harness.process.signals import StopFlag
from harness.saes import Params
from harness.training.evaluate import Evaluation, evaluate
from harness.training.state import TrainState, make_state
from tests.training.members import runtime

CPU = torch.device("cpu")
WITHIN = 0.01
"""Largest relative difference of mean held-out fvu between two trainers of the same thing."""


def command_line(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=float, default=3e5, help="training tokens of every run")
    parser.add_argument("--seeds", default="0,1,2", help="one pair per seed (initial weights and order of the rows)")
    parser.add_argument("--activations", type=Path, help="a finished store; default: harvest activations=minilm")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where a harvested store lies")
    parser.add_argument("--ops", default="auto", help="our kernels")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the choice to torch")
    parser.add_argument("overrides", nargs="*", help="other settings of every run, as for harness.launch")
    return parser


def seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def base_config(overrides: Sequence[str], arguments: argparse.Namespace) -> Config:
    """Settings of `train=quick` on the CPU in fp32, with warm-up and decay of whole steps."""
    with hydra_session():
        fixed = ["activations=minilm", "train=quick", "tracker=none"]
        config = from_container(compose_settings([*fixed, *overrides, *arguments.overrides]))
    train, batch = config.train, config.train.batch_tokens
    steps = int(arguments.tokens // batch)
    whole_steps = dataclasses.replace(
        train,
        tokens=float(steps * batch),
        warmup_tokens=float(round(train.warmup_tokens / batch) * batch),
        decay_fraction=round(train.decay_fraction * steps) / steps,
        precision="fp32",
        device="cpu",
    )
    return dataclasses.replace(config, train=whole_steps)


def with_seed(config: Config, seed: int) -> Config:
    """The same settings with other initial weights and another order of the rows."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=seed),
        stream=dataclasses.replace(config.stream, seed=seed),
    )


def with_lr_factor(config: Config, lr_factor: float) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, lr_factor=lr_factor))


def activations(config: Config, directory: Path | None, out: Path) -> ActivationSource:
    if directory is not None:
        return Store(directory)
    return open_source(config.activations, out, progress=True, stop=StopFlag())


def heading(config: Config, source: ActivationSource, ops: Ops) -> str:
    sae, train = config.sae, config.train
    parts = [
        f"{sae.architecture} n {sae.n_latents} k {sae.k} experts {sae.n_experts}",
        f"{train.tokens:.0f} tokens in batches of {train.batch_tokens}",
        f"lr factor {train.lr_factor:g}, warm-up {train.warmup_tokens:.0f}, decay {train.decay_fraction:.3f}",
        f"clip {train.clip_norm:g}, balance {sae.balance_weight:g}, aux {sae.aux_alpha:g}",
        f"dead after {sae.dead_after_tokens:.0f}",
        f"kernels {kernels(ops)}, store {source.id}",
    ]
    return "; ".join(parts)


def kernels(ops: Ops) -> str:
    """Name of a kernel set, which is a module."""
    return str(getattr(ops, "NAME", ops))


def new_member(config: Config, source: ActivationSource, ops: Ops) -> TrainState:
    return make_state(config, source, runtime(Solo(), ops))


def copy_of(params: Params) -> Params:
    return {name: value.clone() for name, value in params.items()}


def raw_batches(member: TrainState, source: ActivationSource) -> Iterator[Tensor]:
    """Every batch of the member's budget as the store has it, each seed from another place of the store.

    The first epoch of a store is in its own order whatever the seed, and these runs are shorter than an epoch.
    """
    batch, steps = member.config.train.batch_tokens, member.last
    places = max(1, source.train_rows // (steps * batch)) if source.train_rows else 1
    first = steps * (member.config.stream.seed % places)
    with source.stream(member.config.stream.seed, batch, CPU) as stream:
        for _, rows in zip(range(steps), stream.batches(first), strict=False):
            yield rows


def normalised_batches(member: TrainState, source: ActivationSource) -> Iterator[Float[Tensor, "tokens d"]]:
    """The same batches as the model sees them."""
    dtype = member.params["W_dec"].dtype
    for rows in raw_batches(member, source):
        yield member.normalizer(rows, dtype)


def train_ours(config: Config, source: ActivationSource, ops: Ops) -> TrainState:
    member = new_member(config, source, ops)
    for rows in raw_batches(member, source):
        member.train_step(rows, runtime(Solo(), ops))
    assert member.diverged_at() is None, "our run diverged"
    return member


def judge(member: TrainState, params: Params, source: ActivationSource, ops: Ops) -> Evaluation:
    """Held-out error of `params`, whoever trained them, over every held-out row; `member` says what SAE it is."""
    found = evaluate(member.sae, params, source, member.normalizer, (source.heldout_rows,), runtime(Solo(), ops))
    assert found is not None
    return found[0]


class Clock:
    """Prints one line per run with the seconds since the last one."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def line(self, label: str, evaluation: Evaluation) -> float:
        """Returns fvu; infinite if it is not a number, which loses every comparison."""
        seconds, self._at = time.monotonic() - self._at, time.monotonic()
        values = f"fvu {evaluation.fvu:.5f} ± {evaluation.fvu_se:.5f}  l0 {evaluation.l0:5.2f}"
        print(f"{label:58s} {values}  {seconds:6.1f} s", flush=True)
        return evaluation.fvu if math.isfinite(evaluation.fvu) else math.inf


def pairs_table(title: str, peer: str, runs: list[int], ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Print the pairs; returns the ratio of mean fvu, ours over theirs, and its standard error over the pairs."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.fmean(ours) / statistics.fmean(theirs)
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    print(f"\n{title}\n\n| seed | fvu, ours | fvu, {peer} | ratio |\n|---|---|---|---|")
    for seed, a, b, r in zip(runs, ours, theirs, ratios, strict=True):
        print(f"| {seed} | {a:.5f} | {b:.5f} | {r:.5f} |")
    print(f"| mean | {statistics.fmean(ours):.5f} | {statistics.fmean(theirs):.5f} | {ratio:.5f} ± {error:.5f} |\n")
    return ratio, error


def verdict(name: str, good: bool) -> bool:
    print(f"{'ok  ' if good else 'FAIL'} {name}", flush=True)
    return good


def finish(verdicts: Sequence[bool]) -> None:
    sys.exit(0 if all(verdicts) else 1)
