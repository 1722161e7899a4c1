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
"""Saved once per session as `models_on_disk`."""
WIDE = {"num_key_value_heads": 1, "head_dim": 8}
MOE: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": 3}
OPT: dict[str, Any] = {"ffn_dim": 32, "word_embed_proj_dim": 16}
FALCON: dict[str, Any] = {**TINY, "num_kv_heads": 2}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**TINY, **WIDE}),
    "mistral": ("Mistral", {**TINY, **WIDE}),
    "mixtral": ("Mixtral", {**TINY, **WIDE, **MOE}),
    "qwen2": ("Qwen2", {**TINY, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {**TINY, **WIDE}),
    "gpt2": ("GPT2", GPT),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "codegen": ("CodeGen", {**GPT, "n_head": 4, "rotary_dim": 4}),
    "neox parallel": ("GPTNeoX", {**TINY, "use_parallel_residual": True}),
    "neox sequential": ("GPTNeoX", {**TINY, "use_parallel_residual": False}),
    "phi": ("Phi", TINY),
    "phi3": ("Phi3", TINY),
    "stablelm": ("StableLm", {**TINY, "num_key_value_heads": 2}),
    "stablelm parallel": ("StableLm", {**TINY, "num_key_value_heads": 2, "use_parallel_residual": True}),
    "cohere parallel": ("Cohere", TINY),
    "falcon parallel": ("Falcon", {**FALCON, "parallel_attn": True}),
    "falcon sequential": ("Falcon", {**FALCON, "parallel_attn": False, "alibi": True, "multi_query": False}),
    "falcon two norms": ("Falcon", {**FALCON, "new_decoder_architecture": True}),
    "gemma": ("Gemma", {**TINY, **WIDE}),
    "gemma2": ("Gemma2", {**TINY, **WIDE}),
    "gemma3": ("Gemma3Text", {**TINY, **WIDE}),
    "olmo2": ("Olmo2", TINY),
    "glm4": ("Glm4", {**TINY, **WIDE}),
    "exaone4": ("Exaone4", {**TINY, **WIDE}),
    "granite": ("Granite", {**TINY, "num_key_value_heads": 1, "residual_multiplier": 0.22}),
    "granitemoe": ("GraniteMoe", {**TINY, "num_key_value_heads": 1, **MOE, "residual_multiplier": 0.22}),
    "granite once": ("Granite", {**TINY, "num_key_value_heads": 1, "residual_multiplier": 1.0}),
    "minicpm3": (
        "MiniCPM3",
        {**TINY, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
    ),
    "bloom": ("Bloom", {"hidden_size": 16, "n_head": 2, "n_layer": 3}),
    "mpt": ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 3, "expansion_ratio": 2}),
    "opt": ("OPT", {**TINY, **OPT}),
    "opt post-norm": ("OPT", {**TINY, **OPT, "do_layer_norm_before": False}),
    "xglm": ("XGLM", {"d_model": 16, "attention_heads": 2, "num_layers": 3, "ffn_dim": 32}),
}
"""Decoders of many architectures: the name of the configuration's class, and small numbers for it."""


def decoder(name: str) -> transformers.PreTrainedModel:
    """A small model of `DECODERS` with random weights."""
    kind, numbers = DECODERS[name]
    shared = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return _random(getattr(transformers, f"{kind}Config")(**shared, **numbers))


def _random(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _config(family: str) -> transformers.PreTrainedConfig:
    shared: dict[str, Any] = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "bert":
        return transformers.BertConfig(**TINY, vocab_size=len(VOCABULARY), max_position_embeddings=128)
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=16, n_head=2, n_layer=3, n_positions=128, **shared)
    if family == "llama":
        return transformers.LlamaConfig(**TINY, num_key_value_heads=1, max_position_embeddings=128, **shared)
    return transformers.GPTNeoXConfig(**TINY, max_position_embeddings=128, **shared)


def save_tokenizer(directory: Path, template: str = "", **special: Any) -> None:
    """A tokenizer of `WORDS`; `template`, e.g. `[CLS] $A [SEP]`, is what it puts around a text."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    if special:
        fast.add_special_tokens(special)
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
        _random(_config(family)).save_pretrained(root / family)
        save_tokenizer(root / family, "[CLS] $A [SEP]" if family == "bert" else "")
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
