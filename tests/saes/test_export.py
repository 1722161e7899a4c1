"""Exports reproduce the SAE on raw activations; where the other tools are installed, they load them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import export as command
from harness.architectures import ARCHITECTURES
from harness.errors import UserError
from harness.saes.export import export, fold
from harness.saes.trained import load
from tests.activations.conftest import WORDS, decoder, save_tokenizer
from tests.tiny import train_tiny


def reference(run_dir: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense activations and reconstruction of raw rows, from the run's own weights."""
    about = json.loads((run_dir / "sae/config.json").read_text())
    weights = load_file(run_dir / "sae/sae.safetensors")
    scale = about["normalizer"]["scale"]
    pre = (x / scale - weights["b_dec"]) @ weights["W_enc"].T + weights.get("b_enc", 0.0)
    values, index = pre.topk(about["sae"]["k"], dim=1)
    z = torch.zeros_like(pre).scatter(1, index, values.relu())
    return z * scale, (z @ weights["W_dec"] + weights["b_dec"]) * scale


def rows(run_dir: Path) -> Tensor:
    about = json.loads((run_dir / "sae/config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, about["d_model"], generator=generator) * about["normalizer"]["scale"]


def dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`W_enc` (n, d), `W_dec` (n, d)."""
    pre = (x - b_dec) @ W_enc.T + b_enc
    values, index = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, index, values.relu())
    return z, z @ W_dec + b_dec


def test_the_constant_scale_is_folded(topk_run: Path) -> None:
    sae, x = fold(load(topk_run)), rows(topk_run)
    folded = dense(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
    for ours, expected in zip(folded, reference(topk_run, x), strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))


def test_saelens(topk_run: Path, tmp_path: Path) -> None:
    assert export(topk_run, "saelens", tmp_path) == []
    about = json.loads((tmp_path / "cfg.json").read_text())
    assert (about["architecture"], about["d_in"], about["d_sae"], about["k"]) == ("topk", 16, 32, 2)
    tensors, x = load_file(tmp_path / "sae_weights.safetensors"), rows(topk_run)
    assert tensors["W_enc"].shape == (16, 32)
    exported = dense(x, tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], about["k"])
    torch.testing.assert_close(exported[1], reference(topk_run, x)[1])
    assert load_file(tmp_path / "sparsity.safetensors")["sparsity"].shape == (32,)


def test_sparsify(topk_run: Path, tmp_path: Path) -> None:
    export(topk_run, "sparsify", tmp_path)
    about = json.loads((tmp_path / "synthetic/cfg.json").read_text())
    assert (about["num_latents"], about["d_in"], about["k"]) == (32, 16, 2)
    tensors, x = load_file(tmp_path / "synthetic/sae.safetensors"), rows(topk_run)
    exported = dense(
        x, tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], about["k"]
    )
    torch.testing.assert_close(exported[1], reference(topk_run, x)[1])


def test_dictionary_learning(topk_run: Path, tmp_path: Path) -> None:
    export(topk_run, "dictionary_learning", tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (about["dict_class"], about["activation_dim"], about["dict_size"]) == ("AutoEncoderTopK", 16, 32)
    tensors, x = torch.load(tmp_path / "ae.pt", weights_only=True), rows(topk_run)
    assert tensors["decoder.weight"].shape == (16, 32)
    assert tensors["k"].dtype == torch.int32
    weights = (tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T, tensors["b_dec"])
    torch.testing.assert_close(dense(x, *weights, int(tensors["k"]))[1], reference(topk_run, x)[1])


def test_the_user_is_warned_of_per_token_normalisation(
    layernorm_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(layernorm_run), "--format", "saelens", "--out", str(tmp_path)]) == 0
    assert "normalised per token" in capsys.readouterr().err
    assert "unit norm per token" in json.loads((tmp_path / "cfg.json").read_text())["metadata"]["note"]
    assert not load_file(tmp_path / "sae_weights.safetensors")["b_enc"].any()


@pytest.mark.parametrize("form", ["saelens", "sparsify", "dictionary_learning"])
def test_a_switch_sae_is_refused(form: str, switch_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a Switch SAE: no other tool can load one"):
        export(switch_run, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ALL = [name for name, traits in ARCHITECTURES.items() if name not in ("topk", "switch")]


def architecture_run(name: str, out: Path) -> Path:
    has_k = not ARCHITECTURES[name].penalty
    active = ["sae.k=3"] if has_k else ["sae.k=0", "sae.target_l0=3"]
    return train_tiny(out, f"sae={name}", *active, "train.tokens=20480", "train.lr=3e-3")


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_is_exported_as_it_computes_or_refused(name: str, tmp_path: Path) -> None:
    run = architecture_run(name, tmp_path)
    trained, x = load(run), rows(run)
    if name == "prolu":
        with pytest.raises(UserError, match=r"saelens has no prolu SAE that computes the same; use harness\.saes"):
            export(run, "saelens", tmp_path / "out")
        return
    export(run, "saelens", tmp_path / "out")
    about, tensors = (
        json.loads((tmp_path / "out/cfg.json").read_text()),
        load_file(tmp_path / "out/sae_weights.safetensors"),
    )
    pre = (x - tensors["b_dec"] if about["apply_b_dec_to_input"] else x) @ tensors["W_enc"]
    if about["architecture"] == "gated":
        z = (pre + tensors["b_gate"] > 0) * (pre * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
    elif about["architecture"] == "topk":
        values, index = (pre + tensors["b_enc"]).topk(about["k"], dim=1)
        z = torch.zeros_like(pre).scatter(1, index, values.relu())
    else:
        z = (pre + tensors["b_enc"]).relu() * (pre + tensors["b_enc"] > tensors.get("threshold", torch.zeros(())))
    torch.testing.assert_close(z @ tensors["W_dec"] + tensors["b_dec"], trained.forward(x), rtol=1e-4, atol=1e-4)
    refused = {"multi_topk": [], "relu_decoder_norm": ["sparsify", "dictionary_learning"]}.get(name, ["sparsify"])
    for form in refused:
        with pytest.raises(UserError, match="use --format saelens"):
            export(run, form, tmp_path / "other")


ENCODERS = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1], device="cpu")
x = load_file(sys.argv[2])["x"]
with torch.no_grad():
    save_file({"z": sae.encode(x), "x_hat": sae(x)}, sys.argv[3])
"""


def encoded(python: str, script: str, run: Path, form: str, tmp_path: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What another tool's code makes of an export and the rows of its run (`z`, `x_hat`), and our codes, dense, in its
    units, and reconstructions."""
    export(run, form, tmp_path / "out")
    trained, x = load(run), rows(run)
    save_file({"x": x}, tmp_path / "x.safetensors")
    files = [str(tmp_path / part) for part in ("out", "x.safetensors", "z.safetensors")]
    done = subprocess.run([python, "-W", "ignore", "-c", script, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, codes = load_file(files[2]), trained.encode(x)
    ours = torch.zeros_like(theirs["z"]).scatter_add_(1, codes.index, codes.values * trained.normalizer.scale)
    return theirs, ours, trained.forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name != "prolu"])
def test_saelens_encodes_as_we_do(name: str, tmp_path: Path) -> None:
    """Needs INTEROP_PYTHON, see below."""
    python = os.environ.get("INTEROP_PYTHON")
    if not python:
        pytest.skip("INTEROP_PYTHON names no Python with sae-lens and eai-sparsify")
    theirs, ours, x_hat = encoded(python, ENCODERS, architecture_run(name, tmp_path), "saelens", tmp_path)
    torch.testing.assert_close(theirs["z"], ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], x_hat, rtol=1e-5, atol=1e-4)


DICTIONARY = """
import sys, torch
from safetensors.torch import load_file, save_file
from dictionary_learning.utils import load_dictionary
sae, _ = load_dictionary(sys.argv[1], "cpu")
x = load_file(sys.argv[2])["x"]
with torch.no_grad():
    z = sae.encode(x)
    save_file({"z": z.contiguous(), "x_hat": sae.decode(z).contiguous()}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("prolu", "relu_decoder_norm")])
def test_dictionary_learning_encodes_as_we_do(name: str, tmp_path: Path) -> None:
    """Needs DICTIONARY_PYTHON: a Python that has dictionary_learning 0.1.0 (tests/peers/__init__.py)."""
    python = os.environ.get("DICTIONARY_PYTHON")
    if not python:
        pytest.skip("DICTIONARY_PYTHON names no Python with dictionary_learning")
    run = architecture_run(name, tmp_path)
    theirs, ours, x_hat = encoded(python, DICTIONARY, run, "dictionary_learning", tmp_path)
    if not ARCHITECTURES[name].per_token:  # at inference theirs is a Multi-TopK with k latents, as ours
        assert torch.equal(theirs["z"] > 0, ours > 0)
    torch.testing.assert_close(theirs["z"], ours, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], x_hat, rtol=1e-5, atol=1e-4)


LOADERS = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
root = Path(sys.argv[1])
x = load_file(root / "x.safetensors")["x"]
from sae_lens import SAE
from sparsify import SparseCoder
saelens = SAE.load_from_disk(str(root / "saelens"), device="cpu")
sparsify = SparseCoder.load_from_disk(root / "sparsify" / "synthetic")
import sae_lens.loading.pretrained_sae_loaders as loaders
loaders.hf_hub_download = lambda repo_id, filename, **_: str(root / filename)
loaded = loaders.dictionary_learning_sae_huggingface_loader_1("x", "dictionary_learning", device="cpu")
config, state = loaded[0], loaded[1]
learned = SAE.from_dict(loaders.handle_pre_6_0_config(config)).eval()
learned.load_state_dict(state)
with torch.no_grad():
    out = {"saelens": saelens(x), "sparsify": sparsify(x).sae_out, "dictionary_learning": learned(x)}
save_file({name: value.float().contiguous() for name, value in out.items()}, root / "out.safetensors")
"""


def lm_run(name: str, hook: str, root: Path) -> Path:
    """A finished run on activations of a small decoder whose tokenizer puts a token before each context."""
    model, text = root / "model", root / "text"
    decoder(name).save_pretrained(model)
    save_tokenizer(model, "[CLS] $A")
    text.mkdir()
    words = torch.randint(len(WORDS), (40, 100), generator=torch.Generator().manual_seed(1)).tolist()
    for number, document in enumerate(words):
        (text / f"{number}.txt").write_text(" ".join(WORDS[word] for word in document))
    return train_tiny(
        root / "runs",
        *("activations=lm", f"activations.model={model}", "activations.layer=1", f"activations.hook={hook}"),
        *("activations.text=files", f"activations.text_paths=[{text}/*.txt]", "activations.context=16"),
        *("activations.tokens=2000", "activations.dtype=fp32", "activations.lm_precision=fp32"),
    )


LM_RUNS = {
    ("gpt2", "resid_post"): "transformer.h.1",
    ("bloom", "mlp_out"): "transformer.h.1.mlp.dense_4h_to_h",
    ("gemma2", "attn_out"): "model.layers.1.post_attention_layernorm",
    ("granite", "mlp_out"): "model.layers.1.mlp",
    ("neox parallel", "attn_out"): "gpt_neox.layers.1.attention",
}


@pytest.mark.parametrize(("name", "hook"), LM_RUNS)
def test_exports_name_the_hooked_module(name: str, hook: str, tmp_path: Path) -> None:
    run = lm_run(name, hook, tmp_path)
    expected = LM_RUNS[name, hook]
    for form in ("saelens", "sparsify", "dictionary_learning"):
        assert export(run, form, tmp_path / form) == []
    metadata = json.loads((tmp_path / "saelens/cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == expected
    assert (metadata["prepend_bos"], metadata["context_size"], metadata["seqpos_slice"]) == (True, 16, [1, None])
    assert metadata["model_class_name"] == "AutoModelForCausalLM"
    module = expected.partition(".")[2]
    assert [path.name for path in (tmp_path / "sparsify").iterdir()] == [module]
    learned = json.loads((tmp_path / "dictionary_learning/config.json").read_text())["trainer"]
    assert learned["submodule_name"] == module
    # the exported SAE of the module's output is that of the run, of what the block adds
    trained, sae = load(run), fold(load(run))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * trained.normalizer.scale
    factor = 0.22 if name == "granite" else 1.0
    exported = dense(x / factor, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)[1]
    torch.testing.assert_close(exported * factor, trained.forward(x), rtol=1e-4, atol=1e-4)


IN_THE_MODEL = """
import sys, torch
from pathlib import Path
from sae_lens import SAE
from sae_lens.load_model import load_model
from sparsify import SparseCoder
from transformers import AutoModelForCausalLM
root = Path(sys.argv[1])
(folder,) = (root / "sparsify").iterdir()
model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
ids, seen = torch.randint(4, 90, (2, 12)), []
def hook(_module, _inputs, output):
    seen.append(output[0] if isinstance(output, tuple) else output)
model.base_model.get_submodule(folder.name).register_forward_hook(hook)
sae, coder = SAE.load_from_disk(str(root / "saelens"), device="cpu"), SparseCoder.load_from_disk(folder)
about = sae.cfg.metadata
hooked = load_model(about.model_class_name, about.model_name, device="cpu")
with torch.no_grad():
    model(ids)
    _, cache = hooked.run_with_cache(ids, names_filter=[about.hook_name])
    torch.testing.assert_close(cache[about.hook_name], seen[0])
    rows = seen[0].flatten(0, 1)
    torch.testing.assert_close(sae(rows), coder(rows).sae_out, rtol=1e-4, atol=1e-4)
# its own evaluation, with the model and the hook that the export names
from datasets import Dataset
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
texts = [path.read_text() for path in sorted((root / "text").glob("*.txt"))]
store = ActivationsStore.from_sae(
    hooked, sae, Dataset.from_dict({"text": texts}), streaming=False, store_batch_size_prompts=4
)
config = EvalConfig(
    batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2, compute_ce_loss=True,
    compute_kl=True, compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
)
found, _ = run_evals(sae, store, hooked, ActivationScaler(), config, exclude_special_tokens=False)
l0, clean = found["sparsity"]["l0"], found["model_performance_preservation"]["ce_loss_without_sae"]
assert abs(l0 - sae.cfg.k) < 1e-3 and 0 < clean < 20, found
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "hook"), LM_RUNS)
def test_the_other_tools_find_the_module_in_their_model(name: str, hook: str, tmp_path: Path) -> None:
    """Needs INTEROP_PYTHON, see below."""
    python = os.environ.get("INTEROP_PYTHON")
    if not python:
        pytest.skip("INTEROP_PYTHON names no Python with sae-lens and eai-sparsify")
    run = lm_run(name, hook, tmp_path)
    for form in ("saelens", "sparsify"):
        export(run, form, tmp_path / form)
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-W", "ignore", "-c", IN_THE_MODEL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["saelens", "sparsify", "dictionary_learning"])
def test_a_full_disk_is_one_line(
    form: str, topk_run: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filler").write_bytes(bytes(44_000))
    assert command.main([str(topk_run), "--format", form, "--out", str(small_disk / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write to {small_disk / 'out'} (0.0 MB free): ")


@pytest.mark.slow
def test_the_other_tools_load_them(topk_run: Path, tmp_path: Path) -> None:
    """Set INTEROP_PYTHON to a Python that has sae-lens 6.54.12 and eai-sparsify 1.3.3 (not installed with us)."""
    python = os.environ.get("INTEROP_PYTHON")
    if not python:
        pytest.skip("INTEROP_PYTHON names no Python with sae-lens and eai-sparsify")
    for form in ("saelens", "sparsify", "dictionary_learning"):
        export(topk_run, form, tmp_path / form)
    x = rows(topk_run)
    save_file({"x": x}, tmp_path / "x.safetensors")
    done = subprocess.run([python, "-W", "ignore", "-c", LOADERS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = reference(topk_run, x)[1]
    for name, loaded in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(loaded, expected, msg=lambda text, name=name: f"{name}: {text}")
