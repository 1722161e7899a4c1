"""The coefficient λ of a sparsity penalty: fixed, or steered so that L0 meets a target."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from harness.config import Config

FIRST = {"l1": 0.1, "l0": 0.1}
"""λ at the start of steering: per unit of √(E‖x‖²)/V for a penalty on activations, of 1/L0 for one on their number."""

PROPORTIONAL, INTEGRAL = 1.0, 10.0
"""By how much log λ follows a change of log L0, and per step, times the learning rate, a lasting distance from its
target: weights move by about a learning rate a step."""

FAR = 0.5
"""A distance beyond this counts as this: while L0 is on its way, λ must not run ahead of it."""


class Sparsity:
    """λ of the next step, on the device, and the state of the controller.

    The controller is a PI rule on e = log(L0/target): log λ += P·(e − e before) + I·e. L0 is that of the step's own
    batch, smoothed over about 1/`SMOOTHING` steps, so nothing waits for the device.
    """

    SMOOTHING = 0.05

    def __init__(self, config: Config, unit: float, device: torch.device) -> None:
        """`unit` = √(E‖x‖²)/V: what λ is measured in."""
        self.config = config
        sae = config.sae
        first = sae.sparsity or FIRST[sae.traits.penalty] * (unit if sae.traits.penalty == "l1" else 1 / sae.target_l0)
        self.state = torch.tensor([math.log(first), 0.0, 0.0], dtype=torch.float64, device=device)
        """log λ; mean log(L0/target) of the last steps; steps in that mean, at most 1/`SMOOTHING`."""

    def warmup(self, done: int) -> float:
        """Factor of λ in step `done` (from 0)."""
        tokens = self.config.sae.sparsity_warmup_tokens
        return min(1.0, (done + 1) * self.config.train.batch_tokens / tokens) if tokens else 1.0

    def value(self, done: int) -> Float[Tensor, ""]:
        return self.state[0].exp() * self.warmup(done)

    def observe(self, l0: Float[Tensor, ""], done: int, lr: float) -> None:
        """Take note of the L0 of step `done`, whose learning rate is `lr`."""
        target = self.config.sae.target_l0
        if not target:
            return
        log_sparsity, before, count = self.state
        distance = (l0.double().clamp(min=1e-3) / target).log()
        count = (count + 1).clamp(max=1 / self.SMOOTHING)
        now = before + (distance - before) / count
        move = PROPORTIONAL * (now - before) * (count > 1) + INTEGRAL * lr * now.clamp(-FAR, FAR)
        # while λ still grows by itself, L0 says little about where it will end
        if self.warmup(done) == 1.0:
            log_sparsity = log_sparsity + move
        self.state.copy_(torch.stack([log_sparsity, now, count]))
