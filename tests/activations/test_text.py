import dataclasses
import gzip
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from harness.activations.lm.documents import documents
from harness.activations.lm.text import COMPRESSIONS, TXT_DOCUMENT_CHARACTERS
from harness.config import ActivationsConfig
from harness.errors import UserError


def files(*patterns: str, **settings: object) -> ActivationsConfig:
    return ActivationsConfig(model="unused", text="files", text_paths=list(patterns), **settings)  # pyright: ignore


def texts(cfg: ActivationsConfig) -> list[str]:
    return [document.text for document in documents(cfg, "")]


def write_all_formats(directory: Path) -> None:
    (directory / "a.txt").write_text("plain text")
    (directory / "b.jsonl").write_text('{"text": "first line"}\n\n{"text": "second line"}\n{"text": null}\n')
    pyarrow.parquet.write_table(pa.table({"text": ["one row", "another row"]}), directory / "c.parquet")


def test_stdlib_has_sources_and_reference_but_no_tests() -> None:
    sources = texts(ActivationsConfig(model="unused"))
    assert len(sources) > 500
    assert any('"""Heap queue algorithm' in text for text in sources)  # heapq.py
    assert any(text.startswith('The "assert" statement') for text in sources)  # pydoc_data.topics
    assert not any("class TestHeap" in text for text in sources)
    assert len(set(sources)) == len(sources)


def test_every_format_is_read(tmp_path: Path) -> None:
    write_all_formats(tmp_path)
    expected = {"plain text", "first line", "second line", "one row", "another row"}
    assert set(texts(files(f"{tmp_path}/*"))) == expected
    assert set(texts(files(f"{tmp_path}/**/*.jsonl"))) == {"first line", "second line"}


def test_order_depends_on_content_and_seed_but_not_on_names(tmp_path: Path) -> None:
    for name, order in (("x", range(20)), ("y", reversed(range(20)))):
        (tmp_path / name).mkdir()
        for place, number in enumerate(order):
            (tmp_path / name / f"{place:02d}.txt").write_text(f"document {number}")
    first = texts(files(f"{tmp_path}/x/*.txt"))
    assert first == texts(files(f"{tmp_path}/y/*.txt"))
    assert sorted(first) == sorted(texts(files(f"{tmp_path}/x/*.txt", seed=1)))
    assert first != texts(files(f"{tmp_path}/x/*.txt", seed=1))


def test_equal_documents_count_once_and_empty_ones_not_at_all(tmp_path: Path) -> None:
    for name, text in (("a", "same"), ("b", "same"), ("c", " \n")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert texts(files(f"{tmp_path}/*.txt")) == ["same"]


def test_a_long_file_becomes_several_documents_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    (tmp_path / "book.txt").write_text(text)
    parts = texts(files(f"{tmp_path}/book.txt"))
    assert len(parts) == -(-len(text) // TXT_DOCUMENT_CHARACTERS)
    assert all(part.endswith("\n") and len(part) <= TXT_DOCUMENT_CHARACTERS for part in parts)
    assert sorted("".join(parts).splitlines()) == sorted(text.splitlines())


def test_a_long_row_is_cut_like_a_long_file(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text(text)
    assert texts(files(f"{tmp_path}/a.jsonl")) == texts(files(f"{tmp_path}/a.txt"))


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".zst"])
def test_compressed_files_give_the_same_documents(tmp_path: Path, compression: str) -> None:
    write_all_formats(tmp_path)
    plain, packed = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")], []
    for path in plain:
        packed.append(tmp_path / f"{path.name}{compression}")
        with pa.output_stream(packed[-1], compression=COMPRESSIONS[compression]) as file:
            file.write(path.read_bytes())
    for path, other in zip(plain, packed, strict=True):
        assert texts(files(str(other))) == texts(files(str(path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    line = "one" if name == "a.txt" else json.dumps({"text": "one"})
    (tmp_path / name).write_text(line, encoding="utf-8-sig")
    assert texts(files(str(tmp_path / name))) == ["one"]


@pytest.mark.parametrize("name", ["corpus [2024-05] (v1)", "a*b", "what?", "[ab]"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    for directory, text in ((name, "right"), ("a1", "wrong"), ("b", "wrong"), ("aXb", "wrong"), ("whatX", "wrong")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.txt").write_text(text)
    assert texts(files(f"{tmp_path}/{name}/a.txt")) == ["right"]
    assert set(texts(files(f"{tmp_path}/*/a.txt"))) == {"right", "wrong"}


def test_a_lone_surrogate_does_not_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud800 pair"}')
    assert texts(files(f"{tmp_path}/a.jsonl")) == ["broken ? pair"]


def bad_text(tmp_path: Path, case: str) -> ActivationsConfig:
    if case == "no match":
        return files(f"{tmp_path}/*.txt")
    if case == "suffix":
        (tmp_path / "a.pdf").write_text("x")
        return files(f"{tmp_path}/a.pdf")
    if case == "encoding":
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        return files(f"{tmp_path}/a.txt")
    if case == "json":
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text"')
        return files(f"{tmp_path}/a.jsonl")
    if case == "not text":
        (tmp_path / "a.jsonl").write_text('{"text": 3}')
        return files(f"{tmp_path}/a.jsonl")
    if case == "not parquet":
        (tmp_path / "a.parquet").write_text("no parquet at all")
        return files(f"{tmp_path}/a.parquet")
    if case == "directory":
        return files(str(tmp_path))
    if case == "digits":
        (tmp_path / "a.jsonl").write_text('{"text": ' + "7" * 5000 + "}")
        return files(f"{tmp_path}/a.jsonl")
    if case == "nested":
        (tmp_path / "a.jsonl").write_text("[" * 100_000)
        return files(f"{tmp_path}/a.jsonl")
    if case == "torn":
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(10_000))[:2000])
        return files(f"{tmp_path}/a.txt.gz")
    if case == "not gzip":
        (tmp_path / "a.jsonl.gz").write_text("plain text")
        return files(f"{tmp_path}/a.jsonl.gz")
    write_all_formats(tmp_path)
    return files(f"{tmp_path}/{case}", text_field="body")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no match", "no file matches"),
        ("suffix", "is no .txt, .jsonl or .parquet file"),
        ("encoding", "is not UTF-8"),
        ("directory", r"is a directory; name the files in it, e\.g\. .*/\*\.jsonl"),
        ("digits", "line 1 is not JSON: Exceeds the limit"),
        ("nested", "line 1 is not JSON: maximum recursion"),
        ("torn", r"cannot read .*a\.txt\.gz"),
        ("not gzip", r"cannot read .*a\.jsonl\.gz"),
        ("json", "line 2 is not JSON"),
        ("not text", "holds int, not text"),
        ("not parquet", "no readable Parquet"),
        ("b.jsonl", "no field 'body' .it has text.; set activations.text_field"),
        ("c.parquet", "no field 'body' .it has text.; set activations.text_field"),
    ],
)
def test_unreadable_text_is_one_line_with_the_way_out(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        texts(bad_text(tmp_path, case))
    assert "\n" not in str(caught.value)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActivationsConfig:
    """A dataset that `datasets.load_dataset` takes from a directory, as it would from the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "dataset"
    directory.mkdir()
    rows = [json.dumps({"text": f"row {number}", "id": number}) for number in range(30)]
    (directory / "train.jsonl").write_text("\n".join(rows))
    return ActivationsConfig(model="unused", text="hub", dataset=str(directory))


def test_a_dataset_is_read_through_the_datasets_library(dataset: ActivationsConfig) -> None:
    assert set(texts(dataset)) == {f"row {number}" for number in range(30)}


def test_a_wrong_field_or_split_of_a_dataset_is_named(dataset: ActivationsConfig) -> None:
    with pytest.raises(UserError, match=r"no field 'body' \(it has text, id\)"):
        texts(dataclasses.replace(dataset, text_field="body"))
    with pytest.raises(UserError, match="split 'validation'") as caught:
        texts(dataclasses.replace(dataset, split="validation"))
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_fails_fast_with_one_line() -> None:
    started = time.monotonic()
    cfg = ActivationsConfig(model="unused", text="hub", dataset="somebody/something")
    with pytest.raises(UserError, match=r"hub .* cannot be reached.*give a local directory") as caught:
        texts(cfg)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15
