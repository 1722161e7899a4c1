"""Signum with the schedule-free average (Defazio et al. 2024, arXiv 2405.15682), in plain torch.

Three sequences: z moves by the learning rate against the sign of the gradient, x is the mean of the z weighted by the
squares of their learning rates, and gradients are taken at y = (1 − β)·z + β·x, which the parameters hold. x is
evaluated and saved. Decoder rows of z and y have norm 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from harness.config import TrainConfig
from harness.ops import Hyper, Ops
from harness.saes import Params, Sae
from harness.training.optimizer import UNIT_ROWS, Optimizer


class Signum(Optimizer):
    def __init__(self, sae: Sae, params: Params, config: TrainConfig, compute_dtype: torch.dtype) -> None:
        super().__init__(sae, params, config, compute_dtype)
        self.moments = {}
        self.fast: Params = {name: param.clone() for name, param in params.items()}
        """z."""
        self.weight = torch.zeros((), dtype=torch.float64, device=params["W_dec"].device)
        """Sum of the weights of the z so far."""

    def _first_average(self) -> Params:
        return {name: param.clone() for name, param in self.params.items()}

    def _update(self, common: Hyper, finite: Bool[Tensor, ""], ops: Ops) -> None:
        unit_decoder, lr = self.sae.traits.unit_decoder, common.lr
        # where the update is withheld, z gets no step and the newest z no weight
        step, weight = finite.double() * lr, finite.double() * lr**2
        self.weight += weight
        share = torch.where(self.weight > 0, weight / self.weight, 0.0)
        if unit_decoder and not self.config.clip_norm:
            ops.project(self.params[UNIT_ROWS], self.grads[UNIT_ROWS])
        for name, fast in self.fast.items():
            sign = torch.where(finite, self.grads[name].sign(), 0.0)
            fast.sub_(sign * (step * self._rate(name, 1.0)).to(fast.dtype))
        self._unit(self.fast)
        for name, param in self.params.items():
            average = self.average[name].lerp_(self.fast[name], share.to(param.dtype))
            moved = torch.lerp(self.fast[name], average, self.config.signum_beta)
            if name == UNIT_ROWS and unit_decoder:
                moved /= moved.norm(dim=1, keepdim=True)
            param.copy_(torch.where(finite, moved, param))
        self.refresh_copies()

    @property
    def saved(self) -> str:
        return "schedule-free average"

    def averaged(self, updates: int) -> Params:
        return self._unit({name: value.clone() for name, value in self.average.items()}) if updates else self.params

    def state(self) -> dict[str, Tensor]:
        fast = {f"fast.{name}": value for name, value in self.fast.items()}
        return super().state() | fast | {"signum_weight": self.weight}


OPTIMIZERS = {"adam": Optimizer, "signum": Signum}
