"""The coefficient λ of a sparsity penalty: fixed, or steered so that L0 meets a target."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from harness.config import Config

FIRST = 1e-3
"""λ at the start of steering, per unit of √(E‖x‖²)/V: a penalty much smaller than the error."""

PROPORTIONAL, INTEGRAL = 0.3, 0.01
"""By how much log λ follows a change of log L0, and a lasting distance from its target, per step."""

FASTEST = 0.05
"""log λ changes by no more than this in a step."""


class Sparsity:
    """λ of the next step, on the device, and the state of the controller.

    The controller is a PI rule on e = log(L0/target): log λ += P·(e − e before) + I·e. L0 is that of the step's own
    batch, smoothed over about 1/`SMOOTHING` steps, so nothing waits for the device.
    """

    SMOOTHING = 0.05

    def __init__(self, config: Config, unit: float, device: torch.device) -> None:
        """`unit` = √(E‖x‖²)/V: what λ is measured in."""
        self.config = config
        first = FIRST * unit if config.sae.target_l0 else config.sae.sparsity
        self.state = torch.tensor([math.log(first), 0.0, 0.0], dtype=torch.float64, device=device)
        """log λ; mean log(L0/target) of the last steps; steps in that mean, at most 1/`SMOOTHING`."""

    def warmup(self, done: int) -> float:
        """Factor of λ in step `done` (from 0)."""
        tokens = self.config.sae.sparsity_warmup_tokens
        return min(1.0, (done + 1) * self.config.train.batch_tokens / tokens) if tokens else 1.0

    def value(self, done: int) -> Float[Tensor, ""]:
        return self.state[0].exp() * self.warmup(done)

    def observe(self, l0: Float[Tensor, ""], done: int) -> None:
        """Take note of the L0 of step `done`."""
        target = self.config.sae.target_l0
        if not target:
            return
        log_sparsity, before, count = self.state
        distance = (l0.double().clamp(min=1e-3) / target).log()
        count = (count + 1).clamp(max=1 / self.SMOOTHING)
        now = before + (distance - before) / count
        move = PROPORTIONAL * (now - before) * (count > 1) + INTEGRAL * now
        # while λ still grows by itself, L0 says little about where it will end
        if self.warmup(done) == 1.0:
            log_sparsity = log_sparsity + move.clamp(-FASTEST, FASTEST)
        self.state.copy_(torch.stack([log_sparsity, now, count]))
