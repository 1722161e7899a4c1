"""Splicing: the suffix alone gives the logits of the whole model, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from harness.activations.lm.splice import SplicedModel, load_spliced
from harness.config import ActivationsConfig
from harness.errors import UserError
from tests.activations.conftest import DECODERS, VOCABULARY

IDS = torch.arange(24).reshape(2, 12) + 10


def causal(directory: Path, name: str) -> Path:
    kind, numbers = DECODERS[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(VOCABULARY), pad_token_id=0, bos_token_id=2, eos_token_id=3, **numbers
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


def spliced(directory: Path, hook: str = "resid_post", layer: int = 1) -> SplicedModel:
    cfg = ActivationsConfig(model=str(directory), layer=layer, hook=hook, context=12)
    return load_spliced(cfg, "fp32", torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "neox parallel", "qwen3"])
def test_the_suffix_gives_the_logits_of_the_whole(name: str, tmp_path: Path) -> None:
    model = spliced(causal(tmp_path, name))
    with torch.no_grad():
        whole = model.hooked.model(input_ids=IDS).logits
    hidden = model.hidden(IDS)
    assert model.skips
    torch.testing.assert_close(model.logits(IDS, hidden), whole, atol=1e-5, rtol=1e-5)
    changed = hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    by_suffix = model.logits(IDS, changed)
    model._skips = False
    torch.testing.assert_close(by_suffix, model.logits(IDS, changed), atol=1e-5, rtol=1e-5)
    assert (by_suffix - whole).abs().max() > 1e-3
    with torch.no_grad():  # the blocks are back in place
        assert torch.equal(model.hooked.model(input_ids=IDS).logits, whole)


@pytest.mark.parametrize("hook", ["mlp_out", "attn_out"])
def test_other_hooks_replace_their_output(hook: str, tmp_path: Path) -> None:
    model = spliced(causal(tmp_path, "granite"), hook)
    hidden = model.hidden(IDS)
    with torch.no_grad():
        whole = model.hooked.model(input_ids=IDS).logits
    torch.testing.assert_close(model.logits(IDS, hidden), whole, atol=1e-5, rtol=1e-5)
    assert not model.skips
    assert (model.logits(IDS, hidden * 0) - whole).abs().max() > 1e-3


def test_an_encoder_has_no_losses(models_on_disk: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="predict the next token"):
        spliced(models_on_disk["bert"])
