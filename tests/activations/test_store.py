import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.activations.open import open_source
from harness.activations.store import stage, verify
from harness.activations.store.identity import store_id
from harness.activations.store.read import Store
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import sha256_of
from harness.process.signals import StopFlag
from harness.schema import with_seal


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
    monkeypatch.setattr(verify, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
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


def test_hashes_that_were_checked_before_a_kill_are_not_checked_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "verified.json").unlink()
    hashed: list[str] = []

    def killed(path: Path) -> str:
        if path.name == "train-00002.safetensors":
            raise KeyboardInterrupt
        hashed.append(path.name)
        return sha256_of(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(verify, "sha256_of", killed)
        Store(store)
    before = set(json.loads((store / "verified.json").read_text()))
    assert {"train-00000.safetensors", "train-00001.safetensors"} <= before
    hashed.clear()
    monkeypatch.setattr(verify, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    Store(store)
    assert "train-00002.safetensors" in hashed and not before & set(hashed)


def test_what_was_verified_is_recorded_elsewhere_if_a_store_may_only_be_read(
    tiny: ActivationsConfig, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "verified.json").unlink()
    (store / "verified.json").mkdir()  # it cannot be written, also not by root
    cfg, out = dataclasses.replace(tiny, dir=str(store.parent)), tmp_path / "mine"
    out.mkdir()
    hashed: list[str] = []
    monkeypatch.setattr(verify, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    for _ in range(2):
        open_source(cfg, out, progress=False, stop=StopFlag())
    assert len(hashed) == 5  # three training shards, one of held-out rows, statistics
    flip_a_byte(store / "train-00000.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        open_source(cfg, out, progress=False, stop=StopFlag())


def test_a_store_that_was_just_made_is_not_hashed_again(tiny: ActivationsConfig, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "sha256_of", None)
        assert open_source(tiny, tmp_path, progress=False, stop=StopFlag()).train_rows == 3000


MANY = """
import resource, sys
from pathlib import Path
import torch
from harness.activations.store.assemble import assemble
from harness.activations.store.read import Store
from harness.process.signals import StopFlag
from tests.activations.units import half_made
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
directory = Path(sys.argv[1])
plan = half_made(directory, 300, 100)
assemble(plan, directory, 1, {"kind": "lm"}, StopFlag())
store = Store(directory)
assert len(store.sample()) == 300 and len(torch.cat([rows for rows, _ in store.heldout(7)])) == 100
print(store.stream(1, 2000, torch.device("cpu")).batch(3).shape)
"""


def test_a_store_of_many_shards_opens_where_256_files_may_be_open(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path / "many")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2000, 4])\n"


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


def edit(store: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    content = json.loads((store / "manifest.json").read_text())
    change(content)
    (store / "manifest.json").write_text(
        json.dumps(with_seal(content) if seal else content).replace("Infinity", "1e999")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"].pop("train"), "shards.train is missing"),
        (lambda m: m.pop("rows"), "rows is missing"),
        (lambda m: m.update(shards=[]), "shards must be an object, not list"),
        (
            lambda m: m["shards"]["train"][1].update(file="../../x"),
            r"shards.train\[1\].file must be the name of a file",
        ),
        (lambda m: m["shards"]["train"][0].update(file="/etc/passwd"), r"shards.train\[0\].file must be the name"),
        (lambda m: m["shards"]["train"][0].update(sha256=""), r"shards.train\[0\].sha256 must be a sha256"),
        (lambda m: m["shards"]["heldout"][0].update(rows=10**9), "rows.heldout is not the sum over shards.heldout"),
        (lambda m: m.update(d_model=10**30), "d_model must be a number from 1"),
        (lambda m: m.update(d_model=True), "d_model must be a number, not True"),
        (lambda m: m.update(dtype="int8"), "dtype must be one of fp16, bf16, fp32"),
        (lambda m: m["statistics"]["raw"].update(variance=0.0), "statistics.raw.variance must be a number above 0"),
        (lambda m: m["statistics"]["raw"].update(variance=-1), "statistics.raw.variance must be a number above 0"),
        (lambda m: m["statistics"]["raw"].update(mean_sq_norm=float("inf")), "mean_sq_norm must be a number above 0"),
        (lambda m: m["statistics"].pop("file"), "statistics.file is missing"),
        (lambda m: m.update(recipe={}), "id is not the hash of its recipe"),
        (lambda m: m["recipe"].update(layer=7), "id is not the hash of its recipe"),
        (lambda m: m.update(description="x"), "description must be an object"),
    ],
)
def test_a_manifest_of_the_wrong_shape_is_named_by_its_key(
    store: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit(store, change)
    with pytest.raises(
        UserError, match=rf"manifest\.json is damaged \(.*{message}.*\); delete .* to harvest"
    ) as caught:
        Store(store)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_does_not_fit_its_tensors(store: Path) -> None:
    edit(store, lambda m: m.update(d_model=m["d_model"] * 2))
    with pytest.raises(UserError, match=r"mean_raw is .* instead of .* as the manifest says"):
        Store(store)


def test_a_changed_number_in_the_manifest_is_found(store: Path) -> None:
    edit(store, lambda m: m["statistics"]["raw"].update(variance=1.5), seal=False)
    with pytest.raises(UserError, match="it was changed after it was written"):
        Store(store)


def test_a_manifest_of_an_earlier_version_has_no_hash_of_its_own(store: Path) -> None:
    edit(store, lambda m: m.pop("sha256"), seal=False)
    assert Store(store).train_rows == 3000


def test_exchanged_stores_are_not_read_under_each_others_name(tiny: ActivationsConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, hook="mlp_out")
    for cfg in (tiny, other):
        open_source(cfg, tmp_path, progress=False, stop=StopFlag())
    root = tmp_path / "_activations"
    (root / store_id(tiny)).rename(root / "between")
    (root / store_id(other)).rename(root / store_id(tiny))
    (root / "between").rename(root / store_id(other))
    for cfg in (tiny, other):
        with pytest.raises(UserError, match=f"{store_id(cfg)} holds another store, "):
            open_source(cfg, tmp_path, progress=False, stop=StopFlag())
    assert stage.main([str(root / store_id(tiny)), str(tmp_path / "node")]) == 0
    assert not (tmp_path / "node").exists()


def test_an_edited_configuration_does_not_open_the_store_it_names(tiny: ActivationsConfig, tmp_path: Path) -> None:
    frozen = dataclasses.replace(tiny, store=store_id(tiny))
    open_source(frozen, tmp_path, progress=False, stop=StopFlag())
    open_source(frozen, tmp_path, progress=False, stop=StopFlag())
    with pytest.raises(UserError, match=r"activations\.hook is mlp_out, but the store .* was made with resid_post"):
        open_source(dataclasses.replace(frozen, hook="mlp_out"), tmp_path, progress=False, stop=StopFlag())


@pytest.mark.parametrize("content", ["[]", "{}", '{"train-00000.safetensors": 3}', "[" * 100_000, "\0"])
def test_a_damaged_record_of_what_was_verified_is_written_anew(store: Path, content: str) -> None:
    Store(store)
    (store / "verified.json").write_text(content)
    flip_a_byte(store / "train-00000.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        Store(store)


def test_a_damaged_copy_on_a_node_is_made_anew(store: Path, tmp_path: Path) -> None:
    assert stage.main([str(store), str(tmp_path / "node")]) == 0
    copy = tmp_path / "node" / store.name
    Store(copy)
    flip_a_byte(copy / "train-00000.safetensors")
    assert stage.main([str(store), str(tmp_path / "node")]) == 0
    assert Store(copy).train_rows == 3000
