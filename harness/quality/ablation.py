"""How many output logits a latent touches: the sparsity of what ablating it changes.

At token τ the contribution a_i·d_i of one active latent is subtracted from the value at the hook (at τ only; the error
of the SAE stays in). v = the change of the logits at τ … τ + 15, less its median over the vocabulary in each row,
since a constant shift changes no probability. S = (‖v‖₁/‖v‖₂)² / (number of entries of v): 2/π for a Gaussian v, 1
over that number if a single logit changes. Beside it: random directions of the same norms, and channels of the stream
set to their mean. In fp32, because rounding to bf16 is dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from harness.quality.clusters import mean
from harness.quality.metric import Outcome, Subject
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

VERSION = 2
TOKENS = 50
LATER = 16
"""Rows of logits, from that of the token on."""
FIRST = 8
"""τ lies in the first `FIRST` … `FIRST` + `LATER` positions, so that prefixes are short."""
LATENTS = 8
"""Active latents of a token that are ablated, chosen at random."""
CONTROLS = 2
"""Random directions and channels per token."""


def sparsity(change: Float[Tensor, "variants rows v"]) -> Float64[Tensor, " variants"]:
    """S of each variant; NaN where nothing changes but a constant of each row."""
    first = torch.zeros(len(change), dtype=torch.float64, device=change.device)
    second = torch.zeros_like(first)
    for row in range(change.shape[1]):
        v = change[:, row] - _median(change[:, row])
        first += v.norm(p=1, dim=1, dtype=torch.float64)
        second += v.norm(dim=1, dtype=torch.float64).square()
    entries = change.shape[1] * change.shape[2]
    return (first.square() / second / entries).where(second > 0, torch.nan).cpu()


def _median(rows: Float[Tensor, "rows v"]) -> Float[Tensor, "rows 1"]:
    """The lower median. On processors numpy selects it fifteen times as fast as torch."""
    if rows.device.type != "cpu":
        return rows.median(dim=1, keepdim=True).values
    middle = (rows.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(rows.numpy(), middle, axis=1)[:, middle, None])


def chosen_places(shared: Shared) -> list[tuple[int, int]]:
    """Context and position of `TOKENS` tokens, spread over the contexts."""
    kept, length = shared.text.kept, shared.text.ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    places = []
    for context in torch.randperm(len(kept), generator=generator).tolist():
        position = min(FIRST, length // 4) + int(torch.randint(LATER, (), generator=generator))
        if position + LATER <= length and bool(kept[context, position]):
            places.append((context, position))
        if len(places) == TOKENS:
            break
    return places


def changes(
    shared: Shared, context: int, position: int, replaced: Float[Tensor, "variants d"]
) -> Float64[Tensor, " variants"]:
    """S of each value that may replace that of the token."""
    text, device = shared.text, shared.device
    ids, hidden = (part[context, : position + LATER].to(device) for part in (text.ids, text.hidden))
    (clean,) = shared.model.continuations(ids, hidden, position, hidden[position][None])
    parts = shared.model.continuations(ids, hidden, position, replaced.to(device))
    return torch.cat([sparsity(logits - clean) for logits in parts])


def contributions(sae: TrainedSae, x: Float[Tensor, "tokens d"]) -> list[Float[Tensor, "active d"]]:
    """Per token, what each active latent adds to the reconstruction, in the model's own units."""
    codes = sae.encode(x)
    scale = torch.full((len(x),), sae.normalizer.scale) if codes.units is None else codes.units.norm.cpu()
    values, index = effective(codes).cpu(), codes.index.cpu()
    active = values > 0
    rows = sae.W_dec.cpu()
    return [rows[index[t][active[t]]] * values[t][active[t], None] * scale[t] for t in range(len(x))]


def judge(sae: TrainedSae, shared: Shared, done: int = 0) -> Outcome:
    """Figures of one SAE; `done` tokens of other SAEs come before in the progress."""
    places = chosen_places(shared)
    generator = torch.Generator().manual_seed(0)
    average, d = shared.reference.mean, len(shared.reference.mean)
    x = torch.stack([shared.text.hidden[place] for place in places])
    found: dict[str, list[Tensor]] = {"latents": [], "random": [], "channels": []}
    skipped = 0
    for number, ((context, position), own, row) in enumerate(zip(places, contributions(sae, x), x, strict=True), 1):
        if not len(own):
            continue
        own = own[torch.randperm(len(own), generator=generator)[:LATENTS]]
        few = own[:CONTROLS]
        random = torch.nn.functional.normalize(torch.randn(len(few), d, generator=generator), dim=1)
        random = random * few.norm(dim=1, keepdim=True)
        channels = torch.randperm(d, generator=generator)[: len(few)]
        cut = row.expand(len(few), -1).clone()
        cut[torch.arange(len(few)), channels] = average[channels]
        variants = {"latents": row - own, "random": row - random, "channels": cut}
        parts = changes(shared, context, position, torch.cat(list(variants.values()))).split(
            [len(part) for part in variants.values()]
        )
        for name, values in zip(variants, parts, strict=True):
            known = values[~values.isnan()]
            skipped += len(values) - len(known)
            found[name].append(known)
        shared.tick(done + number)
    # latents of one token are not independent: one mean per token
    per_token = {name: torch.stack([part.mean() for part in parts if len(part)]) for name, parts in found.items()}
    values = {
        "sparsity": mean(per_token["latents"]),
        "sparsity_random": mean(per_token["random"]),
        "sparsity_channels": mean(per_token["channels"]),
        "unchanged": Value(float(skipped)),
    }
    return Outcome(len(places), values)


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    chosen_places(shared)  # loads the text before the clock of the progress starts
    shared.progress.start("ablation", len(subjects) * TOKENS)
    for number, subject in enumerate(subjects):
        yield subject, judge(subject.load(), shared, number * TOKENS)
