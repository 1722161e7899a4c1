"""A tiny causal language model, text for it, and what SAEs on it are judged with."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from harness.activations.open import open_source
from harness.config import ActivationsConfig
from harness.process.signals import StopFlag
from harness.progress import Progress
from harness.quality.shared import Shared
from tests.activations.conftest import TINY, VOCABULARY, WORDS, save_tokenizer


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks with random weights."""
    directory = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **TINY, num_key_value_heads=1, max_position_embeddings=128, vocab_size=len(VOCABULARY), pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(1)
    for number in range(80):
        words = torch.randint(len(WORDS), (60,), generator=generator)
        (directory / f"{number:02d}.txt").write_text(" ".join(WORDS[word] for word in words))
    return directory


@pytest.fixture(scope="session")
def shared(causal: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """512 tokens of held-out text in contexts of 16."""
    yield from shared_of(causal, corpus, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="session")
def embedding_shared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The same for a model whose blocks add nothing: values at the hook are embeddings, of norm 1."""
    directory = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **TINY, num_key_value_heads=1, max_position_embeddings=128, vocab_size=len(VOCABULARY), pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(len(VOCABULARY), 16), dim=1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    yield from shared_of(directory, corpus, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="session")
def encoder_shared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The same for an encoder, which predicts no next token."""
    directory = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    transformers.AutoModel.from_config(transformers.BertConfig(**TINY, vocab_size=len(VOCABULARY))).save_pretrained(
        directory
    )
    save_tokenizer(directory)
    yield from shared_of(directory, corpus, tmp_path_factory.mktemp("out"))


def shared_of(model: Path, corpus: Path, out: Path) -> Iterator[Shared]:
    """512 tokens of held-out text in contexts of 16, and block 1 of a model of three."""
    cfg = ActivationsConfig(
        model=str(model),
        layer=1,
        text="files",
        text_paths=[f"{corpus}/*.txt"],
        context=16,
        tokens=2048,
        heldout_tokens=512,
        dtype="fp32",
        lm_precision="fp32",
    )
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        open_source(cfg, out, progress=False, stop=StopFlag())
        yield Shared(cfg, out, 512, StopFlag(), Progress(nowhere))
