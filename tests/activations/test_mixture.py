"""Several texts as one stream: by weight, the same at every start, and part of the store's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.activations.lm.documents import documents
from harness.activations.store.identity import recipe, store_id
from harness.config import ActivationsConfig
from harness.grid.cells import Grid, make_cells
from tests.tiny import TINY, Launch


@pytest.fixture
def two(tmp_path: Path) -> list[dict[str, Any]]:
    """Two files of 400 short lines each, the second with weight 3."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i:05d}"}}\n' for i in range(400)))
    return [
        {"text": "files", "text_paths": [str(tmp_path / "a.jsonl")], "weight": 1},
        {"text": "files", "text_paths": [str(tmp_path / "b.jsonl")], "weight": 3},
    ]


def mixed(parts: list[dict[str, Any]], **settings: Any) -> ActivationsConfig:
    return ActivationsConfig(model="m", mixture=parts, **settings)


def test_characters_come_in_proportion_to_the_weights_from_the_beginning(two: list[dict[str, Any]]) -> None:
    letters = [document.text[0] for document in documents(mixed(two), "")]
    for end in (4, 40, 400):
        assert letters[:end].count("b") == pytest.approx(0.75 * end, abs=1)
    assert letters.count("b") == 400  # it ends first
    assert letters.count("a") == pytest.approx(133, abs=1)


def test_the_order_is_a_function_of_the_seed(two: list[dict[str, Any]]) -> None:
    def texts(seed: int) -> list[str]:
        return [document.text for document in documents(mixed(two, seed=seed), "")]

    assert texts(0) == texts(0) != texts(1)


def test_texts_and_weights_are_part_of_the_name(two: list[dict[str, Any]], models_on_disk: dict[str, Path]) -> None:
    model = str(models_on_disk["bert"])
    others = [two, [two[0], {**two[1], "weight": 2}], two[:1]]
    configs = [ActivationsConfig(model=model, context=16, mixture=parts) for parts in others]
    assert len({store_id(config) for config in configs}) == 3
    assert [part["weight"] for part in recipe(configs[0])["text"]["mixture"]] == [1, 3]


def test_a_mixture_is_an_override(two: list[dict[str, Any]], tmp_path: Path) -> None:
    text = f"activations.mixture=[{{text:stdlib,weight:1}},{{text:files,text_paths:['{tmp_path}/a.jsonl'],weight:0.5}}]"
    (cell,) = make_cells([Grid((*TINY, "activations=minilm", text))], {})
    assert [(part.text, weight) for part, weight in cell.config.activations.texts] == [("stdlib", 1), ("files", 0.5)]


@pytest.mark.parametrize("keep", ["store", pytest.param("window", marks=pytest.mark.slow)])
def test_runs_train_on_a_mixture(
    keep: str,
    models_on_disk: dict[str, Path],
    text_files: Path,
    two: list[dict[str, Any]],
    launch: Launch,
    tmp_path: Path,
) -> None:
    first, second = f"{text_files}/*.txt", two[0]["text_paths"][0]
    parts = f"{{text:files,text_paths:['{first}'],weight:3}},{{text:files,text_paths:['{second}'],weight:1}}"
    words = [
        *("activations=lm", f"activations.model={models_on_disk['bert']}", "activations.layer=1"),
        *("activations.context=16", f"activations.mixture=[{parts}]", "activations.tokens=2048"),
        *("activations.heldout_tokens=256", "activations.dtype=fp32", f"activations.keep={keep}"),
        *(("activations.window_tokens=1024",) if keep == "window" else ()),
    ]
    assert launch(*words) == 0
    (manifest,) = tmp_path.glob("_activations/*/manifest.json")
    described = json.loads(manifest.read_text())["description"]["mixture"]
    assert [part["weight"] for part in described] == [3, 1]
    assert launch(*words) == 0  # the frozen configuration is read again


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"text": "stdlib"}, "weight=None"),
        ({"text": "stdlib", "weight": -1}, "weight=-1"),
        ({"text": "stdlib", "weight": 1, "layer": 2}, "'layer'"),
        ({"text": "tokens", "text_paths": ["x.parquet"], "weight": 1}, "token ids with text"),
        ({"text": "files", "weight": 1}, "text_paths"),
        ({"text": "stdlib\n", "weight": 1}, "control characters"),
    ],
)
def test_what_cannot_be_mixed_is_refused(part: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mixed([part])
