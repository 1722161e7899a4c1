"""The experts of a Switch SAE: their load, and the tokens in which they differ from the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.gallery.subjects import Subject
from analysis.gallery.texts import Text

TOKENS = 12


def experts(subject: Subject, table: dict[str, Any], text: Text) -> list[dict[str, Any]]:
    """A line per expert; none for an SAE with one.

    `load`: its share of all activations, which is its share of the tokens where all tokens have equally many.
    `tokens`: those that are the strongest token of its latents more often than in the whole SAE; latents count by how
    often they are active.
    """
    owner, count = table["expert"], table["count"].astype(float)
    number = int(owner.max()) + 1
    if number == 1:
        return []
    words = text.tokens(table["top_tokens"][:, 0])
    weight = np.zeros((number, len(text.words) + 1))
    np.add.at(weight, (owner, words), count)
    weight[:, 0] = 0  # latents that were never active
    everywhere = weight.sum(axis=0)
    total = max(count.sum(), 1.0)
    lines = []
    for expert in range(number):
        share = weight[expert] / max(weight[expert].sum(), 1.0)
        gain = share - everywhere / total
        best = [int(word) for word in np.argsort(-gain, kind="stable")[:TOKENS] if gain[word] > 0]
        own = owner == expert
        lines.append(
            {
                "load": count[own].sum() / total,
                "latents": int(own.sum()),
                "live": int((count[own] > 0).sum()),
                "tokens": [{"token": word, "share": share[word]} for word in best],
            }
        )
    return lines


def expert_map(subject: Subject) -> list[list[float]]:
    """Mean over the rows of one expert of the largest cosine with another row of each; empty if it was not measured."""
    return [line["cosines"] for line in subject.lines("geometry", "expert_map")]
