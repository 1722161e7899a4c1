"""Files are whole or absent."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.errors import UserError
from harness.files import (
    open_own,
    remove_left_behind,
    replacing,
    write_json_atomic,
    write_tensors_atomic,
    write_text_atomic,
)
from harness.record.metrics import MetricsFile


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path, durable=durable) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_content_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new" and not temporary.exists()


def test_what_json_does_not_have_becomes_null(tmp_path: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    write_json_atomic(tmp_path / "a.json", {"a": nan, "b": [1.5, -infinity, {"c": (infinity, "x")}], "d": True})
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == {"a": None, "b": [1.5, None, {"c": [None, "x"]}], "d": True}


def test_tensors_may_be_views_and_have_the_mode_of_other_files(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3)
    write_tensors_atomic(tmp_path / "t.safetensors", {"x": x.T})
    write_text_atomic(tmp_path / "a.txt", "")
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], x.T)
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors_atomic(tmp_path / "t.safetensors", {"x": torch.zeros(2)})
        write_json_atomic(tmp_path / "a.json", {})
        with open_own(tmp_path / "log.txt", "w") as file:
            file.write("x")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        write_text_atomic(tmp_path / "nowhere" / "a.txt", "")
    assert missing.value.filename == str(tmp_path / "nowhere" / "a.txt")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError) as directory:
        write_text_atomic(tmp_path / "a.txt", "")
    assert "tmp'" not in str(directory.value).replace(str(tmp_path), "")


def test_what_killed_processes_left_behind_is_removed(tmp_path: Path) -> None:
    for name in (".config.yaml.123.tmp", ".a.b.7.tmp"):
        (tmp_path / name).touch()
    others = ["config.yaml", ".hidden", ".x.tmp", "x.123.tmp"]
    for name in others:
        (tmp_path / name).touch()
    remove_left_behind(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("mode", ["a", "w", "wb"])
def test_nothing_is_written_through_a_planted_link(tmp_path: Path, mode: str) -> None:
    target = tmp_path / "mine"
    target.write_text("kept")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"link is a symbolic link.*remove it"):
        open_own(tmp_path / "link", mode)
    assert target.read_text() == "kept"


def test_an_atomic_write_replaces_a_planted_link_and_leaves_its_target(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.write_text("kept")
    for name in ("a.json", f".a.json.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(target)
    write_json_atomic(tmp_path / "a.json", [1])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert not (tmp_path / "a.json").is_symlink() and target.read_text() == "kept"


def test_a_run_does_not_append_to_a_file_elsewhere(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.write_text("kept")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl is a symbolic link"):
        MetricsFile(tmp_path / "metrics.jsonl")
    assert target.read_text() == "kept"
