import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.activations.open import open_source
from harness.activations.store import manifest
from harness.activations.store.identity import store_id
from harness.activations.store.read import Store
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import sha256_of
from harness.process.signals import StopFlag


@pytest.fixture
def store(tiny: ActivationsConfig, tmp_path: Path) -> Path:
    open_source(tiny, tmp_path, progress=False, stop=StopFlag())
    return tmp_path / "_activations" / store_id(tiny)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00001.safetensors", flip_a_byte, "train-00001.safetensors is damaged"),
        ("heldout-00000.safetensors", flip_a_byte, "heldout-00000.safetensors is damaged"),
        ("statistics.safetensors", flip_a_byte, "statistics.safetensors is damaged"),
        ("train-00002.safetensors", truncate, r"train-00002.safetensors has \d+ bytes instead of \d+"),
        ("train-00000.safetensors", Path.unlink, "train-00000.safetensors is missing"),
        ("manifest.json", truncate, "manifest.json is damaged"),
    ],
)
def test_a_wrong_file_is_named_and_never_used(
    store: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(store / name)
    with pytest.raises(UserError, match=rf"{message}.*; delete .*{store.name} to harvest it again") as caught:
        Store(store)
    assert "\n" not in str(caught.value)


def test_a_store_of_another_schema_is_refused(store: Path) -> None:
    content = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99, this program reads 1"):
        Store(store)


def test_a_directory_without_manifest_in_the_way_is_not_overwritten(tiny: ActivationsConfig, tmp_path: Path) -> None:
    directory = tmp_path / "_activations" / store_id(tiny)
    directory.mkdir(parents=True)
    with pytest.raises(UserError, match=r"no manifest\.json, so it is no store; delete it"):
        open_source(tiny, tmp_path, progress=False, stop=StopFlag())


def test_hashes_are_checked_once_and_again_after_a_change(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when whoever changed a file put its time back."""
    hashed: list[str] = []
    monkeypatch.setattr(manifest, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    Store(store)
    hashed.clear()
    Store(store)
    assert hashed == []
    shard = store / "train-00000.safetensors"
    times = shard.stat()
    flip_a_byte(shard)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="is damaged"):
        Store(store)


def test_rows_are_read_when_they_are_used(store: Path) -> None:
    source, shard = Store(store), store / "train-00002.safetensors"
    with shard.open("rb+") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80\x3f")  # 1.0
    assert float(source.stream(0, 3000, torch.device("cpu")).batch(0)[-1, -1]) == 1.0


def test_a_copied_store_opens(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    assert Store(tmp_path / "copy").train_rows == 3000


def test_a_damaged_store_is_not_harvested_over(tiny: ActivationsConfig, store: Path, tmp_path: Path) -> None:
    flip_a_byte(store / "train-00000.safetensors")
    for cfg in (tiny, dataclasses.replace(tiny, shard_rows=500)):
        with pytest.raises(UserError, match="is damaged"):
            open_source(cfg, tmp_path, progress=False, stop=StopFlag())
