"""The resolved settings of an SAE, its parameters, and which of them are cut over shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness.budget import aux_k
from harness.config import SaeConfig

Params = dict[str, Tensor]
"""W_enc, W_dec (rows, d); b_enc (rows) if any; b_dec (d); for Switch also W_r (experts, d), b_r (d)."""

Cut = Literal["latent_rows", "replicated"]


@dataclass(frozen=True)
class Sae:
    """A TopK SAE (Gao et al. 2024) has one expert, a Switch SAE (Mudide et al. 2024) one or more and a router."""

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

    @property
    def routed(self) -> bool:
        """Whether tokens go to one expert each, with a router that learns."""
        return self.architecture == "switch"

    @property
    def latents_per_expert(self) -> int:
        return self.n_latents // self.n_experts

    def layout(self) -> dict[str, Cut]:
        """Every parameter by name, and whether it is cut by rows of latents or held whole by every rank."""
        cuts: dict[str, Cut] = {"W_enc": "latent_rows", "W_dec": "latent_rows"}
        if self.enc_bias:
            cuts["b_enc"] = "latent_rows"
        cuts["b_dec"] = "replicated"
        if self.routed:
            cuts |= {"W_r": "replicated", "b_r": "replicated"}
        return cuts


def resolve_sae(config: SaeConfig, d_model: int, variance: float, raw_variance: float) -> Sae:
    """Fill in what depends on the activations.

    `variance` is V in normalised units, `raw_variance` in the model's own: Switch's published α corresponds to
    λ = α·d/V with V in raw units, since its loss is not divided by V.
    """
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
        balance_weight=balance if config.architecture == "switch" else 0.0,
    )
