"""Codes of other sizes than the trained one: the k′ largest activations, and a fixed threshold in place of k.

An SAE whose codes are progressive improves with every further latent. A TopK SAE improves up to about its own k and
then becomes worse; Multi-TopK is trained not to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from harness.quality.clusters import by_document, ratio
from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Rows, Shared
from harness.record.quality import Value
from harness.saes.trained import TokenCodes, TrainedSae

VERSION = 1
MOST = 4
"""Times k (or the measured L0): the largest code."""
_BATCH = 4096
_TRAIN_ROWS = 8192
"""Training rows from which thresholds are chosen."""


def widest(sae: TrainedSae, most: int) -> TrainedSae:
    """The SAE with `most` active latents per token where k chooses them, otherwise unchanged. Switch: of the expert."""
    if sae.sae.traits.penalty:
        return sae
    architecture = "switch" if sae.sae.routed else "topk"
    return replace(sae, sae=replace(sae.sae, architecture=architecture, k=min(most, sae.sae.latents_per_expert)))


def truncated(codes: TokenCodes, k: int) -> TokenCodes:
    """The `k` largest activations."""
    return replace(codes, values=codes.values[:, :k].contiguous(), index=codes.index[:, :k].contiguous())


def above(codes: TokenCodes, threshold: float) -> TokenCodes:
    return replace(codes, values=codes.values.where(codes.values > threshold, 0.0))


def _sorted(codes: TokenCodes) -> TokenCodes:
    """Only positive activations, the largest first."""
    values = codes.values.clamp_min(0)
    values, place = values.sort(dim=1, descending=True, stable=True)
    return replace(codes, values=values, index=codes.index.gather(1, place))


def _l0(sae: TrainedSae, x: Float[Tensor, "rows d"]) -> float:
    return float((sae.encode(x).values > 0).sum(dim=1).double().mean())


def thresholds(sae: TrainedSae, x: Float[Tensor, "rows d"], sizes: Sequence[int]) -> list[float]:
    """For each size k′ the threshold above which the rows `x` have k′ activations on average."""
    values = torch.cat([_sorted(sae.encode(part)).values.flatten() for part in x.split(_BATCH)])
    values = values[values > 0].sort(descending=True).values
    return [float(values[min(size * len(x), len(values)) - 1]) if len(values) else 0.0 for size in sizes]


def judge(sae: TrainedSae, rows: Rows, train: Float[Tensor, "rows d"], tick=lambda done: None) -> Outcome:
    """Figures of one SAE. `train`: rows from which thresholds are chosen."""
    k = max(1, round(_l0(sae, train[:_BATCH]))) if sae.sae.traits.penalty else sae.sae.k
    wide = widest(sae, MOST * k)
    most = min(MOST * k, sae.sae.latents_per_expert)
    sizes = sorted({size for size in (*(2**j for j in range(20)), k, most) if size <= most})
    levels = sorted({max(1, k // 2), k, min(2 * k, most)})
    cuts = thresholds(wide, train, levels)
    names = [*(f"k{size}" for size in sizes), *(f"t{level}" for level in levels)]
    errors: dict[str, list[Tensor]] = {name: [] for name in names}
    active = dict.fromkeys(levels, 0)
    for start in range(0, len(rows.x), _BATCH):
        x = rows.x[start : start + _BATCH]
        codes = _sorted(wide.encode(x))
        kept = {level: above(codes, cut) for level, cut in zip(levels, cuts, strict=True)}
        variants = {f"k{size}": truncated(codes, size) for size in sizes} | {
            f"t{level}": kept[level] for level in levels
        }
        for name, variant in variants.items():
            errors[name].append((x - wide.decode(variant).cpu()).square().sum(dim=1))
        for level in levels:
            active[level] += int((kept[level].values > 0).sum())
        tick(start + len(x))
    baseline = by_document((rows.x - rows.mean).square().sum(dim=1), rows.document, rows.documents)
    fvu = {
        name: ratio(by_document(torch.cat(part), rows.document, rows.documents), baseline)
        for name, part in errors.items()
    }
    best = min(sizes, key=lambda size: fvu[f"k{size}"].value)
    values = {
        "fvu_k": fvu[f"k{k}"],
        "fvu_half_k": fvu[f"k{_nearest(sizes, k / 2)}"],
        "fvu_2k": fvu[f"k{_nearest(sizes, 2 * k)}"],
        "fvu_4k": fvu[f"k{most}"],
        "best_k_over_k": Value(best / k),
        "fvu_threshold": fvu[f"t{k}"],
        "l0_threshold": Value(active[k] / len(rows.x)),
    }
    curves = {
        "topk": [{"k": size, "fvu": fvu[f"k{size}"].value} for size in sizes],
        "threshold": [
            {"threshold": cut, "l0": active[level] / len(rows.x), "fvu": fvu[f"t{level}"].value}
            for level, cut in zip(levels, cuts, strict=True)
        ],
    }
    return Outcome(len(rows.x), values, curves=curves)


def _nearest(sizes: Sequence[int], wanted: float) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    rows, train = shared.rows, shared.source.sample()[:_TRAIN_ROWS]
    shared.progress.start("progressive codes", len(subjects) * len(rows.x))
    for number, subject in enumerate(subjects):
        yield subject, judge(subject.load(), rows, train, lambda done, n=number: shared.tick(n * len(rows.x) + done))
