"""What a latent writes: the tokens that its decoder row promotes, and what its ablation does to the next token.

The logit lens is W_U·(γ ⊙ d_i), less its mean over the vocabulary: γ, the gain of the final norm, changes the ranks. It
neglects the blocks after the hook, the ablation does not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harness.activations.lm.hook import find_blocks
from harness.activations.lm.splice import SplicedModel

TOKENS = 10
"""Promoted, and as many suppressed."""


class Lens:
    """The output layer of a causal model, with the gain of its final norm."""

    def __init__(self, model: SplicedModel) -> None:
        causal: Any = model.hooked.model
        self._unembed: Tensor = causal.get_output_embeddings().weight.detach().float()
        self._gain, self._centred = final_gain(causal.base_model, self._unembed)

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows vocabulary"]:
        """Changes of logits, of mean 0, per unit of each row."""
        rows = rows.to(self._unembed)
        if self._centred:
            rows = rows - rows.mean(dim=1, keepdim=True)
        logits = (rows * self._gain) @ self._unembed.T
        return logits - logits.mean(dim=1, keepdim=True)


def final_gain(base: nn.Module, like: Float[Tensor, "vocabulary d"]) -> tuple[Float[Tensor, " d"], bool]:
    """γ of the last norm of a base model, and whether that norm subtracts the mean; 1 where there is none.

    The norm is asked and not its parameters, whose meaning differs (Gemma's weight is γ − 1): rows of ±1 have mean 0
    and norm √d, so the norm multiplies them by γ and adds its bias.
    """
    name, _ = find_blocks(base)
    around = base.get_submodule(name.rpartition(".")[0])
    d = like.shape[1]
    norms = [module for module in around.children() if "norm" in type(module).__name__.lower()]
    if not norms or d % 2:
        return like.new_ones(d), False
    norm = copy.deepcopy(norms[-1]).float()
    signs = like.new_ones(d)
    signs[1::2] = -1
    with torch.no_grad():
        plus, minus, ones = (norm(row[None])[0].float() for row in (signs, -signs, torch.ones_like(signs)))
    bias = (plus + minus) / 2
    return (plus - minus) / 2 * signs, bool((ones - bias).abs().max() < 1e-3 * (plus - bias).abs().max())


def ablation(
    model: SplicedModel,
    ids: Int[Tensor, "1 length"],
    hidden: Float[Tensor, "1 length d"],
    contribution: Float[Tensor, " d"],
    most: int = 5,
) -> dict[str, Any]:
    """The next token with and without what a latent adds at the last position: KL in nats, and the tokens whose
    probability changes most."""
    without = hidden.clone()
    without[0, -1] -= contribution.to(without)
    p, q = (model.logits(ids, each, exact=True)[0, -1].double().log_softmax(0) for each in (hidden, without))
    change = q.exp() - p.exp()
    both = torch.cat([change.topk(most).indices, (-change).topk(most).indices]).tolist()
    return {
        "kl": float((p.exp() * (p - q)).sum()),
        "tokens": [{"token": t, "with": float(p[t].exp()), "without": float(q[t].exp())} for t in both],
    }
