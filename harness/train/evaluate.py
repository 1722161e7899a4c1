"""Held-out error: fvu with its standard error, in float32 or better, never touching a counter of the training."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from harness.activations import ActivationSource, Statistics
from harness.ops import Ops
from harness.parallel import Shards
from harness.record.signals import StopFlag
from harness.saes import Normalizer, Params, Sae, forward

BATCH_ROWS = 4096


@dataclass(frozen=True)
class Evaluation:
    rows: int
    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean of the training rows, in the normalised space."""
    fvu_se: float
    """Standard error of `fvu`, rows clustered by document."""
    fvu_raw: float | None
    """The same ratio in the model's own units; only where normalisation is per token (else it equals `fvu`)."""
    mse: float
    """Squared error per token, summed over d, in the model's own units."""
    l0: float


@dataclass
class _Columns:
    """Per row: error, baseline, both in raw units, active latents, document."""

    error: list[Tensor]
    baseline: list[Tensor]
    error_raw: list[Tensor]
    baseline_raw: list[Tensor]
    active: list[Tensor]
    document: list[Tensor]


def normalised_mean(normalizer: Normalizer, statistics: Statistics) -> Float[Tensor, " d"]:
    """μ of the training rows after normalisation, from the statistics that belong to the rule; float64."""
    return statistics.mean / normalizer.scale


def evaluate(
    sae: Sae,
    params: Params,
    source: ActivationSource,
    normalizer: Normalizer,
    row_limits: tuple[int, ...],
    shards: Shards,
    ops: Ops,
    stop: StopFlag,
) -> list[Evaluation] | None:
    """One `Evaluation` for each prefix of the held-out rows in `row_limits`, from one pass; None if stopped.

    A `row_limits` beyond the held-out rows means all of them. `params` are used as they are, in their precision.
    """
    device, dtype = params["W_dec"].device, params["W_dec"].dtype
    mean = normalised_mean(normalizer, source.statistics(normalizer.rule == "layernorm")).to(device, dtype)
    raw_mean = source.statistics(False).mean.to(device, dtype)
    columns = _Columns([], [], [], [], [], [])
    seen, most = 0, max(row_limits)
    for raw, document in source.heldout(BATCH_ROWS):
        if stop.requested:
            return None
        raw = raw[: most - seen].to(device)
        document = document[: raw.shape[0]]
        x = normalizer(raw, dtype)
        run = forward(sae, params, params, x, shards, ops)
        order = run.routing.order
        error = run.squared if order is None else torch.zeros_like(x[:, 0]).index_copy_(0, order, run.squared)
        active = (run.codes.values > 0).sum(dim=1)
        active = active if order is None else torch.zeros_like(x[:, 0], dtype=torch.int64).index_copy_(0, order, active)
        unit = normalizer.squared_unit(raw).to(dtype)
        columns.error.append(error)
        columns.baseline.append((x - mean).square().sum(dim=1))
        columns.error_raw.append(error * unit)
        columns.baseline_raw.append((raw.to(dtype) - raw_mean).square().sum(dim=1))
        columns.active.append(active)
        columns.document.append(document)
        seen += raw.shape[0]
        if seen >= most:
            break
    table = {name: torch.cat(parts).cpu() for name, parts in vars(columns).items()}
    return [_summary({name: column[:limit] for name, column in table.items()}, normalizer) for limit in row_limits]


def _summary(table: dict[str, Tensor], normalizer: Normalizer) -> Evaluation:
    column = {name: values.double() for name, values in table.items()}
    error, baseline = float(column["error"].sum()), float(column["baseline"].sum())
    fvu = error / baseline
    _, cluster = torch.unique(table["document"], return_inverse=True)
    documents = int(cluster.max()) + 1
    # ratio estimator: the linearised residual of each document (a cluster) carries the variance
    residual = torch.zeros(documents, dtype=torch.float64).index_add_(
        0, cluster, column["error"] - fvu * column["baseline"]
    )
    spread = documents / max(1, documents - 1) * float(residual.square().sum())
    raw = float(column["error_raw"].sum()) / float(column["baseline_raw"].sum())
    return Evaluation(
        rows=len(column["error"]),
        fvu=fvu,
        fvu_se=spread**0.5 / baseline,
        fvu_raw=raw if normalizer.rule == "layernorm" else None,
        mse=float(column["error_raw"].mean()),
        l0=float(column["active"].mean()),
    )


@functools.lru_cache(maxsize=4)
def _explained_share(source: ActivationSource, normalizer: Normalizer) -> Float[Tensor, " d"]:
    """Share of the held-out rows' squared distance to the training mean in the k largest directions, by k − 1."""
    mean = normalised_mean(normalizer, source.statistics(normalizer.rule == "layernorm"))
    moment = torch.zeros(source.d_model, source.d_model, dtype=torch.float64)
    for raw, _ in source.heldout(BATCH_ROWS):
        centred = normalizer(raw.cpu(), torch.float64) - mean
        moment += centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
    return eigenvalues.cumsum(0) / eigenvalues.sum()


def pca_fvu(source: ActivationSource, normalizer: Normalizer, rank: int) -> float:
    """fvu of the best rank-k linear reconstruction of the held-out rows around the training mean: an anchor that no
    dictionary is needed for. float64, computed once per source."""
    return float(1 - _explained_share(source, normalizer)[min(rank, source.d_model) - 1])
