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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "neox parallel", "qwen3"])
@pytest.mark.parametrize("hook", ["resid_post", "mlp_out"])
def test_continuations_are_the_logits_of_whole_texts(name: str, hook: str, tmp_path: Path) -> None:
    """What stands before the changed position is computed once, and kept from one part of the variants to the next."""
    model = spliced(causal(tmp_path, name), hook=hook)
    ids, hidden = IDS[0], model.hidden(IDS[:1])[0]
    values = hidden[5] + torch.randn(7, len(hidden[5]), generator=torch.Generator().manual_seed(0))
    texts = hidden.repeat(7, 1, 1)
    texts[:, 5] = values
    whole = model.logits(ids.expand(7, -1), texts)[:, 5:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.activations.lm.splice.LOGITS", 3 * len(ids) * model.vocabulary)
        parts = list(model.continuations(ids, hidden, 5, values))
    assert [len(part) for part in parts] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)


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
