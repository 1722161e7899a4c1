"""The upload tree of Neuronpedia, against the fields of SAEDashboard's own rows (0.8, neuronpedia_export.py)."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import UserError
from harness.saes.export import export
from tests.gallery.made_up import write_examples

OF_ALL = {"modelId", "layer", "index", "creatorId", "createdAt"}
FEATURE = OF_ALL | {
    *("maxActApprox", "hasVector", "vector", "vectorLabel", "vectorDefaultSteerStrength", "hookName", "sourceSetName"),
    *("topkCosSimIndices", "topkCosSimValues", "frac_nonzero", "decoder_weights_dist"),
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices"),
    *("correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices"),
    *("correlated_features_pearson", "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
}
ACTIVATION = OF_ALL | {
    *("id", "tokens", "maxValue", "maxValueTokenIndex", "minValue", "values", "binMin", "binMax", "binContains"),
    *("qualifyingTokenIndex", "dfaValues", "lossValues"),
}
WORDS = [f" word{number}" for number in range(40)] + ['"<b>']


def lines(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("kind", ["topk_run", "switch_run"])
def test_the_tree(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = tmp_path / request.getfixturevalue(kind).name
    shutil.copytree(request.getfixturevalue(kind), run)
    n = json.loads((run / "result.json").read_text())["n_latents"]
    table = write_examples(run, n, WORDS)
    assert export(run, "neuronpedia", tmp_path / "out") == []
    [source] = (tmp_path / "out").glob("*/*")
    assert source.name == f"0-{run.name}"
    for name, keys in {
        "release": {"name", "description", "creatorName", "creatorId", "createdAt"},
        "model": {"id", "instruct", "creatorId", "displayName"},
        "sourceset": {"modelId", "name", "creatorId", "releaseName"},
        "source": {"id", "modelId", "setName", "creatorId", "num_prompts", "num_tokens_in_prompt"},
    }.items():
        [row] = lines(source / f"{name}.jsonl")
        assert keys <= set(row)
    features = lines(source / "features" / "batch-0.jsonl.gz")
    assert [row["index"] for row in features] == list(range(n)) and set(features[0]) == FEATURE - {
        "vectorLabel",
        "sourceSetName",
    }
    assert features[0]["frac_nonzero"] == pytest.approx(table["density"][0])
    assert features[0]["pos_str"] == [WORDS[token] for token in table["promoted"][0]]
    activations = lines(source / "activations" / "batch-0.jsonl.gz")
    assert set(activations[0]) == ACTIVATION and len({(row["index"], row["id"]) for row in activations}) == len(
        activations
    )
    for row in activations[:200]:
        assert len(row["tokens"]) == len(row["values"]) == 33
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["values"][row["qualifyingTokenIndex"]] > 0
    tops = [row["values"][row["qualifyingTokenIndex"]] for row in activations[:20]]
    np.testing.assert_allclose(tops, table["example_value"][0][:20], atol=1e-3)


def test_without_examples_it_says_how_to_get_them(topk_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"harness.evaluate .* --metrics examples"):
        export(topk_run, "neuronpedia", tmp_path / "out")
