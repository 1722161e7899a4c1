"""Labelled texts: unique, balanced, split by text; sparse probes find what was planted."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.csv
import pytest
import torch

from harness.errors import UserError
from harness.quality import probe_sets, probes
from harness.quality.probe_sets import SetRows, installed, read_set, set_rows
from harness.quality.registry import METRICS
from harness.quality.shared import Shared
from harness.quality.sparse_probes import accuracies, accuracy_of, channel_accuracies, pooled_codes
from tests.activations.conftest import WORDS
from tests.quality.planted import orthonormal, planted


def write_set(path: Path, prompts: list[str], targets: list[str]) -> None:
    table = pyarrow.table({"prompt": prompts, "prompt_len": [len(text) for text in prompts], "target": targets})
    with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
        pyarrow.csv.write_csv(table, out)


def test_texts_are_unique_balanced_and_divided(tmp_path: Path) -> None:
    """Rows that were drawn again would stand in both halves."""
    first, second = [f"one\n{i}, of" for i in range(40)], [f"two {i}" for i in range(25)]
    prompts = [*first, *first, *second, *second[:10], "both", "both"]
    targets = [*["a"] * 80, *["b"] * 35, "a", "b"]
    write_set(tmp_path / "s.csv.zst", prompts, targets)
    texts, labels, train = read_set(tmp_path / "s.csv.zst", 1000)
    assert len(set(texts)) == len(texts) == 50 and sum(labels) == 25 and "both" not in texts
    assert all(text.startswith("two") == label for text, label in zip(texts, labels, strict=True))
    assert 24 <= sum(train) <= 26 and sum(labels[:10]) == 5
    few = read_set(tmp_path / "s.csv.zst", 20)
    assert few[0] == texts[:20]


@pytest.mark.parametrize("targets", [["a", "b", "c"], ["a", "a", "a"]])
def test_other_files_are_refused(tmp_path: Path, targets: list[str]) -> None:
    write_set(tmp_path / "s.csv.zst", ["x", "y", "z"], targets)
    with pytest.raises(UserError, match="not two"):
        read_set(tmp_path / "s.csv.zst", 100)
    (tmp_path / "t.csv.zst").write_bytes(b"no")
    with pytest.raises(UserError, match="make setup-probes"):
        read_set(tmp_path / "t.csv.zst", 100)


def texts_with(word: str, others: list[str], count: int) -> list[str]:
    generator = torch.Generator().manual_seed(len(word))
    drawn = torch.randint(len(others), (count, 6), generator=generator).tolist()
    return [" ".join([*(others[place] for place in row), word]) for row in drawn]


@pytest.fixture
def two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets of texts whose last word tells the label."""
    for name in ("one", "two"):
        prompts = texts_with(WORDS[0], WORDS[2:], 120) + texts_with(WORDS[1], WORDS[2:], 120)
        write_set(tmp_path / f"{name}.csv.zst", prompts, ["n"] * 120 + ["y"] * 120)
    monkeypatch.setattr(probe_sets, "SETS", ("one", "two"))
    monkeypatch.setattr(probe_sets, "POOLED", ("two",))
    monkeypatch.setattr(probe_sets, "installed", lambda: "0.4.2")
    monkeypatch.setattr(probe_sets, "_folder", lambda: tmp_path)
    monkeypatch.setattr(probe_sets, "MOST_TEXTS", 200)


@pytest.mark.usefixtures("two_sets")
def test_rows_of_sets(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "tokens", 4096)
    found = set_rows(shared)
    assert list(found) == ["one", "two"] and len(found["one"].last) == 200 and found["one"].tokens is None
    # the rows are those of each text alone, without padding
    text = read_set(probe_sets._folder() / "one.csv.zst", 200)[0][3]
    ids = [*shared.special.prefix, *shared.tokenizer(text, add_special_tokens=False)["input_ids"]][: shared.cfg.context]
    alone = shared.model.hidden(torch.tensor([ids]))[0]
    torch.testing.assert_close(found["one"].last[3], alone[-1], atol=1e-4, rtol=1e-4)
    tokens, owner = found["two"].tokens, found["two"].owner
    assert tokens is not None and owner is not None and int(owner.max()) == 199
    torch.testing.assert_close(tokens[owner == 3].float()[-1], alone[-1], atol=0.02, rtol=0.02)
    monkeypatch.setattr(probe_sets, "_make", None)
    assert torch.equal(set_rows(shared)["one"].last, found["one"].last)

    parts = probes.tasks_of(shared, found)
    beside = probes.controls(parts) | {"random": probes.random_losses(parts, 32)}
    outcome = probes.judge(planted(torch.randn(32, 16), k=4), parts, beside, found)
    assert outcome.values["loss_full_texts"].value < 0.5 < outcome.values["loss_constant_texts"].value
    assert 0.3 < outcome.values["accuracy_k5"].value <= 1
    assert set(channel_accuracies(found)) == {"accuracy_full", *(f"accuracy_channels_k{k}" for k in (1, 2, 5))}
    assert outcome.values["tasks"].value == len(outcome.curves["labels"]) >= 2


def test_without_the_package_one_line_says_so(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(probe_sets, "installed", lambda: None)
    monkeypatch.setattr(shared.progress, "note", said.append)
    assert set_rows(shared) == {} and len(said) == 1 and "make setup-probes" in said[0]
    assert METRICS["probes"].settings("embedding") == {"sae_probes": installed()}


def test_sparse_probes_find_what_was_planted() -> None:
    """Latent 3 is active in texts of one class; the mean over tokens is taken text by text."""
    D = orthonormal(16)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 2 == 0
    owner = torch.arange(80).repeat_interleave(5)
    active = torch.rand(400, 16, generator=generator)
    active[:, 3] = 2.0 * y[owner]
    rows = SetRows(torch.empty(0), y, torch.arange(80) % 4 < 2, active @ D, owner)
    codes = pooled_codes(planted(D, k=16), active @ D, owner, 80)
    torch.testing.assert_close(codes, active.reshape(80, 5, 16).mean(dim=1), atol=1e-5, rtol=1e-4)
    values = accuracies(planted(D, k=16), {"set": rows})
    assert all(values[f"accuracy_k{k}"].value == 1.0 for k in (1, 2, 5))
    noise = torch.randn(80, 16, generator=generator)
    assert accuracy_of(noise, y, rows.train, 1) < 0.75
