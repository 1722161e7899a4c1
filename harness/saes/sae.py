"""The resolved settings of an SAE, its parameters, and which of them are cut over shards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness.architectures import ARCHITECTURES, Traits
from harness.budget import aux_k
from harness.config import SaeConfig

Params = dict[str, Tensor]
"""W_enc, W_dec (rows, d); b_enc (rows) if any; b_dec (d); for Switch also W_r (experts, d), b_r (d); for some
architectures further vectors (rows), and for some `threshold` (1)."""

Cut = Literal["latent_rows", "replicated"]


@dataclass(frozen=True)
class Sae:
    """An SAE has one expert, unless it is a Switch SAE (Mudide et al. 2024): one or more, and a router."""

    architecture: str
    d_model: int
    n_latents: int
    k: int
    n_experts: int
    enc_bias: bool
    variance: float
    """V = E‖x − E x‖² of the training rows after normalisation: the unit of the loss."""
    aux_alpha: float
    aux_k: int
    balance_weight: float
    """λ of the balance term."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka: shares of the latents that reconstruct alone."""
    bandwidth: float = 0.0
    """JumpReLU: ε, the width of the kernel around a threshold, in units of pre-activations."""
    threshold_init: float = 0.0
    """JumpReLU: θ at the start, in units of pre-activations; 0: such that L0 is `target_l0`."""
    target_l0: float = 0.0
    """L0 that the penalty is steered to; 0: its coefficient is fixed."""
    preactivation_penalty: float = 0.0
    """JumpReLU with the tanh penalty: λ_P."""
    prolu: str = "ste"
    """ProLU: the rule for gradients."""
    routing: str = "learned"
    """Switch: `learned`, `random` or `hash`."""
    consistency: float = 0.0
    """Random routing: α of THOR's consistency term; if positive, a token trains two experts."""

    @property
    def traits(self) -> Traits:
        return ARCHITECTURES[self.architecture]

    @property
    def routed(self) -> bool:
        """Whether tokens go to one expert each."""
        return self.traits.routed

    @property
    def learns_routing(self) -> bool:
        """Whether the router has gradients, and its probability scales the reconstruction."""
        return self.routed and self.routing == "learned"

    @property
    def passes(self) -> int:
        return self.traits.passes

    @property
    def latents_per_expert(self) -> int:
        return self.n_latents // self.n_experts

    def layout(self) -> dict[str, Cut]:
        """Every parameter by name, and whether it is cut by rows of latents or held whole by every rank."""
        cuts: dict[str, Cut] = {"W_enc": "latent_rows", "W_dec": "latent_rows"}
        if self.enc_bias:
            cuts["b_enc"] = "latent_rows"
        cuts["b_dec"] = "replicated"
        if self.routed and self.routing != "random":
            cuts |= {"W_r": "replicated", "b_r": "replicated"}
        cuts |= dict.fromkeys(self.traits.vectors, "latent_rows")
        if self.traits.has_threshold:
            cuts["threshold"] = "replicated"
        return cuts

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole parameter."""
        n, d, experts = self.n_latents, self.d_model, self.n_experts
        shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,), "W_r": (experts, d), "b_r": (d,), "threshold": (1,)}
        return shapes.get(name, (n,))


def resolve_sae(
    config: SaeConfig, d_model: int, variance: float, raw_variance: float, mean_sq_norm: float = 1.0
) -> Sae:
    """Fill in what depends on the activations.

    `variance` is V and `mean_sq_norm` E‖x‖², both in normalised units, `raw_variance` V in the model's own: Switch's
    published α corresponds to λ = α·d/V with V in raw units, since its loss is not divided by V.
    """
    unit = math.sqrt(mean_sq_norm)
    balance = config.balance_alpha * d_model / raw_variance if config.balance_alpha else config.balance_weight
    return Sae(
        architecture=config.architecture,
        d_model=d_model,
        n_latents=config.n_latents,
        k=config.k,
        n_experts=config.n_experts,
        enc_bias=config.enc_bias,
        variance=variance,
        aux_alpha=config.aux_alpha,
        aux_k=aux_k(config, d_model),
        balance_weight=balance if ARCHITECTURES[config.architecture].routed and config.routing == "learned" else 0.0,
        prefixes=tuple(config.prefixes),
        bandwidth=config.bandwidth * unit,
        threshold_init=config.threshold_init * unit,
        preactivation_penalty=config.preactivation_penalty,
        target_l0=config.target_l0,
        prolu=config.prolu,
        routing=config.routing,
        consistency=config.consistency,
    )
