"""What is saved comes back; what is damaged or foreign is refused by name."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from harness.parallel import Solo
from harness.record import checkpoint
from harness.record.checkpoint import Checkpoint, load_tensors
from harness.record.rundir import saved_step
from harness.schema import with_seal

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "flags": torch.tensor([True, False])}


def save_checkpoint(root: Path, step: int, tensors: dict[str, torch.Tensor], extra: dict, run_id: str) -> None:
    checkpoint.save_checkpoint(root, step, tensors, extra, run_id, Solo())


def load_checkpoint(root: Path, run_id: str) -> Checkpoint | None:
    return checkpoint.find_checkpoint(root, run_id, Solo())


def test_round_trip_and_only_the_newest_stays(tmp_path: Path) -> None:
    for step in (3, 12):
        save_checkpoint(tmp_path / "c", step, TENSORS, {"x": 1.5}, "run")
    found = load_checkpoint(tmp_path / "c", "run")
    assert found is not None and found.step == 12 and found.extra == {"x": 1.5} and not found.refused
    assert found.directory is not None
    read = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    load_tensors(found.directory, read, Solo())
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-0000000012"]


def test_a_large_state_is_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is put together in memory before it is written."""
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FILE_BYTES", 200)
    state = {f"t{number}": torch.arange(20.0) + number for number in range(5)} | {"large": torch.arange(100.0)}
    save_checkpoint(tmp_path / "c", 3, state, {}, "run")
    found = load_checkpoint(tmp_path / "c", "run")
    assert found is not None and found.directory is not None
    files = sorted(found.directory.glob("*.safetensors"))
    assert len(files) == 4, "two of 80 bytes fit into a file, the large one takes its own"
    read = {name: torch.zeros_like(value) for name, value in state.items()}
    load_tensors(found.directory, read, Solo())
    assert all(torch.equal(read[name], value) for name, value in state.items())
    files[1].write_bytes(files[1].read_bytes()[:-3])
    refused = load_checkpoint(tmp_path / "c", "run")
    assert refused is not None and refused.directory is None and files[1].name in refused.refused[0]


def test_saving_the_same_step_again_keeps_what_stands(tmp_path: Path) -> None:
    """A resumed run may be asked to save before its first step: no moment without any checkpoint."""
    save_checkpoint(tmp_path / "c", 3, TENSORS, {}, "run")
    (standing,) = (tmp_path / "c").iterdir()
    made = file_of(standing).stat().st_ino
    save_checkpoint(tmp_path / "c", 3, TENSORS, {}, "run")
    assert file_of(standing).stat().st_ino == made
    damaged("truncated", standing)
    save_checkpoint(tmp_path / "c", 3, TENSORS, {}, "run")
    found = load_checkpoint(tmp_path / "c", "run")
    assert found is not None and found.step == 3 and not found.refused


def test_what_kills_inside_saves_have_left_is_removed(tmp_path: Path) -> None:
    torn = tmp_path / "c" / ".step-0000000007.tmp"
    torn.mkdir(parents=True)
    (torn / "half.safetensors").write_bytes(b"x" * 100)
    save_checkpoint(tmp_path / "c", 12, TENSORS, {}, "run")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-0000000012"]


def test_nothing_there(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "c", "run") is None


def file_of(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def damaged(kind: str, directory: Path) -> None:
    marker = directory / "marker.json"
    if kind == "truncated":
        file = file_of(directory)
        file.write_bytes(file.read_bytes()[:-3])
    elif kind == "no marker":
        marker.unlink()
    elif kind == "torn marker":
        marker.write_text(marker.read_text()[:20])
    elif kind == "older format":
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 0}))
    elif kind == "garbled header":
        file = file_of(directory)
        file.write_bytes(b"\xff" * file.stat().st_size)
    elif kind == "one bit":
        content = bytearray(file_of(directory).read_bytes())
        content[-1] ^= 1
        file_of(directory).write_bytes(content)
    elif kind == "missing file":
        file_of(directory).unlink()
    elif kind == "an edited marker":
        content = json.loads(marker.read_text())
        content["extra"]["run"] = {"scalars": {"done": 1}}
        marker.write_text(json.dumps(content))
    elif kind == "a marker of another step":
        marker.write_text(json.dumps(with_seal(json.loads(marker.read_text()) | {"step": 9})))
    elif kind == "a file outside":
        content = json.loads(marker.read_text())
        content["files"] = {"../../x": {"bytes": 1, "sha256": "0" * 64}}
        marker.write_text(json.dumps(with_seal(content)))
    elif kind == "a directory as marker":
        marker.unlink()
        marker.mkdir()
    else:
        marker.write_text(kind)


MARKERS = ("[]", "{}", "null", "3", "NaN", '{"format": 3}', '{"format": ' + "9" * 5000 + "}", "[" * 100_000, "\0")


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated", "no marker", "torn marker", "older format", "garbled header", "one bit", "missing file"),
        *("an edited marker", "a marker of another step", "a file outside", "a directory as marker", *MARKERS),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_used(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "c"
    save_checkpoint(root, 3, TENSORS, {}, "run")
    (root / "step-0000000003").rename(tmp_path / "kept")
    save_checkpoint(root, 12, TENSORS, {}, "run")
    (tmp_path / "kept").rename(root / "step-0000000003")
    damaged(kind, root / "step-0000000012")
    found = load_checkpoint(root, "run")
    assert found is not None and found.step == 3
    assert len(found.refused) == 1 and "step-0000000012" in found.refused[0]
    assert len(found.refused[0].splitlines()) == 1
    save_checkpoint(root, 12, TENSORS, {}, "run")
    found = load_checkpoint(root, "run")
    assert found is not None and found.step == 12 and not found.refused


def test_a_marker_of_an_earlier_version_has_no_hash_of_its_own(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, TENSORS, {"x": 1}, "run")
    (marker,) = tmp_path.glob("*/marker.json")
    content = json.loads(marker.read_text())
    del content["sha256"]
    marker.write_text(json.dumps(content))
    found = load_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 3 and not found.refused


def test_a_linked_checkpoint_is_continued_and_only_the_link_removed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "c", tmp_path / "elsewhere"
    save_checkpoint(root, 3, TENSORS, {}, "run")
    (root / "step-0000000003").rename(elsewhere)
    (root / "step-0000000003").symlink_to(elsewhere)
    (root / ".step-0000000007.tmp").symlink_to(elsewhere)
    (root / "step-9999999999").symlink_to("nowhere")
    (root / "step-final").mkdir()
    found = load_checkpoint(root, "run")
    assert found is not None and found.step == 3
    assert saved_step(root) is None
    save_checkpoint(root, 12, TENSORS, {}, "run")
    assert (elsewhere / "marker.json").is_file()
    assert sorted(path.name for path in root.glob("step-*")) == ["step-0000000012", "step-9999999999", "step-final"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library raises an exception that is no `Exception`."""
    save_checkpoint(tmp_path, 3, TENSORS, {}, "run")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left") as caught:
        patched.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", full)
        save_checkpoint(tmp_path, 12, TENSORS, {}, "run")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000003"]
    save_checkpoint(tmp_path, 12, TENSORS, {}, "run")


def test_a_foreign_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", 3, TENSORS, {}, "topk-n64")
    found = load_checkpoint(tmp_path / "c", "topk-n128")
    assert found is not None and found.step == 0 and found.directory is None
    assert "belongs to run topk-n64" in found.refused[0]


def test_a_full_disk_keeps_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    save_checkpoint(tmp_path / "c", 3, TENSORS, {}, "run")
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="no room for a checkpoint"):
        save_checkpoint(tmp_path / "c", 12, TENSORS, {}, "run")
    found = load_checkpoint(tmp_path / "c", "run")
    assert found is not None and found.step == 3
