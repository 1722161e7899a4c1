"""One update, in this order: project the gradient of W_dec, clip the global norm, Adam or Signum, unit norm, EMA."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harness.config import TrainConfig
from harness.ops import AdamState, Hyper, Ops
from harness.parallel import Shards
from harness.process.runtime import Runtime
from harness.saes import Params, Sae

UNIT_ROWS = "W_dec"
"""The parameter whose rows have norm 1, unless the architecture leaves them free."""

THRESHOLD_RATE = 4.0
"""Learning rate of JumpReLU's log θ, in units of that of the others. Adam moves a parameter by about a learning rate a
step; log θ must follow pre-activations, which grow several-fold. At ten, L0 oscillates."""


class Optimizer:
    """Adam over the parameters of one SAE, the low-precision copies of the weights, and their moving average."""

    def __init__(self, sae: Sae, params: Params, config: TrainConfig, compute_dtype: torch.dtype) -> None:
        self.sae, self.params, self.config = sae, params, config
        self.grads: Params = {name: torch.zeros_like(value) for name, value in params.items()}
        # the gradient of b_dec is computed from that of b_enc, so it exists even without an encoder bias
        self.grads.setdefault("b_enc", params["W_enc"].new_zeros(params["W_enc"].shape[0]))
        self.moments = {name: AdamState(torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
        self.average = self._first_average()
        self.compute: Params = {name: params[name].to(compute_dtype) for name in ("W_enc", "W_dec")}
        self.rates: Float[Tensor, " two"] | None = None
        """The rates of the next update on the device, for a step as a CUDA graph; written by `set_rates`."""

    def _first_average(self) -> Params:
        """The average before the first update; empty without one."""
        return {name: torch.zeros_like(p) for name, p in self.params.items()} if self.config.ema else {}

    @property
    def saved(self) -> str:
        """What `averaged` returns, in words for the record."""
        return "exponential moving average" if self.average else "last step"

    def refresh_copies(self) -> None:
        """Update the low-precision copies after the parameters were loaded."""
        for name, copy in self.compute.items():
            copy.copy_(self.params[name])

    def _hyper(self, lr: float, number: int) -> Hyper:
        config = self.config
        return Hyper(lr, config.adam_beta1, config.adam_beta2, config.adam_eps, number, rates=self.rates)

    def set_rates(self, lr: float, number: int) -> None:
        """Prepare `rates`, if used, for update number `number`, without waiting for the device."""
        if self.rates is not None:
            for place, value in enumerate(self._hyper(lr, number).corrected()):
                self.rates[place].fill_(value)

    def apply(
        self, lr: float, number: int, finite: Bool[Tensor, ""], runtime: Runtime
    ) -> tuple[Bool[Tensor, ""], Float[Tensor, ""] | None]:
        """Make update number `number` (from 1), unless `finite` is false or the gradient norm is not finite.

        The decision is made on the device. Returns it, and the gradient norm before clipping if there is a limit.
        """
        config, norm, scale = self.config, None, None
        unit_decoder = self.sae.traits.unit_decoder
        if config.clip_norm and unit_decoder:
            runtime.ops.project(self.params[UNIT_ROWS], self.grads[UNIT_ROWS])
        if config.clip_norm:
            norm = self._gradient_norm(runtime.shards)
            scale = (config.clip_norm / norm).clamp(max=1.0)
            finite = finite & norm.isfinite()
        self._update(replace(self._hyper(lr, number), scale=scale), finite, runtime.ops)
        return finite, norm

    def _rate(self, name: str, lr: float) -> float:
        """The learning rate of a parameter."""
        return lr * (THRESHOLD_RATE if name == "log_threshold" and self.sae.traits.penalty == "l0" else 1.0)

    def _update(self, common: Hyper, finite: Bool[Tensor, ""], ops: Ops) -> None:
        """Change the parameters, their copies and their average where `finite` is true."""
        for name, param in self.params.items():
            unit = name == UNIT_ROWS and self.sae.traits.unit_decoder
            hyper = replace(
                common, lr=self._rate(name, common.lr), project=unit and not self.config.clip_norm, unit_rows=unit
            )
            copy = self.compute.get(name)
            low_precision = None if copy is param else copy
            ops.update(param, self.grads[name], self.moments[name], hyper, finite, low_precision)
        for name, average in self.average.items():
            average.lerp_(self.params[name], finite.to(average.dtype) * (1 - self.config.ema))

    def _gradient_norm(self, shards: Shards) -> Float[Tensor, ""]:
        squares = {"latent_rows": [], "replicated": []}
        for name, cut in self.sae.layout().items():
            squares[cut].append(self.grads[name].square().sum())
        local = shards.sum_(torch.stack(squares["latent_rows"]).sum(), "shard", "scalars")
        return (local + torch.stack(squares["replicated"]).sum()).sqrt()

    def averaged(self, updates: int) -> Params:
        """The weights to evaluate and save: the bias-corrected average with decoder rows renormalised to 1.

        Without an average, or before the first update, these are the weights themselves.
        """
        if not self.average or not updates:
            return self.params
        return self._unit({name: value / (1 - self.config.ema**updates) for name, value in self.average.items()})

    def _unit(self, params: Params) -> Params:
        """The same with decoder rows of norm 1, in place, unless they are free."""
        if self.sae.traits.unit_decoder:
            params[UNIT_ROWS] /= params[UNIT_ROWS].norm(dim=1, keepdim=True)
        return params

    def state(self) -> dict[str, Tensor]:
        """Name → tensor for everything that the trajectory depends on; the tensors themselves, not copies."""
        tensors = {f"params.{name}": value for name, value in self.params.items()}
        for name, moments in self.moments.items():
            tensors |= {f"adam_mean.{name}": moments.mean, f"adam_square.{name}": moments.square}
        return tensors | {f"average.{name}": value for name, value in self.average.items()}
