"""The names of the architectures and what the rest of the harness must know of each. The only list of names. No torch.

The maths of each is in `harness/saes/`, its source in `conf/sae/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Traits:
    """What settings, formulas of cost and the analysis need to know of an architecture."""

    chooses: Literal["per token", "per batch", "by threshold"]
    """Which latents are active: the k largest of each token, the k·B largest of a batch, or all above a threshold."""
    routed: bool = False
    """Whether a router sends each token to one of several experts."""
    penalty: Literal["", "l1", "l0"] = ""
    """Of those that choose by threshold: whether the penalty grows with the activations or with their number."""
    unit_decoder: bool = True
    """Whether decoder rows have norm 1; otherwise they are free."""
    pre_bias: bool = True
    """Whether the encoder sees x − b_dec; otherwise x."""
    passes: int = 1
    """Times k: the active latents of a token that a step handles."""
    uses: int = 4
    """Times that a step multiplies an active latent with a row: decode, and three for the gradients, or more."""
    vectors: tuple[str, ...] = ()
    """Further parameters, a number per latent each."""

    @property
    def aux(self) -> bool:
        """Whether AuxK is defined for it."""
        return not self.penalty

    @property
    def has_k(self) -> bool:
        """Whether `sae.k` sets the number of active latents; otherwise `sae.target_l0` or `sae.sparsity` does."""
        return not self.penalty


ARCHITECTURES: dict[str, Traits] = {
    "topk": Traits("per token"),
    "switch": Traits("per token", routed=True),
    "multi_topk": Traits("per token", passes=4),
    "batchtopk": Traits("per batch"),
    "matryoshka": Traits("per batch", uses=5),
    "relu": Traits("by threshold", penalty="l1"),
    "relu_decoder_norm": Traits("by threshold", penalty="l1", unit_decoder=False, pre_bias=False),
    "gated": Traits("by threshold", penalty="l1", uses=6, vectors=("r_mag", "b_mag")),
    "prolu": Traits("by threshold", penalty="l1"),
    "jumprelu": Traits("by threshold", penalty="l0", vectors=("log_threshold",)),
    "jumprelu_tanh": Traits(
        "by threshold", penalty="l0", unit_decoder=False, pre_bias=False, vectors=("log_threshold",)
    ),
}
