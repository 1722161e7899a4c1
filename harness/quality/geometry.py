"""Where the dictionary's rows lie: duplicates, nearest neighbours, and whether the experts of a Switch SAE repeat each
other.

A latent is a duplicate if *some* other row has a cosine above 0.9 with its own; it counts once, however many there are.
The rows are compared in blocks, so memory grows with n·2048 and not with n².
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.quality.clusters import mean
from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

VERSION = 2
DUPLICATE = 0.9
NEIGHBOURS = 10
"""Of a row, for the purity of experts."""
_BLOCK = 2048
_RANDOM_ROWS = 2048
"""Random rows whose nearest neighbours among n are asked for."""


class Neighbours(NamedTuple):
    nearest: Float[Tensor, " n"]
    """Largest cosine with another row."""
    which: Int[Tensor, " n"]
    """That row."""
    by_group: Float[Tensor, "n groups"]
    """Largest cosine with another row of each group."""
    purity: Float[Tensor, " n"]
    """Share of the `NEIGHBOURS` nearest rows that belong to the row's own group."""


def neighbours(
    rows: Float[Tensor, "n d"], groups: Int[Tensor, " n"], block: int = _BLOCK, first: int | None = None
) -> Neighbours:
    """Nearest other rows by cosine, over all rows and by group (numbered from 0), of all rows or of the `first`.
    O(n²·d) time, O(n·block) memory."""
    n, count = rows.shape[0], int(groups.max()) + 1
    asked = n if first is None else min(first, n)
    wanted = min(NEIGHBOURS if count > 1 else 1, n - 1)
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    order = groups.argsort(stable=True)
    place = order.argsort()
    sorted_unit, sizes = unit[order], torch.bincount(groups, minlength=count).tolist()
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, asked, block):
        own = torch.arange(start, min(start + block, asked), device=rows.device)
        cosines = unit[own] @ sorted_unit.T
        cosines[own - start, place[own]] = -torch.inf
        by_group = torch.stack([part.max(dim=1).values for part in cosines.split(sizes, dim=1)], dim=1)
        top = cosines.topk(wanted, dim=1)
        same = groups[order[top.indices]] == groups[own, None]
        parts.append((top.values[:, 0], order[top.indices[:, 0]], by_group, same.float().mean(dim=1)))
    return Neighbours(*(torch.cat(column) for column in zip(*parts, strict=True)))


def expert_map(found: Neighbours, groups: Int[Tensor, " n"]) -> Float[Tensor, "groups groups"]:
    """At (e, f): mean over the rows of e of the largest cosine with another row of f. Not symmetric."""
    count = found.by_group.shape[1]
    sums = torch.zeros(count, count).index_add_(0, groups, found.by_group)
    return sums / torch.bincount(groups, minlength=count)[:, None]


def judge(sae: TrainedSae) -> Outcome:
    """All figures of one SAE."""
    n, experts = sae.sae.n_latents, sae.sae.n_experts
    groups = torch.arange(n) // (n // experts)
    decoder, encoder = sae.W_dec.float().cpu(), sae.W_enc.float().cpu()
    found = neighbours(decoder, groups)
    in_encoder = neighbours(encoder, groups)
    duplicate = (found.nearest > DUPLICATE).double()
    frequency = sae.frequency.cpu()
    dead = float((sae.fire_counts == 0).double().mean())
    generator = torch.Generator().manual_seed(0)
    chance = neighbours(torch.randn(decoder.shape, generator=generator), groups, first=_RANDOM_ROWS)
    values = {
        "duplicates": mean(duplicate),
        "duplicates_by_frequency": Value(float((duplicate * frequency).sum() / frequency.sum().clamp_min(1e-30))),
        "nearest_cosine": mean(found.nearest),
        "nearest_cosine_random": mean(chance.nearest),
        "encoder_nearest_cosine": mean(in_encoder.nearest),
        "encoder_decoder_cosine": mean(torch.nn.functional.cosine_similarity(encoder, decoder, dim=1)),
        "never_fired": Value(dead),
    }
    curves = {}
    if experts > 1:
        # the same rows with permuted labels: what experts that know nothing of each other would give
        shuffled = groups[torch.randperm(n, generator=generator)]
        control = neighbours(decoder, shuffled)
        own = found.by_group.gather(1, groups[:, None]).squeeze(1)
        values |= {
            "expert_purity": mean(found.purity),
            "expert_purity_encoder": mean(in_encoder.purity),
            "expert_purity_shuffled": mean(control.purity),
            "expert_purity_chance": Value(1 / experts),
            "nearest_in_own_expert": mean((own == found.nearest).double()),
        }
        for name, result, labels in (("expert_map", found, groups), ("expert_map_shuffled", control, shuffled)):
            table = expert_map(result, labels)
            off = ~torch.eye(experts, dtype=torch.bool)
            values[name.replace("map", "overlap")] = Value(float(table[off].mean()))
            curves[name] = [{"expert": e, "cosines": row.tolist()} for e, row in enumerate(table)]
    per_latent = {
        "nearest_cosine": found.nearest.numpy(),
        "nearest": found.which.numpy(),
        "frequency": frequency.numpy(),
        "expert": groups.numpy(),
    }
    return Outcome(0, values, per_latent, curves=curves)


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    shared.progress.start("geometry", len(subjects))
    for number, subject in enumerate(subjects, 1):
        yield subject, judge(subject.load())
        shared.tick(number)
