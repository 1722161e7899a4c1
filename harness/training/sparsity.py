"""The coefficient λ of a sparsity penalty: fixed, or steered so that L0 meets a target."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from harness.config import Config

FIRST = {"l1": 0.1, "l0": 0.1, "tanh": 0.1}
"""λ at the start of steering: per unit of √(E‖x‖²)/V for a penalty on activations, of 1/L0 for one on their number."""

PROPORTIONAL, INTEGRAL, FAR = {"log": 1.0, "linear": 20.0}, {"log": 30.0, "linear": 30.0}, {"log": 0.5, "linear": 0.1}
"""log: by how much log λ follows a change of log L0. linear: by how much λ, in units of its first value, follows the
distance of log L0 from its target. INTEGRAL: per step, times the learning rate, what a lasting distance adds: weights
move by about a learning rate a step. FAR: a distance beyond it counts as this in the sum, since λ must not run ahead
while L0 is on its way."""

SMOOTHING = {"log": 0.05, "linear": 0.25}
"""Share of a step's log L0 in the mean that is steered by."""


LEAST_L0, WIDEST_GAP = 1e-3, 0.5
"""Where log L0 is cut off, and the held-out gap: the first evaluations say little."""


class Sparsity:
    """λ of the next step, on the device, and the state of the controller.

    The controller is a PI rule on e = log(L0/target). L0 is that of the step's own batch, smoothed over about
    1/`SMOOTHING` steps, so nothing waits for the device. A penalty on activations acts through all weights:
    log λ += P·(e − e before) + I·e. A penalty on L0 acts on thresholds alone, which hardly move
    unless it outweighs the error, so λ = first·(s + P·e), s += I·e, as with a quadratic penalty on the distance from
    the target (dictionary_learning's JumpReLU). It may be negative: then it lowers thresholds. They move at full speed
    whatever λ is, so a mean over more steps oscillates.

    On documents that were not trained on more latents are active than on those that were. So every evaluation measures
    this gap, and L0 is steered to where it is at its target on held-out rows.
    """

    def __init__(self, config: Config, unit: float, device: torch.device) -> None:
        """`unit` = √(E‖x‖²)/V: what λ is measured in."""
        self.config = config
        sae = config.sae
        first = sae.sparsity or FIRST[sae.traits.penalty] * (unit if sae.traits.penalty == "l1" else 1 / sae.target_l0)
        self.first, self.rule = first, "linear" if sae.target_l0 and sae.traits.penalty == "l0" else "log"
        begin = 1.0 if self.rule == "linear" else math.log(first)
        self.state = torch.tensor([begin, 0.0, 0.0], dtype=torch.float64, device=device)
        """s or log λ; mean log(L0/target) of the last steps, the gap included; steps in that mean, at most
        1/`SMOOTHING`."""
        self.gap = torch.zeros((), dtype=torch.float64, device=device)
        """log(held-out L0 / training L0) at the last evaluation."""

    def warmup(self, done: int) -> float:
        """Factor of λ in step `done` (from 0)."""
        tokens = self.config.sae.sparsity_warmup_tokens
        return min(1.0, (done + 1) * self.config.train.batch_tokens / tokens) if tokens else 1.0

    def value(self, done: int) -> Float[Tensor, ""]:
        if self.rule == "linear":
            return self.first * (self.state[0] + PROPORTIONAL["linear"] * self.state[1]) * self.warmup(done)
        return self.state[0].exp() * self.warmup(done)

    def observe(self, l0: Float[Tensor, ""], done: int, lr: float) -> None:
        """Take note of the L0 of step `done`, whose learning rate is `lr`."""
        target = self.config.sae.target_l0
        if not target:
            return
        steered, before, count = self.state
        distance = (l0.double().clamp(min=LEAST_L0) / target).log() + self.gap
        count = (count + 1).clamp(max=1 / SMOOTHING[self.rule])
        now = before + (distance - before) / count
        far = FAR[self.rule]
        move = INTEGRAL[self.rule] * lr * now.clamp(-far, far)
        if self.rule == "log":
            move = move + PROPORTIONAL["log"] * (now - before) * (count > 1)
        # while λ still grows by itself, L0 says little about where it will end
        if self.warmup(done) == 1.0:
            steered = steered + move
        self.state.copy_(torch.stack([steered, now, count]))

    def aim(self, heldout_l0: float, training_l0: float) -> None:
        """Take note of L0 on held-out rows and on training rows, both at the present weights."""
        gap = math.log(max(heldout_l0, LEAST_L0) / max(training_l0, LEAST_L0))
        self.state[1] -= self.gap
        self.gap.fill_(max(-WIDEST_GAP, min(WIDEST_GAP, gap)))
        self.state[1] += self.gap
