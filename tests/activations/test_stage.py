"""A node-local copy of a store: whole or absent, and training reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.activations.open import open_source
from harness.activations.store import stage
from harness.activations.store.identity import store_id
from harness.activations.store.read import Store
from harness.config import ActivationsConfig
from harness.process.signals import StopFlag


@pytest.fixture
def store(tiny: ActivationsConfig, tmp_path: Path) -> Path:
    open_source(tiny, tmp_path, progress=False, stop=StopFlag())
    return tmp_path / "_activations" / store_id(tiny)


def test_the_copy_is_the_store(store: Path, tmp_path: Path) -> None:
    local = tmp_path / "node"
    assert stage.main([str(store), str(local)]) == 0
    copy, shared = Store(local / store.name), Store(store)
    assert copy.id == shared.id
    assert copy.sample().equal(shared.sample())
    before = (local / store.name / "manifest.json").stat().st_mtime_ns
    assert stage.main([str(store), str(local)]) == 0
    assert (local / store.name / "manifest.json").stat().st_mtime_ns == before
    assert [path.name for path in local.iterdir()] == [store.name]


def test_without_room_the_shared_store_is_read(
    store: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.main([str(store), str(small_disk)]) == 0
    assert "reading the shared one" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []


def test_what_is_no_store_is_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main([str(tmp_path / "nothing"), str(tmp_path / "node")]) == 0
    assert "is not a finished store" in capsys.readouterr().err
