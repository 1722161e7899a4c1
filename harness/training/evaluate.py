"""Held-out error: fvu with its standard error, in float32 or better. It changes no counter of the training."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.activations.source import ActivationSource
from harness.activations.statistics import Statistics, explained_shares
from harness.budget import EVALUATION_BATCH
from harness.errors import UserError
from harness.process.runtime import Runtime
from harness.process.signals import STOP
from harness.saes import Normalizer, Params, Sae, forward

MOST_GROUPS = 8192
"""Most lines of `HeldOutErrors.by_document`: half a megabyte in the record of a run."""

GAIN_GROUPS = 256
"""Most groups of documents whose errors a checkpoint keeps: enough for a standard error."""


@dataclass(frozen=True)
class Evaluation:
    rows: int
    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean of the training rows, in the normalised space."""
    fvu_se: float
    """Standard error of `fvu`, rows clustered by document."""
    fvu_raw: float | None
    """The same ratio in the model's own units; only if normalisation is per token (else it equals `fvu`)."""
    mse: float
    """Squared error per token, summed over d, in the model's own units."""
    l0: float


def normalised_mean(normalizer: Normalizer, statistics: Statistics) -> Float[Tensor, " d"]:
    """μ of the training rows after normalisation, from the statistics that belong to the rule; float64."""
    return statistics.mean / normalizer.scale


@dataclass(frozen=True)
class HeldOutErrors:
    """What one evaluation measured, row by row; complete on every rank."""

    table: Float64[Tensor, "columns rows"]
    """`_COLUMNS` of every held-out row."""
    document: Int[Tensor, " rows"]
    layernorm: bool
    """Whether the normalised errors and those in the model's own units are different quantities."""

    def evaluation(self, rows: int) -> Evaluation:
        """Of the first `rows` rows; a number beyond the held-out rows means all of them."""
        return _summary(self.table[:, :rows], self.document[:rows], self.layernorm)

    def error_sums(self, rows: int) -> list[float]:
        """Σ‖x − x̂‖² of the first `rows` rows over groups of neighbouring documents, at most `GAIN_GROUPS` of them."""
        _, cluster = torch.unique(self.document[:rows], return_inverse=True)
        count = int(cluster.max()) + 1
        groups = min(count, GAIN_GROUPS)
        sums = torch.zeros(groups, dtype=torch.float64)
        return sums.index_add(0, cluster * groups // count, self.table[0, :rows]).tolist()

    def by_document(self) -> dict[str, np.ndarray]:
        """Sums over the rows of each document, in the order of the documents' numbers, for `record.heldout`.

        document: number of the (first) document. documents: how many. rows, error Σ‖x − x̂‖² and variance Σ‖x − μ‖² in
        the normalised space; with layernorm also error_raw and variance_raw, in the model's own units. More than
        `MOST_GROUPS` documents are summed in that many groups of neighbours, the same ones for every run of a store.
        """
        numbers, cluster = torch.unique(self.document, return_inverse=True)
        groups = min(len(numbers), MOST_GROUPS)
        of_document = torch.arange(len(numbers)) * groups // len(numbers)
        of_row = of_document[cluster]
        first = torch.searchsorted(of_document, torch.arange(groups))
        names = {"error": 0, "variance": 1} | ({"error_raw": 2, "variance_raw": 3} if self.layernorm else {})
        zeros = torch.zeros(groups, dtype=torch.float64)
        return {
            "document": numbers[first].numpy(),
            "documents": torch.bincount(of_document, minlength=groups).numpy(),
            "rows": torch.bincount(of_row, minlength=groups).numpy(),
            **{name: zeros.index_add(0, of_row, self.table[column]).numpy() for name, column in names.items()},
        }


def evaluate(
    sae: Sae,
    params: Params,
    source: ActivationSource,
    normalizer: Normalizer,
    row_limits: tuple[int, ...],
    runtime: Runtime,
) -> list[Evaluation] | None:
    """One `Evaluation` per prefix of the held-out rows, from one pass; None if stopped.

    `row_limits` are the lengths of the prefixes; a length beyond the held-out rows means all of them.
    """
    errors = heldout_errors(sae, params, source, normalizer, max(row_limits), runtime)
    return None if errors is None else [errors.evaluation(rows) for rows in row_limits]


def heldout_errors(
    sae: Sae,
    params: Params,
    source: ActivationSource,
    normalizer: Normalizer,
    rows: int,
    runtime: Runtime,
) -> HeldOutErrors | None:
    """The errors of the first `rows` held-out rows, or of all if there are fewer; None if stopped.

    The products run in the precision of `params`.
    """
    shards, device, dtype = runtime.shards, runtime.device, params["W_dec"].dtype
    mean = normalised_mean(normalizer, source.statistics(normalizer.rule == "layernorm")).to(device, dtype)
    raw_mean = source.statistics(False).mean.to(device, dtype)
    most = min(rows, source.heldout_rows)
    table = torch.zeros(len(_COLUMNS), most, device=device, dtype=dtype)
    documents: list[Tensor] = []
    seen = 0
    for number, (raw, document) in enumerate(source.heldout(EVALUATION_BATCH)):
        # ranks get the answer one call late, so an earlier request to save may arrive here; it will be repeated
        if shards.agree(STOP * runtime.stop.requested) & STOP:
            return None
        span = slice(seen, min(seen + raw.shape[0], most))
        documents.append(document[: span.stop - span.start])
        if number % shards.dp == shards.dp_rank:
            part = raw[: span.stop - span.start].to(device)
            _fill(table[:, span], sae, params, part, normalizer, mean, raw_mean, runtime)
        seen = span.stop
        if seen == most:
            break
    table = shards.sum_(table, "all", "evaluation").double().cpu()
    return HeldOutErrors(table, torch.cat(documents), normalizer.rule == "layernorm")


def training_l0(sae: Sae, params: Params, source: ActivationSource, normalizer: Normalizer, runtime: Runtime) -> float:
    """Active latents per row of the sample of training rows; the same on every rank."""
    shards = runtime.shards
    x = normalizer(source.sample().to(runtime.device), params["W_dec"].dtype)
    active = (forward(sae, params, params, x, runtime).codes.values > 0).sum()
    return float(shards.sum_(active, "all", "evaluation")) / (shards.dp * x.shape[0])


_COLUMNS = ("error", "baseline", "error_raw", "baseline_raw", "active")
"""Per held-out row: ‖x − x̂‖² and ‖x − μ‖² normalised, both in the model's own units, active latents."""


def _fill(
    columns: Float[Tensor, "columns rows"],
    sae: Sae,
    params: Params,
    raw: Float[Tensor, "rows d"],
    normalizer: Normalizer,
    mean: Float[Tensor, " d"],
    raw_mean: Float[Tensor, " d"],
    runtime: Runtime,
) -> None:
    """This rank's part of `_COLUMNS`; the sum over all ranks is complete."""
    x = normalizer(raw, params["W_dec"].dtype)
    shards = runtime.shards
    run = forward(sae, params, params, x, runtime)
    own = slice(None) if run.routing.order is None else run.routing.order
    unit = normalizer.squared_unit(raw).to(x.dtype)
    columns[4, own] = (run.codes.values > 0).sum(dim=1).to(x.dtype)
    # the ranks of a TopK replica hold the same errors, those of a Switch replica the errors of their own tokens
    if sae.routed or shards.shard_rank == 0:
        columns[0, own] = run.squared
        columns[2] = columns[0] * unit
    if shards.shard_rank == 0:
        columns[1] = (x - mean).square().sum(dim=1)
        columns[3] = (raw.to(x.dtype) - raw_mean).square().sum(dim=1)


def _summary(table: Float[Tensor, "columns rows"], document: Int[Tensor, " rows"], layernorm: bool) -> Evaluation:
    errors, baselines, errors_raw, baselines_raw, active = table
    error, baseline = float(errors.sum()), float(baselines.sum())
    if baseline == 0:
        raise UserError("all held-out rows equal the mean of the training rows, so there is no fvu; harvest more rows")
    fvu = error / baseline
    _, cluster = torch.unique(document, return_inverse=True)
    count = int(cluster.max()) + 1
    # ratio estimator: the variance is that of the linearised residual per document (a cluster)
    residual = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, errors - fvu * baselines)
    spread = count / max(1, count - 1) * float(residual.square().sum())
    return Evaluation(
        rows=len(document),
        fvu=fvu,
        fvu_se=spread**0.5 / baseline,
        fvu_raw=float(errors_raw.sum() / baselines_raw.sum()) if layernorm else None,
        mse=float(errors_raw.mean()),
        l0=float(active.mean()),
    )


@functools.lru_cache(maxsize=4)
def _explained_shares(source: ActivationSource, layernorm: bool) -> Float64[Tensor, " d"]:
    statistics = source.statistics(layernorm)
    if statistics.explained is not None:
        return statistics.explained
    rows = (raw.cpu() for raw, _ in source.heldout(EVALUATION_BATCH))
    return explained_shares(rows, statistics.mean, layernorm)


def pca_fvu(source: ActivationSource, normalizer: Normalizer, rank: int) -> float:
    """fvu of the best linear reconstruction of rank `rank` around the training mean: an anchor without any dictionary.

    A store has it in its manifest, unless an earlier version made it; of other sources it is computed once. A constant
    scale does not change it.
    """
    return float(1 - _explained_shares(source, normalizer.rule == "layernorm")[min(rank, source.d_model) - 1])
