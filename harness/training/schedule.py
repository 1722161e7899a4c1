"""When things happen: learning rate, evaluations, convergence. Pure functions of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from harness.budget import learning_rate
from harness.config import Config

HALVINGS_PER_DOUBLING = 4
"""With `until=convergence`: evaluations per doubling of the tokens."""

MFR_RAMP_STEPS = 100
"""Steps until `train.mfr_weight` is reached, as in the published code."""

FIRST_EVALUATION_STEP = 16
"""Runs to convergence have no evaluation before this step."""

STEERED_REST = (1.0, 0.5, 0.25)
"""With a target of L0: shares of the decay of the learning rate that are left at its further evaluations."""


def lr_at(config: Config, step: int, last: int) -> float:
    """Learning rate of step `step` (from 0) of `last`: linear warm-up, then as `train.schedule` says."""
    train = config.train
    factor = 1.0
    if train.warmup_tokens:
        factor = min(factor, (step + 1) * train.batch_tokens / train.warmup_tokens)
    if train.schedule in ("linear", "cosine"):
        begin = min(last - 1, train.warmup_tokens // train.batch_tokens)
        rest = min(1.0, (last - step) / (last - begin))
        factor = min(factor, rest if train.schedule == "linear" else (1 - math.cos(math.pi * rest)) / 2)
    decay_steps = train.decay_fraction * last
    if decay_steps:
        factor = min(factor, (last - step) / decay_steps)
    return learning_rate(config) * factor


def mfr_weight_at(config: Config, step: int) -> float:
    """Weight of mutual feature regularisation in step `step` (from 0): it rises along a cosine."""
    return config.train.mfr_weight * (1 - math.cos(math.pi * min(1.0, step / MFR_RAMP_STEPS))) / 2


def k_at(config: Config, step: int, last: int) -> int:
    """Active latents per token of step `step` (from 0) of `last`."""
    sae = config.sae
    rest = 1 - step / (sae.k_anneal_fraction * last) if sae.k_anneal_fraction else 0.0
    return sae.k + round(max(0.0, rest) * (sae.first_k - sae.k))


def evaluation_steps(config: Config, last: int) -> frozenset[int]:
    """The numbers of completed steps after which the SAE is evaluated, `last` excluded.

    They are evenly spaced in log tokens, two per doubling (four with `until=convergence`): all but the first few
    evaluations have another one at half their tokens. A steered L0 needs some more while the learning rate decays.
    """
    if config.train.until == "convergence":
        steps = (round(last * 2 ** (-j / HALVINGS_PER_DOUBLING)) for j in range(1, 200))
        return frozenset(s for s in steps if FIRST_EVALUATION_STEP <= s < last)
    steps = [round(last * 2 ** (-j / 2)) for j in range(1, config.train.eval_points + 1)]
    if config.sae.target_l0 and config.train.decays and config.train.eval_points:
        decay = (config.train.decay_fraction or 1.0) * last
        steps += [last - round(rest * decay) for rest in STEERED_REST]
    return frozenset(s for s in steps if 0 < s < last)


def has_converged(config: Config, evaluations: Mapping[int, float], done: int) -> bool:
    """Whether held-out fvu improved by less than ε, relative, over the last doubling of tokens.

    `evaluations` maps completed steps to fvu, always of the same rows. Never true with a decaying learning rate, nor
    while the earlier of the two points lies in the warm-up.
    """
    half = None if config.train.decays else half_of(config, evaluations, done)
    return half is not None and evaluations[done] > (1 - config.train.convergence_epsilon) * evaluations[half]


def half_of(config: Config, evaluations: Mapping[int, Any], done: int) -> int | None:
    """The evaluated step with half the tokens of `done`; None if there is none, or if it lies in the warm-up."""
    if done not in evaluations:
        return None
    half = min(evaluations, key=lambda step: abs(step - done / 2))
    late = half * config.train.batch_tokens >= config.train.warmup_tokens
    return half if abs(half - done / 2) <= 1 and late else None


def gain(now: ArrayLike, half: ArrayLike) -> tuple[float, float]:
    """(relative fall of the held-out error over a doubling of tokens, its standard error).

    `now` and `half` are the sums of the error over the same groups of documents (`HeldOutErrors.error_sums`). The
    variance of the rows is the same at both times, and what makes a document hard for both cancels.
    """
    after, before = np.asarray(now), np.asarray(half)
    with np.errstate(invalid="ignore", divide="ignore"):  # a run that blew up, or one without any error
        ratio = float(after.sum() / before.sum())
        apart = after / after.sum() - before / before.sum()
    return 1 - ratio, ratio * float(np.linalg.norm(apart)) * math.sqrt(len(apart) / max(1, len(apart) - 1))
