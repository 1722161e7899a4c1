"""Text that comes as token ids, in Parquet and Arrow files."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch

from harness.activations.lm.contexts import open_contexts
from harness.activations.lm.documents import documents
from harness.activations.store.harvest import prepare
from harness.activations.store.identity import store_id
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.process.signals import StopFlag
from tests.activations.test_harvest import all_rows, opened

IDS = [
    [int(token) for token in torch.randint(4, 90, (length,)).tolist()] for length in (300, 250, 90, 400, 60, 500, 350)
]


def write(path: Path, column: str = "input_ids", rows: object = IDS) -> Path:
    table = pyarrow.table({column: rows, "other": ["x"] * len(IDS)})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.stem == "stream":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.fixture
def cfg(tiny: ActivationsConfig) -> ActivationsConfig:
    return dataclasses.replace(tiny, text="tokens", tokens=1000, heldout_tokens=100)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_every_kind_of_file_gives_the_ids(cfg: ActivationsConfig, tmp_path: Path, name: str) -> None:
    found = documents(dataclasses.replace(cfg, text_paths=[str(write(tmp_path / name))]), "")
    ids = [document.ids for document in found]
    assert sorted(row.tolist() for row in ids if row is not None) == sorted(IDS)


def test_the_model_sees_the_ids_as_they_are(cfg: ActivationsConfig, tmp_path: Path) -> None:
    """No [CLS] and [SEP] around a context, which is the next 16 ids of a document."""
    cfg = dataclasses.replace(cfg, text_paths=[str(write(tmp_path / "a.parquet"))])
    (tmp_path / "plan").mkdir()
    plan, _ = prepare(cfg, tmp_path / "plan", StopFlag())
    assert plan.prefix_tokens == plan.suffix_tokens == 0
    contexts = open_contexts(tmp_path / "plan", "train")
    starts = {tuple(ids[start : start + 16]) for ids in IDS for start in range(0, len(ids), 16)}
    for number in range(contexts.count):
        assert tuple(contexts.ids[contexts.offsets[number] : contexts.offsets[number + 1]]) in starts
    arrow = dataclasses.replace(cfg, text_paths=[str(write(tmp_path / "stream.arrow"))])
    assert store_id(arrow) != store_id(cfg)  # other files
    assert torch.equal(all_rows(opened(cfg, tmp_path)), all_rows(opened(arrow, tmp_path)))


@pytest.mark.parametrize(
    ("column", "rows", "message"),
    [
        ("tokens", IDS, r"has no field 'input_ids' \(it has tokens, other\); set activations.text_field"),
        ("input_ids", [["a"]] * len(IDS), "holds no lists of token ids"),
        ("input_ids", [1] * len(IDS), "holds no lists of token ids"),
        ("input_ids", [[1, -2]] * len(IDS), "holds the id -2"),
        (
            "input_ids",
            [[4, 5, 2000, number] for number in range(len(IDS))],
            "the ids of the text have id 2000, its model has 94 embeddings",
        ),
    ],
)
def test_files_without_ids_are_one_line(
    cfg: ActivationsConfig, tmp_path: Path, column: str, rows: list[object], message: str
) -> None:
    cfg = dataclasses.replace(cfg, text_paths=[str(write(tmp_path / "a.parquet", column, rows))])
    with pytest.raises(UserError, match=message):
        opened(cfg, tmp_path)


def test_another_column_can_be_named(cfg: ActivationsConfig, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", "tokens")
    named = dataclasses.replace(cfg, text_paths=[str(path)], text_field="tokens")
    assert sum(len(np.asarray(document.ids)) for document in documents(named, "")) == sum(map(len, IDS))
