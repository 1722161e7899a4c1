"""What a language model loses when explanations stand in for activations: reconstruction from simulated activations.

For the explained latents R, x̂ = decode(a) becomes decode(a with ŝ_i for a_i, i ∈ R). ŝ is one of

* `patterns`: c_i·s_i, s the activation that the patterns predict and c_i = E[s a]/E[s²];
* `tokens`: E[a_i | this token and the one before], else E[a_i | this token], else E[a_i]: a table without a pattern;
* `mean`: E[a_i], which is the ablation to the mean.

Expectations are of the documents that the patterns were built from; losses are of the others. As the explained latents
are few, losses rise little: they are told per removed energy, which is Σ‖x̂ − x̂(ŝ)‖² as a share of Σ‖x − mean‖².
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.quality.clusters import by_document, ratio
from harness.quality.downstream import Splice, of_rows, spliced_sums
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.trained import TokenCodes, TrainedSae

_BATCH = 4096

Activations = Float[Tensor, "places explained"]
"""Of the explained latents, at every place of the flattened text."""


def pattern_activations(true: Activations, simulated: Activations, known: Bool[Tensor, " places"]) -> Activations:
    """c_i·s_i; `known`: the places that decide c."""
    s, a = simulated[known].double(), true[known].double()
    scale = (s * a).sum(dim=0) / s.square().sum(dim=0).clamp_min(1e-30)
    return simulated * scale.float()


def token_activations(
    true: Activations, ids: Int[Tensor, "contexts length"], known: Bool[Tensor, " places"]
) -> Activations:
    """The mean activation after the same two tokens, else at the same token, else of all `known` places."""
    token = ids.flatten()
    before = torch.cat([ids.new_full((len(ids), 1), -1), ids[:, :-1]], dim=1).flatten()
    found = true[known].mean(dim=0).expand_as(true).clone()
    for key in (token, (before + 1) * (int(token.max()) + 1) + token):  # what is more specific comes last
        groups, group = key.unique(return_inverse=True)
        count = torch.zeros(len(groups)).index_add_(0, group[known], torch.ones(int(known.sum())))
        total = true.new_zeros(len(groups), true.shape[1]).index_add_(0, group[known], true[known])
        seen = count[group] > 0
        found[seen] = (total / count.clamp_min(1)[:, None])[group[seen]]
    return found


def with_activations(
    codes: TokenCodes, explained: Int[Tensor, " explained"], activations: Float[Tensor, "tokens explained"]
) -> TokenCodes:
    """`codes` with these effective activations of the explained latents instead of their own."""
    explained, activations = explained.to(codes.index.device), activations.to(codes.values)
    values = effective(codes).masked_fill(torch.isin(codes.index, explained), 0.0)
    return replace(
        codes,
        values=torch.cat([values, activations], dim=1),
        index=torch.cat([codes.index, explained.expand_as(activations).to(codes.index)], dim=1),
        gate=None,
    )


def reconstruction(
    sae: TrainedSae,
    shared: Shared,
    explained: Sequence[int],
    true: Activations,
    simulated: Activations,
    built_on: Bool[Tensor, " contexts"],
    label: str,
) -> dict[str, Value]:
    """`energy`, `kl_increase` and `kl_per_energy` (nats per position, for all of the variance removed at this price);
    of `tokens` and `mean` with these at the end. `built_on`: contexts of the documents that patterns were built from.
    Raises `Interrupted`."""
    text = shared.text
    known = (text.kept & built_on[:, None]).flatten()
    latents = torch.tensor(list(explained))
    instead = {
        "": pattern_activations(true, simulated, known),
        "_tokens": token_activations(true, text.ids, known),
        "_mean": true[known].mean(dim=0).expand_as(true),
    }

    def replaced(activations: Activations) -> Splice:
        return lambda rows, places: sae.decode(with_activations(sae.encode(rows), latents, activations[places]))

    splices = {name: replaced(activations) for name, activations in instead.items()}
    judged = (~built_on).nonzero().flatten()
    sums = spliced_sums(shared, {"true": of_rows(sae.forward), **splices}, contexts=judged, label=label)
    positions, variance = sums["true"]["positions"].sum(), sums["true"]["variance"].sum()
    removed = energies(sae, shared, splices, judged)
    values = {}
    for name in splices:
        increase, energy = sums[name]["kl"] - sums["true"]["kl"], removed[name] / variance
        values[f"energy{name}"] = Value(float(energy.sum()))
        values[f"kl_increase{name}"] = ratio(increase, sums["true"]["positions"])
        values[f"kl_per_energy{name}"] = ratio(increase / positions, energy)
    return values


def energies(
    sae: TrainedSae, shared: Shared, splices: dict[str, Callable[[Tensor, Tensor], Tensor]], judged: Tensor
) -> dict[str, Tensor]:
    """Σ‖x̂ − x̂(ŝ)‖² of each document."""
    text = shared.text
    places = torch.arange(text.ids.numel()).reshape(text.ids.shape)[judged][text.kept[judged]]
    hidden, owner = text.hidden.flatten(0, 1), text.document.repeat_interleave(text.ids.shape[1])
    total = {name: torch.zeros(text.documents, dtype=torch.float64) for name in splices}
    for part in places.split(_BATCH):
        rows = hidden[part]
        own = sae.forward(rows)
        for name, splice in splices.items():
            change = (splice(rows, part) - own).square().sum(dim=1)
            total[name] += by_document(change, owner[part], text.documents)
    return total
