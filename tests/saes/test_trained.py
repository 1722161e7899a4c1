"""A finished SAE computes what the training's evaluation computed, in the model's own units."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.errors import UserError
from harness.parallel import Solo
from harness.process.signals import StopFlag
from harness.record.rundir import read_config
from harness.saes import weights
from harness.saes.export import export
from harness.saes.trained import TrainedSae, load
from harness.schema import SEAL, with_seal

RUNS = ("topk_run", "layernorm_run", "switch_run")


@pytest.fixture(params=RUNS)
def run_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def source_of(run_dir: Path) -> ActivationSource:
    return open_source(read_config(run_dir).activations, run_dir, progress=False, stop=StopFlag())


def heldout_rows(run_dir: Path) -> Tensor:
    return torch.cat([rows for rows, _ in source_of(run_dir).heldout(200)])


def test_forward_has_the_recorded_heldout_error(run_dir: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    trained, source, x = load(run_dir, ops="reference"), source_of(run_dir), heldout_rows(run_dir)
    per_token = trained.normalizer.rule == "layernorm"
    error = (x - trained.forward(x)).double().square().sum(dim=1)
    assert float(error.mean()) == pytest.approx(result["mse"], rel=1e-5)
    baseline = (x.double() - source.statistics(False).mean).square().sum(dim=1)
    if per_token:
        assert float(error.sum() / baseline.sum()) == pytest.approx(result["fvu_raw"], rel=1e-5)
        centred = x.double() - x.double().mean(dim=1, keepdim=True)
        square = centred.square().sum(dim=1)
        error = error / square
        baseline = (centred / square.sqrt()[:, None] - source.statistics(True).mean).square().sum(dim=1)
    assert float(error.sum() / baseline.sum()) == pytest.approx(result["fvu"], rel=1e-5)
    assert float((trained.encode(x).values > 0).sum(dim=1).double().mean()) == pytest.approx(result["l0"], rel=1e-9)


def test_codes_are_decoded_to_the_same_bits(run_dir: Path) -> None:
    trained, x = load(run_dir, ops="reference"), heldout_rows(run_dir)
    assert torch.equal(trained.decode(trained.encode(x)), trained.forward(x))


def test_codes_are_padded_and_ordered(run_dir: Path) -> None:
    trained, x = load(run_dir, ops="reference"), heldout_rows(run_dir)
    codes = trained.encode(x)
    values, index = codes.values, codes.index
    assert values.shape == index.shape == (len(x), trained.sae.k)
    assert (values >= 0).all() and (values[:, :-1] >= values[:, 1:]).all()
    assert index.min() >= 0 and index.max() < trained.sae.n_latents
    positive = values > 0
    tied = positive[:, 1:] & (values[:, :-1] == values[:, 1:])
    assert (index[:, :-1] < index[:, 1:])[tied].all()
    distinct = [len(set(row[active].tolist())) for row, active in zip(index, positive, strict=True)]
    assert distinct == positive.sum(dim=1).tolist()


def test_equal_activations_come_by_ascending_index(topk_run: Path) -> None:
    trained, x = load(topk_run, ops="reference"), heldout_rows(topk_run)
    for name in ("W_enc", "b_enc"):
        trained.params[name][10] = trained.params[name][30]
    codes = trained.encode(x)
    both = (codes.values[:, 0] == codes.values[:, 1]) & (codes.values[:, 1] > 0)
    assert both.any()
    assert (codes.index[both] == torch.tensor([10, 30])).all()


def test_the_gate_and_the_index_of_a_switch_sae(switch_run: Path) -> None:
    """By the formulas: p of the most probable expert, its k largest latents, x̂ = p·Σ z·W_dec + b_dec."""
    trained, x = load(switch_run, ops="reference"), heldout_rows(switch_run)
    codes, scale = trained.encode(x), trained.normalizer.scale
    p, expert = torch.softmax((x / scale - trained.params["b_r"]) @ trained.params["W_r"].T, dim=1).max(dim=1)
    assert len(expert.unique()) == 2
    width = trained.sae.latents_per_expert
    assert codes.gate is not None
    torch.testing.assert_close(codes.gate, p)
    assert (codes.index // width == expert[:, None])[codes.values > 0].all()
    pre = (x / scale - trained.b_dec) @ trained.W_enc.T + trained.b_enc
    other = torch.arange(trained.sae.n_latents) // width != expert[:, None]
    z = pre.masked_fill(other, -torch.inf).topk(trained.sae.k, dim=1)
    torch.testing.assert_close(codes.values, z.values.relu(), rtol=1e-4, atol=1e-5)
    dense = torch.zeros_like(pre).scatter(1, z.indices, z.values.relu())
    expected = (p[:, None] * (dense @ trained.W_dec) + trained.b_dec) * scale
    torch.testing.assert_close(trained.forward(x), expected, rtol=1e-4, atol=1e-5)


def test_rows_do_not_depend_on_their_batch(run_dir: Path) -> None:
    """Also when an expert receives no token, and for no tokens at all."""
    trained, x = load(run_dir, ops="reference"), heldout_rows(run_dir)
    whole = trained.forward(x)
    for rows in (slice(0, 1), slice(3, 10), slice(5, 5)):
        torch.testing.assert_close(trained.forward(x[rows]), whole[rows])


def test_a_latent_can_be_ablated(run_dir: Path) -> None:
    trained, x = load(run_dir, ops="reference"), heldout_rows(run_dir)
    codes = trained.encode(x)
    latent = codes.index[0, 0]
    ablated = trained.decode(dataclasses.replace(codes, values=codes.values * (codes.index != latent)))
    changed = ((codes.index == latent) & (codes.values > 0)).any(dim=1)
    whole = trained.forward(x)
    assert changed.any() and not changed.all()
    torch.testing.assert_close(ablated[~changed], whole[~changed], rtol=0, atol=0)
    assert (ablated[changed] != whole[changed]).any(dim=1).all()


def test_a_constant_row_comes_back(layernorm_run: Path) -> None:
    x = torch.full((1, 16), 3.0)
    torch.testing.assert_close(load(layernorm_run, ops="reference").forward(x), x)


def test_it_is_known_where_it_comes_from(run_dir: Path) -> None:
    trained = load(run_dir, ops="reference")
    result = json.loads((run_dir / "result.json").read_text())
    assert trained.origin.run_id == run_dir.name
    assert trained.origin.store_id == result["store_id"]
    assert trained.origin.tokens == 4096
    assert trained.origin.activations["kind"] == "synthetic"
    assert (trained.origin.model, trained.origin.layer, trained.origin.hook) == (None, None, None)
    assert trained.config == read_config(run_dir).sae
    assert (trained.dtype, trained.device) == (torch.float32, torch.device("cpu"))
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(32))
    assert float(trained.frequency.sum()) == pytest.approx(result["l0"], rel=0.5)  # over the training, not at its end
    assert trained.b_enc.shape == (32,) and trained.b_dec.shape == (16,) and trained.W_enc.shape == (32, 16)


def test_other_dtypes_and_kernels_agree(run_dir: Path) -> None:
    x = heldout_rows(run_dir)
    expected = load(run_dir, ops="reference").forward(x)
    precise = load(run_dir, dtype=torch.float64, ops="reference")
    assert precise.forward(x).dtype == torch.float64
    torch.testing.assert_close(precise.forward(x).float(), expected, rtol=1e-4, atol=1e-5)
    fast: TrainedSae = load(run_dir, ops="cpu")
    torch.testing.assert_close(fast.forward(x.bfloat16()), fast.forward(x.bfloat16().float()))
    torch.testing.assert_close(fast.forward(x), expected, rtol=1e-4, atol=1e-5)


def rewrite_config(run_dir: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `sae/config.json` of a run without hashes, as an earlier version wrote it."""
    rewrite_json(run_dir / "result.json", lambda result: result.pop("weights", None))
    rewrite_json(run_dir / "sae/config.json", change)


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file of a run as if it had been written so."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(with_seal(content) if SEAL in content else content))


def rewrite_weights(run_dir: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = run_dir / "sae/sae.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not finished": (lambda run: shutil.rmtree(run / "sae"), r"no finished weights .*; let the run end first"),
    "no weights": (lambda run: (run / "sae/sae.safetensors").unlink(), r"sae\.safetensors is missing; copy"),
    "cut weights": (lambda run: truncate(run / "sae/sae.safetensors"), r"sae\.safetensors cannot be read .*; copy"),
    "cut settings": (lambda run: truncate(run / "sae/config.json"), r"config\.json is damaged .*; copy"),
    "settings without an entry": (
        lambda run: rewrite_config(run, lambda about: about.pop("variance")),
        r"config\.json is damaged \(variance is missing\)",
    ),
    "unknown setting": (
        lambda run: rewrite_config(run, lambda about: about["sae"].update(colour=1)),
        r"config\.json cannot be read .*colour",
    ),
    "another format": (
        lambda run: rewrite_config(run, lambda about: about.update(format=2)),
        r"format 2, this program reads 1: use the version that wrote it",
    ),
    "a list": (
        lambda run: (run / "sae/config.json").write_text("[]"),
        r"config\.json is damaged \(the content must be an object, not list\)",
    ),
    "a scale of zero": (
        lambda run: rewrite_config(run, lambda about: about["normalizer"].update(scale=0.0)),
        r"normalizer\.scale must be a number above 0, not 0",
    ),
    "a flipped byte in the weights": (
        lambda run: flip(run / "sae/sae.safetensors", -5),
        r"sae\.safetensors is damaged or of another run \(its sha256 is not that in result\.json\); copy",
    ),
    "another scale": (
        lambda run: rewrite_json(run / "sae/config.json", lambda about: about["normalizer"].update(scale=1.25)),
        r"config\.json is damaged or of another run",
    ),
    "settings of another run": (
        lambda run: rewrite_json(
            run / "sae/config.json", lambda about: about.update(run_id="topk-n8-k2-s0-0123456789")
        ),
        r"config\.json belongs to run topk-n8-k2-s0-0123456789, not to the run topk-n32",
    ),
    "a result of another run": (
        lambda run: rewrite_json(run / "result.json", lambda result: result.update(run_id="topk-n8-k2-s0-0123456789")),
        r"result\.json belongs to run topk-n8",
    ),
    "no b_dec": (lambda run: rewrite_weights(run, lambda t: t.pop("b_dec")), r"has no tensor b_dec; copy"),
    "another width": (
        lambda run: rewrite_weights(run, lambda t: t.update(W_dec=torch.zeros(32, 8))),
        r"W_dec has shape \(32, 8\) instead of \(32, 16\); copy",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said_in_one_line(damage: str, topk_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / topk_run.name
    shutil.copytree(topk_run, copy)
    change, message = DAMAGES[damage]
    change(copy)
    with pytest.raises(UserError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_weights_in_several_files_are_the_same_sae(
    topk_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, whole = tmp_path / topk_run.name, load(topk_run, ops="reference")
    shutil.copytree(topk_run, copy)
    tensors = load_file(copy / "sae/sae.safetensors")
    cut = [name for name, tensor in tensors.items() if len(tensor) == 32]
    monkeypatch.setattr(weights, "WEIGHTS_FILE_BYTES", 2500)
    written = weights.write_weights(copy / "sae", tensors, cut, Solo())
    rewrite_json(copy / "result.json", lambda result: result["weights"].pop("sae.safetensors"))
    rewrite_json(copy / "result.json", lambda result: result["weights"].update(written))
    x = heldout_rows(topk_run)
    assert len(written) > 2 and not (copy / "sae/sae.safetensors").exists()
    assert torch.equal(load(copy, ops="reference").forward(x), whole.forward(x))
    export(copy, "saelens", tmp_path / "several")
    export(topk_run, "saelens", tmp_path / "one")
    one, several = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("one", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)
    flip(copy / "sae" / sorted(written)[1], -5)
    with pytest.raises(UserError, match=r"its sha256 is not that in result\.json"):
        load(copy)


def test_a_model_is_named(topk_run: Path, tmp_path: Path) -> None:
    shutil.copytree(topk_run, tmp_path / "run")
    described = {"kind": "lm", "model": "gpt2", "layer": 6, "hook": "mlp_out"}
    rewrite_config(tmp_path / "run", lambda about: about.update(activations=described))
    origin = load(tmp_path / "run", ops="reference").origin
    assert (origin.model, origin.layer, origin.hook) == ("gpt2", 6, "mlp_out")
