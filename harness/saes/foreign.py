"""SAEs that other tools have written, as `TrainedSae`: `saelens:DIR`, `sparsify:DIR`, `dictionary_learning:DIR`,
`gemma_scope:FILE.npz`, `openai:FILE.pt`; and `saelens-release:RELEASE/ID`, which SAELens loads where it is installed.

All of them compute what one of our architectures computes. Where an encoder sees x and not x − b_dec, W_enc·b_dec is
added to its bias; where activations are scaled by the decoder's norms, the scale moves into the encoder. Pickles are
read with `weights_only`, which runs no code.
"""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from harness.config import SaeConfig
from harness.errors import UserError
from harness.ops import choose_ops
from harness.ops.untyped import norm
from harness.saes.normalize import Normalizer
from harness.saes.sae import Sae
from harness.saes.trained import Origin, TrainedSae
from harness.schema import OBJECT, read_json


class Foreign(NamedTuple):
    """What a reader finds: float32, rows by latent."""

    architecture: str
    """`topk`, `relu`, `jumprelu` or `gated`."""
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: int = 0
    pre_bias: bool = True
    """Whether the encoder sees x − b_dec."""
    further: dict[str, Tensor] | None = None
    layernorm: bool = False
    """Whether rows are centred and divided by their standard deviation first."""
    hook: str = ""
    """Where it was trained, as its files say."""
    context: str = ""
    """What its files say about contexts and BOS."""


def load_foreign(target: str) -> TrainedSae:
    """The SAE of `KIND:PATH`. Raises `UserError` for an unknown kind, and for files that are missing, damaged or hold
    an SAE that none of our architectures equals."""
    kind, _, place = target.partition(":")
    if kind not in KINDS:
        raise UserError(f"{target}: the kind {kind!r} is not known; choose from: {', '.join(KINDS)}")
    if kind == RELEASE:
        return _ours(_released(place, target), target)
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"{target}: there is no {path}")
    try:
        return _ours(READERS[kind](path), target)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{target}: {path} has no {error}, so it is no SAE of {kind}") from error
    except (OSError, ValueError, SafetensorError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{target}: {path} cannot be read ({reason})") from error
    except Exception as error:  # pickle raises errors of its own for what `weights_only` refuses
        kind = type(error).__name__
        raise UserError(f"{target}: {path} is no file of weights alone ({kind}); it is not loaded") from error


def _ours(found: Foreign, name: str) -> TrainedSae:
    n, d = found.W_enc.shape
    W_enc, W_dec, b_enc, b_dec = (part.float().contiguous() for part in found[1:5])
    further = {key: value.float() for key, value in (found.further or {}).items()}
    shapes = {"W_dec": (W_dec, (n, d)), "b_enc": (b_enc, (n,)), "b_dec": (b_dec, (d,))}
    for key, (tensor, shape) in {**shapes, **{key: (value, (n,)) for key, value in further.items()}}.items():
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name}: {key} has shape {tuple(tensor.shape)} instead of {shape}")
    if found.layernorm:
        # our rule scales to norm 1 and not to standard deviation 1: √(d−1) times smaller
        unit = math.sqrt(d - 1)
        W_enc, W_dec, b_dec = W_enc * unit, W_dec / unit, b_dec / unit
    if not found.pre_bias:
        shift = W_enc @ b_dec
        b_enc = b_enc + shift
        if "b_mag" in further:
            further["b_mag"] = further["b_mag"] + further["r_mag"].exp() * shift
    config = SaeConfig(
        architecture=found.architecture,
        n_latents=n,
        k=found.k,
        target_l0=0.0 if found.k else 1.0,  # the schema wants one for architectures without k
        aux_alpha=0.0,
        normalize="layernorm" if found.layernorm else "none",
    )
    sae = Sae(found.architecture, d, n, found.k, 1, True, 1.0, 0.0, 0, 0.0)
    params = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, **further}
    about = {"kind": "lm", "hook_name": found.hook, "context": found.context}
    origin = Origin(name, "", 0, about, False)
    nothing = torch.zeros(n, dtype=torch.int64)
    ops = choose_ops("auto", torch.device("cpu"))
    return TrainedSae(sae, params, Normalizer(config.normalize, 1.0), config, origin, nothing, ops)


def _thresholds(threshold: Tensor) -> dict[str, Tensor]:
    """All these formats apply a ReLU as well, so a threshold below 0 cuts at 0."""
    return {"log_threshold": threshold.float().clamp_min(0).log()}


def _saelens(path: Path) -> Foreign:
    about = read_json(path / "cfg.json", OBJECT, "copy the SAE again")
    tensors = load_file(path / "sae_weights.safetensors")
    kinds = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu", "gated": "gated"}
    architecture = kinds.get(about["architecture"])
    if architecture is None:
        raise UserError(f"{path}: the architecture {about['architecture']} is not supported; known: {', '.join(kinds)}")
    rule = about.get("normalize_activations", "none")
    if rule not in ("none", "layer_norm", None):
        raise UserError(f"{path}: normalize_activations={rule} is not supported; fold it into the weights with SAELens")
    further: dict[str, Tensor] = {}
    W_enc, W_dec = tensors["W_enc"].T, tensors["W_dec"]
    b_enc = tensors["b_gate"] if architecture == "gated" else tensors["b_enc"]
    if architecture == "jumprelu":
        further = _thresholds(tensors["threshold"])
    if architecture == "gated":
        further = {"r_mag": tensors["r_mag"], "b_mag": tensors["b_mag"]}
    if architecture == "topk" and about.get("rescale_acts_by_decoder_norm", False):
        norms = norm(W_dec, dim=1)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    meta = about.get("metadata", about)
    return Foreign(
        architecture,
        W_enc,
        W_dec,
        b_enc,
        tensors["b_dec"],
        int(about["k"]) if architecture == "topk" else 0,
        bool(about.get("apply_b_dec_to_input", True)),
        further,
        rule == "layer_norm",
        str(meta.get("hook_name", "")),
        f"context {meta.get('context_size')}, prepend_bos {meta.get('prepend_bos')}",
    )


def _released(place: str, target: str) -> Foreign:
    """The SAE of `RELEASE/ID`, which SAELens itself finds, downloads and converts."""
    release, _, identity = place.partition("/")
    if not release or not identity:
        raise UserError(f"{target}: name the release and the SAE in it, as {RELEASE}:RELEASE/ID")
    try:
        from sae_lens import SAE  # pyright: ignore
    except ImportError as error:
        raise UserError(f"{target}: {RELEASE} needs SAELens (pip install 'sae-scaling[saelens]'): {error}") from None
    with tempfile.TemporaryDirectory() as directory:
        try:
            SAE.from_pretrained(release, identity).save_model(directory)  # pyright: ignore
        except Exception as error:  # of SAELens, of the hub, of any loader in between
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{target}: SAELens cannot load it ({type(error).__name__}: {reason})") from error
        return _saelens(Path(directory))


def _sparsify(path: Path) -> Foreign:
    about = read_json(path / "cfg.json", OBJECT, "copy the SAE again")
    if about.get("activation", "topk") != "topk" or about.get("skip_connection") or about.get("transcode"):
        raise UserError(f"{path}: only TopK autoencoders of sparsify are supported, no transcoders or skip connections")
    tensors = load_file(path / "sae.safetensors")
    weights = (tensors["encoder.weight"], tensors["W_dec"], tensors["encoder.bias"], tensors["b_dec"])
    return Foreign("topk", *weights, k=int(about["k"]), hook=path.name)


def _dictionary_learning(path: Path) -> Foreign:
    about = read_json(path / "config.json", OBJECT, "copy the SAE again").get("trainer", {})
    tensors: dict[str, Any] = torch.load(path / "ae.pt", map_location="cpu", weights_only=True)
    hook = str(about.get("submodule_name", ""))
    if "W_enc" in tensors:  # JumpReLU, whose encoder sees x, or Matryoshka, which has one threshold for all
        weights = (tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"], tensors["b_dec"])
        one = tensors["threshold"].ndim == 0
        further = _thresholds(tensors["threshold"].expand(len(tensors["b_enc"])))
        return Foreign("jumprelu", *weights, pre_bias=one, further=further, hook=hook)
    encoder, decoder = tensors["encoder.weight"], tensors["decoder.weight"].T
    if "r_mag" in tensors:
        further = {"r_mag": tensors["r_mag"], "b_mag": tensors["mag_bias"]}
        biases = (tensors["gate_bias"], tensors["decoder_bias"])
        return Foreign("gated", encoder, decoder, *biases, further=further, hook=hook)
    bias = tensors["encoder.bias"]
    if "decoder.bias" in tensors:  # AutoEncoderNew
        return Foreign("relu", encoder, decoder, bias, tensors["decoder.bias"], pre_bias=False, hook=hook)
    if "k" not in tensors:
        return Foreign("relu", encoder, decoder, bias, tensors["bias"], hook=hook)
    if about.get("dict_class", "AutoEncoderTopK") == "AutoEncoderTopK":
        return Foreign("topk", encoder, decoder, bias, tensors["b_dec"], k=int(tensors["k"]), hook=hook)
    further = _thresholds(tensors["threshold"].expand(len(encoder)))  # what BatchTopK uses when it does not train
    return Foreign("jumprelu", encoder, decoder, bias, tensors["b_dec"], further=further, hook=hook)


def _gemma_scope(path: Path) -> Foreign:
    with np.load(path, allow_pickle=False) as file:
        tensors = {name: torch.tensor(file[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    weights = (tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"], tensors["b_dec"])
    further = _thresholds(tensors["threshold"])
    return Foreign("jumprelu", *weights, pre_bias=False, further=further, context="the tokenizer puts BOS in front")


def _openai(path: Path) -> Foreign:
    tensors: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    weights = (tensors["encoder.weight"], tensors["decoder.weight"].T, tensors["latent_bias"], tensors["pre_bias"])
    if tensors.get("activation", "TopK") == "ReLU":
        return Foreign("relu", *weights, layernorm=True)
    return Foreign("topk", *weights, k=int(tensors["activation_state_dict"]["k"]), layernorm=True)


RELEASE = "saelens-release"
READERS: dict[str, Callable[[Path], Foreign]] = {
    "saelens": _saelens,
    "sparsify": _sparsify,
    "dictionary_learning": _dictionary_learning,
    "gemma_scope": _gemma_scope,
    "openai": _openai,
}
KINDS = (*READERS, RELEASE)
"""What may stand before the colon of a target."""
