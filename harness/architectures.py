"""The names of the architectures and what the rest of the harness must know of each. The only list of names. No torch.

The maths of each is in `harness/saes/`, its source in `conf/sae/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Traits:
    """What settings, formulas of cost and the analysis need to know of an architecture."""

    per_batch: bool = False
    """Whether the k·B largest of a batch are active; otherwise the k largest of each token, or with a penalty all above
    a threshold."""
    by_decoder_norm: bool = False
    """Whether the k latents with the largest a·‖d‖ are active in training, and those above one threshold afterwards."""
    routed: bool = False
    """Whether a router sends each token to one of several experts."""
    penalty: Literal["", "l1", "l0", "tanh"] = ""
    """Of those that choose by threshold: whether the penalty grows with the activations, with their number (and is felt
    by thresholds alone), or with a tanh of them. Without one, `sae.k` sets the number and AuxK is defined."""
    unit_decoder: bool = True
    """Whether decoder rows have norm 1; otherwise they are free."""
    pre_bias: bool = True
    """Whether the encoder sees x − b_dec; otherwise x."""
    passes: int = 1
    """Times k: the active latents of a token that a step handles."""
    uses: int = 4
    """Times that a step multiplies an active latent with a row: decode, and three for the gradients, or more."""
    first_active: float = 0.0
    """Of those with a penalty whose first values do not leave `sae.target_l0` latents active: how many they do, but at
    most half of all."""
    vectors: tuple[str, ...] = ()
    """Further parameters, a number per latent each."""

    @property
    def per_token(self) -> bool:
        """Whether exactly the k largest latents of a token are active."""
        return not self.has_threshold and not self.penalty

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold that training measured, and did not learn, decides at inference."""
        return self.per_batch or self.by_decoder_norm


ARCHITECTURES: dict[str, Traits] = {
    "topk": Traits(),
    "switch": Traits(routed=True),
    "multi_topk": Traits(passes=4),
    "batchtopk": Traits(per_batch=True),
    "matryoshka": Traits(per_batch=True, uses=5),
    "topk_decoder_norm": Traits(by_decoder_norm=True, unit_decoder=False, pre_bias=False),
    "relu": Traits(penalty="l1"),
    "relu_decoder_norm": Traits(penalty="l1", unit_decoder=False, pre_bias=False),
    "gated": Traits(penalty="l1", uses=6, vectors=("r_mag", "b_mag")),
    "prolu": Traits(penalty="l1", first_active=math.inf),
    "jumprelu": Traits(penalty="l0", vectors=("log_threshold",)),
    # Conerly et al. 2025: at first every latent fires on 10,000/n of the tokens
    "jumprelu_tanh": Traits(
        penalty="tanh", unit_decoder=False, pre_bias=False, first_active=10_000, vectors=("log_threshold",)
    ),
}
