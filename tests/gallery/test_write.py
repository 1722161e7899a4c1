"""The folder: its files, its numbers, what is refused."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.cli import main
from analysis.gallery.across import nearest
from analysis.gallery.pack import packed
from analysis.gallery.write import write_gallery
from harness.errors import UserError
from harness.record.quality import Value, write_quality
from tests.gallery.made_up import write_examples

WORDS = [f" word{number}" for number in range(300)]


def read_script(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """JSON and columns of a data file."""
    match = re.fullmatch(r'receive\("[\w/]+", "([A-Za-z0-9+/=]+)"\);\n', path.read_text(encoding="ascii"))
    assert match
    raw = gzip.decompress(base64.b64decode(match[1]))
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length])
    columns = {}
    for name, place in header.pop("columns").items():
        start, count = 4 + length + place["at"], int(np.prod(place["shape"]))
        columns[name] = np.frombuffer(raw, f"<{place['type']}", count, start).reshape(place["shape"])
    return header, columns


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for number, n in enumerate((300, 600)):
        write_examples(tmp_path / "sweep" / f"topk-n{n}", n, WORDS, seed=number, experts=1 + number)
    return tmp_path / "sweep"


def test_numbers_survive_the_packing(tmp_path: Path) -> None:
    columns = {
        kind: np.arange(7).astype(f"<{kind}").reshape(7, 1) for kind in ("u1", "u2", "u4", "i2", "i4", "f2", "f4")
    }
    (tmp_path / "x.js").write_text(f'receive("x", "{packed(columns, words=["</script>", "é"])}");\n')
    header, found = read_script(tmp_path / "x.js")
    assert header == {"words": ["</script>", "é"]}
    for kind, column in columns.items():
        np.testing.assert_array_equal(found[kind], column)


def test_files_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", str(sweep)]) == 0
    assert f"gallery: {sweep / 'gallery' / 'index.html'}" in capsys.readouterr().out
    data = sweep / "gallery" / "data"
    index, _ = read_script(data / "index.js")
    assert [(sae["name"], sae["n"], sae["compared"]) for sae in index["saes"]] == [
        ("topk-n300", 300, [1]),
        ("topk-n600", 600, [0]),
    ]
    assert sorted(path.name for path in (data / "1").iterdir()) == [*(f"{part}.js" for part in range(5)), "list.js"]
    content, columns = read_script(data / "0" / "list.js")
    assert content["ablation"]["0"]["kl"] == 0.125 and columns["density"].shape == (300,)
    assert main(["gallery", str(sweep)]) == 0  # an earlier gallery is replaced, and is no run


def test_a_shard_holds_what_the_table_says(sweep: Path) -> None:
    write_gallery([sweep])
    table = write_examples(sweep / "again", 300, WORDS, seed=0)
    _, shard = read_script(sweep / "gallery" / "data" / "0" / "1.js")
    text, columns = read_script(sweep / "gallery" / "data" / "text0.js")
    own = slice(128, 256)
    np.testing.assert_array_equal(shard["count"], table["count"][own])
    np.testing.assert_array_equal(shard["example_acts"], table["example_acts"][own])
    np.testing.assert_array_equal(shard["coactive"].astype(int) - 1, table["coactive"][own])
    words = [text["words"][token - 1] for token in shard["promoted"][0]]
    assert words == [WORDS[token] for token in table["promoted"][128]]
    largest = table["largest"][own, None]
    np.testing.assert_allclose(shard["example_value"] / 65535 * largest, table["example_value"][own], atol=1e-4 * 50)
    assert columns["ids"].shape[1] == 40


def test_explanations_and_scores_of_other_metrics(sweep: Path) -> None:
    run = sweep / "topk-n300"
    about = {"version": 1, "weights": "0" * 64, "settings": {}, "tokens": 1}
    patterns = [{"latent": 7, "patterns": ["a *"], "precision": 0.5, "recall": float("nan")}]
    scores = [{"latent": 8, "explanation": "words | of it", "detection_auc": 0.75, "fuzzing_auc": 0.5}]
    labels = [{"label": "digit", "latent": 8, "loss": 0.125}]
    for metric, curve in (("explanations", patterns), ("detection", scores), ("probes", labels)):
        name = "labels" if metric == "probes" else "latents"
        write_quality(run, {"metric": metric, **about}, {"x": Value(1.0)}, {}, {}, {name: curve})
    write_gallery([sweep])
    notes = read_script(sweep / "gallery" / "data" / "0" / "list.js")[0]["notes"]
    assert notes["7"] == {"patterns": ["a *"], "precision": 0.5, "recall": None}
    assert notes["8"] == {
        "explanation": "words | of it",
        "detection": 0.75,
        "fuzzing": 0.5,
        "labels": ["digit (0.125 nats)"],
    }


def test_a_latent_takes_no_more_than_agreed(tmp_path: Path) -> None:
    write_examples(tmp_path / "topk", 1024, WORDS, density=0.06)
    folder = write_gallery([tmp_path])[0].parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1500 * 1024


def test_nearest_rows_of_another_sae() -> None:
    generator = np.random.default_rng(0)
    theirs = generator.normal(size=(50, 8)).astype(np.float32)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    index, cosine = nearest(theirs[[4, 9]], theirs)
    assert index[:, 0].tolist() == [4, 9] and (np.diff(cosine, axis=1) <= 0).all()
    np.testing.assert_allclose(cosine[:, 0], 1, atol=1e-6)


def test_what_is_refused(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["gallery", str(tmp_path / "empty")]) == 2
    assert "has examples; collect them with: python -m harness.evaluate" in capsys.readouterr().err
    assert main(["gallery", str(tmp_path / "nowhere")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert main(["gallery", str(sweep), str(sweep / "topk-n300")]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="something else than a gallery"):
        write_gallery([sweep], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_other_versions_are_left_out(sweep: Path) -> None:
    path = sweep / "topk-n300" / "quality" / "examples.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps({**content, "version": 99}))
    page, [note] = write_gallery([sweep])
    assert "topk-n300 is left out: its examples are of version 99" in note
    assert [sae["name"] for sae in read_script(page.parent / "data" / "index.js")[0]["saes"]] == ["topk-n600"]


def test_a_damaged_table_is_named(sweep: Path) -> None:
    path = sweep / "topk-n300" / "quality" / "examples.per_latent.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"per_latent.parquet cannot be read .* --force"):
        write_gallery([sweep])
    assert not (sweep / "gallery").exists() and not list(sweep.glob(".gallery*"))
