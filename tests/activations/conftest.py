"""Tiny language models of several families, saved to disk as a user would have them, and small texts."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hugging Face libraries are imported: no test touches a network

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors

from harness.config import ActivationsConfig

WORDS = [f"w{number}" for number in range(90)]
VOCABULARY = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
TINY: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 32}
FAMILIES = ("bert", "gpt2", "llama", "gpt_neox")


def _config(family: str) -> transformers.PreTrainedConfig:
    shared: dict[str, Any] = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "bert":
        return transformers.BertConfig(**TINY, vocab_size=len(VOCABULARY), max_position_embeddings=128)
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=16, n_head=2, n_layer=3, n_positions=128, **shared)
    if family == "llama":
        return transformers.LlamaConfig(**TINY, num_key_value_heads=1, max_position_embeddings=128, **shared)
    return transformers.GPTNeoXConfig(**TINY, max_position_embeddings=128, **shared)


def _save_model(family: str, directory: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(_config(family))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(directory)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work on one thread: faster on a busy machine, and bit-identical between processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models_on_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory per model family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        _save_model(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 distinct documents of 20 to 400 words."""
    directory = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(1)
    for number in range(60):
        length = int(torch.randint(20, 400, (), generator=generator))
        words = torch.randint(len(WORDS), (length,), generator=generator)
        (directory / f"{number:02d}.txt").write_text(" ".join(WORDS[word] for word in words))
    return directory


@pytest.fixture
def tiny(models_on_disk: dict[str, Path], text_files: Path) -> ActivationsConfig:
    """A small harvest of the tiny BERT; tests change what they are about."""
    return ActivationsConfig(
        model=str(models_on_disk["bert"]),
        layer=1,
        text="files",
        text_paths=[f"{text_files}/*.txt"],
        context=16,
        tokens=3000,
        heldout_tokens=300,
        dtype="fp32",
        lm_precision="fp32",
        shard_rows=1000,
        lm_batch=8,
    )
