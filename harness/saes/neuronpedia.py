"""The dashboards of an SAE as Neuronpedia takes them in bulk: the upload tree of SAEDashboard 0.8.

    <model>/<layer>-<set>/{release,model,sourceset,source}.jsonl
    <model>/<layer>-<set>/{features,activations}/batch-<n>.jsonl.gz

What they show was collected by the metric `examples`. Neuronpedia's numbers about neurons are left empty, and its
intervals are quantiles here: fifths of the activations by rank.
"""

from __future__ import annotations

import datetime
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.record.quality import read_quality, read_table
from harness.saes.trained import TrainedSae

_METRIC = "examples"
_BATCH = 128
"""Latents of a file."""
_GROUPS = ((20, -1.0, 99.0, -1.0), *((5, 0.2 * g, 0.2 * (g + 1), 0.2) for g in range(5)))
"""Examples in the order of the table: how many, and how the group is marked; −1 and 99 stand for the top."""
_VISIBILITY = "PRIVATE"
_NOT_MEASURED: dict[str, list[float]] = {
    name: []
    for name in (
        *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
        *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
        *("correlated_features_l1", "decoder_weights_dist"),
        *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    )
}
"""Fields of a feature that readers expect."""
_NO_EFFECTS: dict[str, list[float]] = {"dfaValues": [], "lossValues": []}
"""The same of an activation."""


def identity(trained: TrainedSae) -> tuple[str, str, str]:
    """Model, set and source as Neuronpedia names them."""
    model = _slug(Path(trained.origin.model or trained.origin.activations["kind"]).name.rpartition(":")[2])
    layer = trained.origin.layer or 0
    return model, _slug(trained.origin.run_id), f"{layer}-{_slug(trained.origin.run_id)}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.\-]+", "-", name.lower()).strip("-")


def write(trained: TrainedSae, run_dir: Path, out: Path) -> None:
    """Write the tree of a run whose examples were collected. Raises `UserError` if they were not."""
    found = read_quality(run_dir, _METRIC)
    if found is None:
        raise UserError(
            f"{run_dir} has no examples, which dashboards show; collect them with: python -m harness.evaluate "
            f"{run_dir} --metrics examples --tokens 32768"
        )
    model, set_name, source = identity(trained)
    folder = out / model / source
    for name in ("features", "activations"):
        (folder / name).mkdir(parents=True)
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S+00:00")
    table = read_table(run_dir, _METRIC, "per_latent")
    contexts = read_table(run_dir, _METRIC, "contexts")
    tokens = read_table(run_dir, _METRIC, "tokens")
    dashboards = _Dashboards(trained, table, contexts, dict(zip(tokens["token"].tolist(), tokens["text"], strict=True)))
    for name, row in _heads(trained, found, model, set_name, source, contexts["ids"].shape, made).items():
        _write_lines(folder / f"{name}.jsonl", [row])
    for number, start in enumerate(range(0, len(table["count"]), _BATCH)):
        latents = range(start, min(start + _BATCH, len(table["count"])))
        of_all = {"modelId": model, "layer": source, "creatorId": "", "createdAt": made}
        features = ({**of_all, **_NOT_MEASURED, **dashboards.feature(latent)} for latent in latents)
        _write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)
        activations: Iterator[dict[str, Any]] = (
            {**of_all, "dfaValues": [], "lossValues": [], **row}
            for latent in latents
            for row in dashboards.activations(latent)
        )
        _write_lines(folder / "activations" / f"batch-{number}.jsonl.gz", activations)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def _heads(
    trained: TrainedSae,
    found: dict[str, Any],
    model: str,
    set_name: str,
    source: str,
    shape: tuple[int, ...],
    made: str,
) -> dict[str, dict[str, Any]]:
    about = trained.origin.activations
    of_all = {"creatorId": "", "createdAt": made, "visibility": _VISIBILITY}
    who: dict[str, Any] = {"creatorName": "", "urls": []}
    title = f"{trained.sae.architecture}, {trained.sae.n_latents} latents, {about.get('hook', about['kind'])}"
    return {
        "release": {"name": set_name, "description": title, "descriptionShort": title, **who, **of_all},
        "model": {
            "id": model,
            "instruct": "instruct" in model,
            "displayName": model,
            "displayNameShort": model,
            "dimension": trained.sae.d_model,
            "updatedAt": made,
            **of_all,
        },
        "sourceset": {
            "modelId": model,
            "name": set_name,
            "releaseName": set_name,
            "description": title,
            "hasDashboards": True,
            **who,
            **of_all,
        },
        "source": {
            "id": source,
            "modelId": model,
            "setName": set_name,
            "hasDashboards": True,
            "num_prompts": found["tokens"] // max(shape[1] - 1, 1),
            "num_tokens_in_prompt": shape[1],
            "dataset": about.get("dataset") or "",
            **of_all,
        },
    }


class _Dashboards:
    def __init__(
        self, trained: TrainedSae, table: dict[str, Any], contexts: dict[str, Any], words: dict[int, str]
    ) -> None:
        self._table, self._words = table, words
        self._ids = dict(zip(contexts["context"].tolist(), contexts["ids"], strict=True))
        self._length = contexts["ids"].shape[1]
        self._hook = trained.origin.activations.get("module") or trained.origin.hook
        self._rows = trained.W_dec.float().cpu().numpy()
        self._width = table["example_acts"].shape[1] // table["example_place"].shape[1]

    def feature(self, latent: int) -> dict[str, Any]:
        table, largest = self._table, float(self._table["largest"][latent])
        partners = [place for place, other in enumerate(table["coactive"][latent]) if other >= 0]
        near = [place for place, other in enumerate(table["nearest"][latent]) if other >= 0]
        bins = len(table["histogram"][latent])
        return {
            "index": latent,
            "maxActApprox": round(largest, 3),
            "hasVector": True,
            "vector": self._rows[latent].tolist(),
            "vectorDefaultSteerStrength": round(largest, 3),
            "hookName": self._hook,
            "topkCosSimIndices": table["nearest"][latent][near].tolist(),
            "topkCosSimValues": _rounded(table["nearest_cosine"][latent][near]),
            "correlated_features_indices": table["coactive"][latent][partners].tolist(),
            "correlated_features_pearson": _rounded(table["coactive_correlation"][latent][partners]),
            "neg_str": self._texts("suppressed", latent),
            "neg_values": self._logits("suppressed", latent),
            "pos_str": self._texts("promoted", latent),
            "pos_values": self._logits("promoted", latent),
            "frac_nonzero": float(table["density"][latent]),
            "freq_hist_data_bar_heights": table["histogram"][latent].tolist(),
            "freq_hist_data_bar_values": _rounded((np.arange(bins) + 0.5) / bins * largest),
        }

    def _texts(self, name: str, latent: int) -> list[str]:
        return [self._words[token] for token in self._table[name][latent].tolist()] if name in self._table else []

    def _logits(self, name: str, latent: int) -> list[float]:
        return _rounded(self._table[f"{name}_logit"][latent]) if name in self._table else []

    def activations(self, latent: int) -> Iterator[dict[str, Any]]:
        """Its examples, without those of silence."""
        largest = float(self._table["largest"][latent])
        acts = self._table["example_acts"][latent].reshape(-1, self._width)
        place = 0
        for number, low, high, share in _GROUPS:
            for flat in self._table["example_place"][latent][place : place + number].tolist():
                if flat >= 0:
                    yield self._activation(latent, place, flat, acts[place] / 255 * largest, low, high, share)
                place += 1

    def _activation(
        self, latent: int, number: int, flat: int, acts: np.ndarray, low: float, high: float, share: float
    ) -> dict[str, Any]:
        context, position = divmod(flat, self._length)
        start = min(max(position - self._width // 2, 0), self._length - self._width)
        values = _rounded(acts)
        return {
            "id": f"{latent}-{number}",
            "tokens": [self._words[token] for token in self._ids[context][start : start + self._width].tolist()],
            "index": latent,
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "qualifyingTokenIndex": position - start,
        }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]
