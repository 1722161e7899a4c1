"""SAEs in the formats of other tools compute what their own formulas say.

Files of the formats that we write are written by `harness.export`, which is tested with the tools themselves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import UserError
from harness.saes.export import export
from harness.saes.foreign import load_foreign
from harness.saes.trained import TrainedSae, load

N, D, K = 24, 8, 3


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (N, D), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,), "b_mag": (N,), "r_mag": (N,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | {"threshold": torch.rand(N, generator=generator)}


def x() -> Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(1)) * 3


def dense(sae: TrainedSae, rows: Tensor) -> Tensor:
    codes = sae.encode(rows)
    return torch.zeros(len(rows), sae.sae.n_latents).scatter_add(1, codes.index, codes.values.clamp_min(0))


def topk(pre: Tensor) -> Tensor:
    values, index = pre.topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, index, values.relu())


@pytest.mark.parametrize("form", ["saelens", "sparsify", "dictionary_learning"])
def test_what_we_export_comes_back(form: str, topk_run: Path, tmp_path: Path) -> None:
    ours = load(topk_run)
    export(topk_run, form, tmp_path)
    place = next(tmp_path.glob("*/")) if form == "sparsify" else tmp_path
    theirs = load_foreign(f"{form}:{place}")
    rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense(theirs, rows), dense(ours, rows) * ours.normalizer.scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.forward(rows), ours.forward(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_saelens(architecture: str, pre_bias: bool, tmp_path: Path) -> None:
    w = weights()
    about = {"architecture": architecture, "d_in": D, "d_sae": N, "apply_b_dec_to_input": pre_bias}
    about |= {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"b_gate" if architecture == "gated" else "b_enc": w["b_enc"]}
    tensors |= {name: w[name] for name in ("threshold", "r_mag", "b_mag")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "sae_weights.safetensors")
    product = (x() - w["b_dec"] * pre_bias) @ w["W_enc"].T
    pre, norms = product + w["b_enc"], w["W_dec"].norm(dim=1)
    expected = {
        "topk": lambda: topk(pre * norms),
        "standard": lambda: pre.relu(),
        "jumprelu": lambda: pre * (pre > w["threshold"]),
        "gated": lambda: (pre > 0) * (product * w["r_mag"].exp() + w["b_mag"]).relu(),
    }[architecture]()
    sae = load_foreign(f"saelens:{tmp_path}")
    torch.testing.assert_close(dense(sae, x()), expected.relu(), atol=1e-4, rtol=1e-4)
    decoder = w["W_dec"] / norms[:, None] if architecture == "topk" else w["W_dec"]
    torch.testing.assert_close(sae.forward(x()), expected.relu() @ decoder + w["b_dec"], atol=1e-3, rtol=1e-4)


def test_gemma_scope(tmp_path: Path) -> None:
    w = weights()
    arrays = {"W_enc": w["W_enc"].T, **{name: w[name] for name in ("W_dec", "b_enc", "b_dec", "threshold")}}
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})  # pyright: ignore[reportArgumentType]
    pre = x() @ w["W_enc"].T + w["b_enc"]
    sae = load_foreign(f"gemma_scope:{tmp_path / 'params.npz'}")
    torch.testing.assert_close(dense(sae, x()), pre * (pre > w["threshold"]), atol=1e-4, rtol=1e-4)


def test_openai_normalises_and_undoes_it(tmp_path: Path) -> None:
    w = weights()
    state = {
        "pre_bias": w["b_dec"],
        "encoder.weight": w["W_enc"],
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "activation": "TopK",
        "activation_state_dict": {"k": K},
    }
    torch.save(state, tmp_path / "sae.pt")
    mean, std = x().mean(dim=1, keepdim=True), x().std(dim=1, keepdim=True)
    codes = topk(((x() - mean) / std - w["b_dec"]) @ w["W_enc"].T + w["b_enc"])
    sae = load_foreign(f"openai:{tmp_path / 'sae.pt'}")
    torch.testing.assert_close(dense(sae, x()), codes, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sae.forward(x()), (codes @ w["W_dec"] + w["b_dec"]) * std + mean, atol=1e-2, rtol=1e-3)


def test_a_batchtopk_of_dictionary_learning_uses_its_threshold(tmp_path: Path) -> None:
    w = weights()
    state = {
        "encoder.weight": w["W_enc"],
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "b_dec": w["b_dec"],
        "k": torch.tensor(K),
        "threshold": torch.tensor(0.8),
    }
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    pre = (x() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    sae = load_foreign(f"dictionary_learning:{tmp_path}")
    torch.testing.assert_close(dense(sae, x()), pre * (pre > 0.8), atol=1e-4, rtol=1e-4)


def written_by_dictionary_learning(directory: Path, **further: Tensor) -> TrainedSae:
    """An SAE whose names are those of its JumpReLU and its Matryoshka."""
    w = weights()
    state = {"W_enc": w["W_enc"].T, **{name: w[name] for name in ("W_dec", "b_enc", "b_dec")}}
    torch.save({**state, **further}, directory / "ae.pt")
    (directory / "config.json").write_text("{}")
    return load_foreign(f"dictionary_learning:{directory}")


def test_a_matryoshka_of_dictionary_learning_sees_rows_less_the_bias(tmp_path: Path) -> None:
    """The encoder of JumpReLU sees x, and it has a threshold per latent."""
    w = weights()
    sae = written_by_dictionary_learning(tmp_path, k=torch.tensor(K), threshold=torch.tensor(0.8))
    pre = (x() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    torch.testing.assert_close(dense(sae, x()), pre * (pre > 0.8), atol=1e-4, rtol=1e-4)


def test_a_threshold_below_zero_cuts_at_zero(tmp_path: Path) -> None:
    w = weights()
    threshold = w["threshold"] - 0.5
    sae = written_by_dictionary_learning(tmp_path, threshold=threshold)
    pre = x() @ w["W_enc"].T + w["b_enc"]
    expected = (pre * (pre > threshold)).relu()
    torch.testing.assert_close(dense(sae, x()), expected, atol=1e-4, rtol=1e-4)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("/tmp/harm"),))  # pyright: ignore[reportReturnType]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nobody' is not known"):
        load_foreign("nobody:here")
    with pytest.raises(UserError, match="there is no"):
        load_foreign(f"saelens:{tmp_path}/missing")
    torch.save({"encoder.weight": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"it is not loaded|cannot be read"):
        load_foreign(f"openai:{tmp_path / 'bad.pt'}")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"has no .encoder\.weight."):
        load_foreign(f"openai:{tmp_path / 'other.pt'}")
    (tmp_path / "noise.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read"):
        load_foreign(f"gemma_scope:{tmp_path / 'noise.npz'}")


class Released:
    """Stands in for `sae_lens.SAE`."""

    def __init__(self, release: str, identity: str) -> None:
        if (release, identity) != ("r", "block/0"):
            raise ValueError(f"Release {release} not found")

    @classmethod
    def from_pretrained(cls, release: str, identity: str) -> Released:
        return cls(release, identity)

    def save_model(self, place: str) -> None:
        w = weights()
        kept = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        save_file(kept, f"{place}/sae_weights.safetensors")
        Path(place, "cfg.json").write_text(json.dumps({"architecture": "topk", "k": K, "metadata": {}}))


def test_saelens_finds_its_own_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=Released))
    w, sae = weights(), load_foreign("saelens-release:r/block/0")
    torch.testing.assert_close(dense(sae, x()), topk((x() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]))
    with pytest.raises(UserError, match=r"SAELens cannot load it .ValueError: Release q not found"):
        load_foreign("saelens-release:q/block/0")
    with pytest.raises(UserError, match=r"name the release"):
        load_foreign("saelens-release:r")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"needs SAELens .pip install"):
        load_foreign("saelens-release:r/block/0")
