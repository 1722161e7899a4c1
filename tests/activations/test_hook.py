"""The rows are what a block adds to the stream, in every architecture: resid + attn + mlp = resid'."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.activations.lm.hook import Hook, find_hook
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_model
from harness.config import ActivationsConfig
from harness.errors import UserError
from tests.activations.conftest import DECODERS, decoder

TOKENS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
LAYER = 1

OWN_NAME = {"self_attn": "mlp", "attn": "mlp", "attention": "mlp", "self_attention": "mlp"}
SPECIAL = {
    # it adds the residual inside its modules
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", 1.0),
    "mpt": ("attn", "ffn.down_proj", 1.0),
    # it normalises after them
    **dict.fromkeys(
        ["gemma2", "gemma3", "olmo2", "exaone4"], ("post_attention_layernorm", "post_feedforward_layernorm", 1.0)
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm", 1.0),
    # it multiplies their outputs
    "granite": ("self_attn", "mlp", 0.22),
    "granitemoe": ("self_attn", "block_sparse_moe", 0.22),
    "minicpm3": ("self_attn", "mlp", 0.80829),
    # its MLP is no module of its own
    **dict.fromkeys(["opt", "opt post-norm", "xglm"], ("self_attn", "fc2", 1.0)),
}


def found(name: str, hook: str, directory: Path) -> tuple[Hook, Tensor]:
    cfg = ActivationsConfig(
        model=str(directory), layer=LAYER - (hook == "before"), hook=hook.replace("before", "resid_post")
    )
    hooked = load_model(cfg, locate(cfg), "fp32", torch.device("cpu"))
    return hooked.hook, hooked.activations(TOKENS, None)


@pytest.mark.parametrize("name", DECODERS)
def test_what_the_hooks_give_adds_up(name: str, tmp_path: Path) -> None:
    decoder(name).save_pretrained(tmp_path)
    (attn, attention), (mlp, output) = found(name, "attn_out", tmp_path), found(name, "mlp_out", tmp_path)
    assert attention.shape == output.shape == (2, 12, 16)
    if name != "opt post-norm":
        before, after = found(name, "before", tmp_path)[1], found(name, "resid_post", tmp_path)[1]
        off = (before + attention + output - after).norm() / (after - before).norm()
        assert off < 1e-5
    blocks = found(name, "resid_post", tmp_path)[0].module
    parts = (attn.module.removeprefix(f"{blocks}."), mlp.module.removeprefix(f"{blocks}."), mlp.module_scale)
    if name in SPECIAL:
        assert parts == (*SPECIAL[name][:2], pytest.approx(SPECIAL[name][2], rel=1e-5))
    else:
        assert OWN_NAME[parts[0]] == parts[1] and parts[2] == attn.module_scale == 1.0


def test_a_block_that_nothing_explains_is_refused_in_one_line() -> None:
    """With the residual taken after the norm, no modules of BLOOM add up."""
    model = decoder("bloom")
    for block in model.h:  # pyright: ignore
        block.apply_residual_connection_post_layernorm = True
    for hook in ("mlp_out", "attn_out"):
        cfg = ActivationsConfig(model="bloom", layer=LAYER, hook=hook)
        with pytest.raises(
            UserError, match=f"activations.hook={hook}: .* no modules add up .* use resid_post"
        ) as caught:
            find_hook(cfg, model, "h")
        assert "\n" not in str(caught.value)
    cfg = ActivationsConfig(model="bloom", layer=LAYER)
    assert find_hook(cfg, model, "h").module == "h.1"


def test_a_model_that_does_not_run_on_text_is_one_line() -> None:
    model = decoder("llama")

    def fail(*_: object) -> None:
        raise TypeError("pixel_values are missing\nand more")

    model.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match=r"LlamaModel does not run on a text alone \(pixel_values are missing\)"):
        find_hook(ActivationsConfig(model="llama", hook="mlp_out"), model, "layers")
