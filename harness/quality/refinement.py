"""Shrinkage: what the activations would be if they were chosen anew for the same active latents.

For each token the support A and the decoder are kept, and min over f ≥ 0 of ‖x − b − Σ_A f_i d_i‖² is solved on the
k × k Gram matrix: at once where all f come out positive, else by cyclic coordinate descent. An ℓ1 penalty makes
activations too small (f > a); TopK has no such bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.quality.clusters import by_document, mean, ratio
from harness.quality.downstream import FEW, delta_ce, of_rows, spliced_sums
from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Rows, Shared
from harness.record.quality import Value
from harness.saes.trained import TokenCodes, TrainedSae

VERSION = 2
_SWEEPS = 400
_TOLERANCE = 1e-6
_GATHERED = 2**23
"""Most numbers of decoder rows that are gathered at once."""
_GRAM = 2**24
"""Most entries of Gram matrices that are held at once."""


def nnls(
    target: Float[Tensor, "tokens d"],
    index: Int[Tensor, "tokens k"],
    start: Float[Tensor, "tokens k"],
    W_dec: Float[Tensor, "n d"],
) -> Float[Tensor, "tokens k"]:
    """Non-negative least squares per token, over the entries of `index` where `start` is positive; others stay 0."""
    k = index.shape[1]
    at_once, gathered = max(1, _GRAM // k**2), max(1, _GATHERED // (k * W_dec.shape[1]))
    parts = []
    for part in range(0, len(target), at_once):
        products = []
        for first in range(part, min(part + at_once, len(target)), gathered):
            span = slice(first, min(first + gathered, part + at_once))
            rows = W_dec[index[span]]
            products.append((rows @ rows.mT, (rows @ target[span, :, None]).squeeze(2)))
        gram, right = (torch.cat(column) for column in zip(*products, strict=True))
        parts.append(_solve(gram, right, start[part : part + at_once]))
    return torch.cat(parts)


def _solve(
    gram: Float[Tensor, "tokens k k"], right: Float[Tensor, "tokens k"], start: Float[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    """Where least squares without the constraint are positive they are the answer; the others descend."""
    allowed = start > 0
    both = allowed[:, :, None] & allowed[:, None]
    unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    f, info = torch.linalg.solve_ex(gram.where(both, unit), right.where(allowed, 0.0))
    left = ((f < 0).any(dim=1) | (info != 0) | ~f.isfinite().all(dim=1)).nonzero().flatten()
    f[left] = _descend(gram[left], right[left], start[left])
    return f


def _descend(
    gram: Float[Tensor, "tokens k k"], right: Float[Tensor, "tokens k"], start: Float[Tensor, "tokens k"]
) -> Float[Tensor, "tokens k"]:
    f, allowed = start.clone(), start > 0
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    columns = allowed.any(dim=0).nonzero().flatten().tolist()
    for _ in range(_SWEEPS):
        before = f.clone()
        for j in columns:
            gradient = right[:, j] - (gram[:, j] * f).sum(dim=1)
            f[:, j] = ((f[:, j] + gradient / diagonal[:, j]).clamp_min(0)).where(allowed[:, j], 0.0)
        if not len(f) or float((f - before).abs().max()) <= _TOLERANCE * float(f.abs().max().clamp_min(1e-30)):
            break
    return f


def effective(codes: TokenCodes) -> Float[Tensor, "tokens k"]:
    """Activations as the decoder uses them: z, times the router's probability for Switch."""
    return codes.values if codes.gate is None else codes.values * codes.gate[:, None]


def refined(sae: TrainedSae, x: Float[Tensor, "tokens d"], codes: TokenCodes) -> TokenCodes:
    """The codes of `x` with activations that reconstruct it best on the same latents."""
    target = sae.normalizer(x.to(sae.device), sae.dtype) - sae.b_dec
    values = nnls(target, codes.index, effective(codes), sae.W_dec)
    return replace(codes, values=values, gate=None)


def judge(sae: TrainedSae, rows: Rows, tick=lambda done: None) -> Outcome:
    """Figures of one SAE: fvu before and after, and how activations change."""
    before, after, baseline, changes, silenced, entries = [], [], [], [], 0, 0
    for start in range(0, len(rows.x), 4096):
        x = rows.x[start : start + 4096]
        codes = sae.encode(x)
        better = refined(sae, x, codes)
        old, new = effective(codes), better.values
        active, kept = old > 0, (old > 0) & (new > 1e-6 * old)
        changes.append((new[kept] / old[kept]).log().double().cpu())
        silenced += int((active & ~kept).sum())
        entries += int(active.sum())
        before.append((x - sae.decode(codes).cpu()).square().sum(dim=1))
        after.append((x - sae.decode(better).cpu()).square().sum(dim=1))
        baseline.append((x - rows.mean).square().sum(dim=1))
        tick(start + len(x))
    sums = [by_document(torch.cat(part), rows.document, rows.documents) for part in (before, after, baseline)]
    values = {
        "log_ratio": mean(torch.cat(changes)),
        "fvu_before": ratio(sums[0], sums[2]),
        "fvu_after": ratio(sums[1], sums[2]),
        "fvu_gain": ratio(sums[0] - sums[1], sums[0]),
        "silenced": Value(silenced / max(entries, 1)),
    }
    return Outcome(len(rows.x), values)


def downstream_gain(sae: TrainedSae, shared: Shared) -> dict[str, Value]:
    """What the language model loses before and after, on every `FEW`th context: ΔCE and KL, and their paired gains."""

    def better(rows: Tensor) -> Tensor:
        return sae.decode(refined(sae, rows, sae.encode(rows)))

    splices = {"before": of_rows(sae.forward), "after": of_rows(better)}
    sums = spliced_sums(shared, splices, contexts=FEW, label="losses before and after refinement")
    before, after, clean = sums["before"], sums["after"], sums["clean"]
    values = {f"delta_ce_{name}": delta_ce(sums[name], clean) for name in ("before", "after")}
    values |= {f"kl_{name}": ratio(sums[name]["kl"], sums[name]["positions"]) for name in ("before", "after")}
    return values | {
        "delta_ce_gain": ratio(before["ce"] - after["ce"], clean["tokens"]),
        "kl_gain": ratio(before["kl"] - after["kl"], before["positions"]),
    }


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    rows, causal = shared.rows, shared.is_causal
    for number, subject in enumerate(subjects, 1):
        sae = subject.load()
        shared.progress.start(f"refinement of SAE {number} of {len(subjects)}", len(rows.x))
        outcome = judge(sae, rows, shared.tick)
        if causal:
            outcome.values.update(downstream_gain(sae, shared))
        yield subject, outcome
