"""Sparse probing in the form of SAEBench: how well K latents classify a text.

Activations are pooled over the tokens of a text (their mean). The K latents with the largest difference between the
means of the two classes are chosen on training texts, a logistic regression (C = 1) is fitted on them, and its accuracy
is that on other texts. Beside it the same with channels in place of latents, and a probe on all channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.quality.clusters import mean
from harness.quality.logistic import fit_all, logistic
from harness.quality.probe_sets import SetRows
from harness.quality.refinement import effective
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

KS = (1, 2, 5)
_BATCH = 4096


def pooled_codes(
    sae: TrainedSae, tokens: Float[Tensor, "tokens d"], owner: Int[Tensor, " tokens"], texts: int
) -> Float[Tensor, "texts n"]:
    """Mean activation of each latent over the tokens of each text."""
    sums = torch.zeros(texts, sae.sae.n_latents)
    for start in range(0, len(tokens), _BATCH):
        codes = sae.encode(tokens[start : start + _BATCH].float())
        own = owner[start : start + _BATCH, None].expand(codes.index.shape)
        sums.index_put_((own, codes.index.cpu()), effective(codes).float().cpu(), accumulate=True)
    return sums / torch.bincount(owner, minlength=texts).clamp_min(1)[:, None]


def accuracy_of(
    features: Float[Tensor, "texts n"], y: Bool[Tensor, " texts"], train: Bool[Tensor, " texts"], k: int
) -> float:
    """Accuracy on the texts that are not for training, of a regression on the k features that differ most."""
    own, labels = features[train], y[train]
    gap = (own[labels].mean(dim=0) - own[~labels].mean(dim=0)).abs()
    chosen = gap.topk(min(k, len(gap))).indices
    weight = logistic(own[:, chosen], labels, 1 / len(own))
    logits = features[~train][:, chosen].double() @ weight[:-1] + weight[-1]
    return float(((logits > 0) == y[~train]).double().mean())


def _pooled(rows: SetRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, the text of each, labels, and which texts are for training, of the texts whose tokens are kept."""
    assert rows.tokens is not None and rows.owner is not None
    texts = int(rows.owner.max()) + 1
    return rows.tokens, rows.owner, rows.label[:texts], rows.train[:texts]


def channel_accuracies(sets: Mapping[str, SetRows]) -> dict[str, Value]:
    """What no SAE is needed for: the best channels, and all of them. Means over sets."""
    found: dict[str, list[float]] = {}
    for rows in sets.values():
        if rows.tokens is None:
            continue
        tokens, owner, y, train = _pooled(rows)
        sums = torch.zeros(len(y), tokens.shape[1]).index_add_(0, owner, tokens.float())
        x = sums / torch.bincount(owner, minlength=len(y)).clamp_min(1)[:, None]
        for k in KS:
            found.setdefault(f"accuracy_channels_k{k}", []).append(accuracy_of(x, y, train, k))
        says = fit_all(x[train], y[train])(x[~train]) > 0
        found.setdefault("accuracy_full", []).append(float((says == y[~train]).double().mean()))
    return {name: mean(torch.tensor(values)) for name, values in found.items()}


def accuracies(sae: TrainedSae, sets: Mapping[str, SetRows]) -> dict[str, Value]:
    """Mean accuracy over sets for each K of `KS`; nothing without sets."""
    found: dict[str, list[float]] = {}
    for rows in sets.values():
        if rows.tokens is None:
            continue
        tokens, owner, y, train = _pooled(rows)
        codes = pooled_codes(sae, tokens, owner, len(y))
        for k in KS:
            found.setdefault(f"accuracy_k{k}", []).append(accuracy_of(codes, y, train, k))
    return {name: mean(torch.tensor(values)) for name, values in found.items()}
