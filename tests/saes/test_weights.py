"""Weights in one file and in several: the same tensors, whoever wrote them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import UserError
from harness.parallel import Solo
from harness.saes import weights
from harness.saes.weights import read_weights, write_weights

CUT = ("W_dec", "W_enc", "fire_counts")


def tensors(rows: int = 10) -> dict[str, Tensor]:
    latents = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
    return {"W_enc": latents, "W_dec": -latents, "b_dec": torch.ones(3), "fire_counts": torch.arange(rows)}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Threads:
    """What threads that stand for ranks have in common."""

    def __init__(self, size: int) -> None:
        self.barrier, self.texts = threading.Barrier(size), [""] * size


class Rank(Solo):
    """One of several ranks of one replica, each in a thread of this process."""

    def __init__(self, rank: int, shared: Threads) -> None:
        self.rank = self.shard_rank = rank
        self.size = self.shard = len(shared.texts)
        self.shared = shared

    def texts(self, own: str) -> list[str]:
        self.shared.texts[self.rank] = own
        self.shared.barrier.wait()
        found = list(self.shared.texts)
        self.shared.barrier.wait()
        return found

    def sum_(self, tensor: Tensor, over: str, kind: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tensor.copy_(torch.tensor([json.loads(text) for text in self.texts(json.dumps(tensor.tolist()))]).sum(0))


@pytest.mark.parametrize(("limit", "files"), [(4e9, 1), (200, 2), (100, 4)])
def test_large_weights_are_cut_into_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, files: int
) -> None:
    monkeypatch.setattr(weights, "WEIGHTS_FILE_BYTES", limit)
    written = write_weights(tmp_path, tensors(), CUT, Solo())
    assert set(written) == {path.name for path in tmp_path.iterdir()}
    assert same(read_weights(tmp_path, ""), tensors())
    if files > 1:
        names = [f"sae-{number + 1:05d}-of-{files:05d}.safetensors" for number in range(files)]
        assert sorted(written) == [*names, "sae.safetensors.index.json"]
        index = json.loads((tmp_path / "sae.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors().values())
        # what the convention promises: each tensor is in the file that the index names
        for name, file in index["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_ranks_write_their_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WEIGHTS_FILE_BYTES", 200)
    save_file({"old": torch.zeros(1)}, tmp_path / "sae-00001-of-00007.safetensors")  # of a killed attempt
    shared, written = Threads(2), {}

    def rank(number: int) -> None:
        own = {name: tensor.chunk(2)[number] if name in CUT else tensor for name, tensor in tensors().items()}
        written[number] = write_weights(tmp_path, own, CUT, Rank(number, shared))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert written[0] == written[1] and set(written[0]) == {path.name for path in tmp_path.iterdir()}
    assert len(written[0]) == 3
    assert same(read_weights(tmp_path, ""), tensors())


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WEIGHTS_FILE_BYTES", 200)
    write_weights(tmp_path, tensors(), CUT, Solo())
    part, index = tmp_path / "sae-00002-of-00002.safetensors", tmp_path / "sae.safetensors.index.json"
    places = json.loads(index.read_text())
    for name, file, message in (
        ("W_enc.00002-of-00002", "../x", r"weight_map.W_enc.00002-of-00002 must be the name of a file"),
        ("b_enc", part.name, r"has no tensor b_enc; copy it"),
    ):
        index.write_text(json.dumps({"weight_map": {**places["weight_map"], name: file}}))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path, "copy it")
    index.write_text(json.dumps(places))
    part.unlink()
    with pytest.raises(UserError, match=r"sae-00002-of-00002.safetensors is missing; copy it"):
        read_weights(tmp_path, "copy it")
