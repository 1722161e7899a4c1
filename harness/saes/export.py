"""Weights of a finished run in the formats of other tools. Each format is tested by loading it with its tool.

All formats hold an SAE of raw activations x. A run that divided by a constant s computes on y = x/s. Decoder rows keep
norm 1, so only the biases change: b_enc → s·b_enc, b_dec → s·b_dec, and activations come out s times larger. Per-token
normalisation is no linear map: the user of the exported SAE has to apply it.

The other tools hook a module and take its output u. Where the model multiplies it, x = c·u, the SAE of u is written.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from torch import Tensor

from harness.errors import UserError
from harness.files import replacing, write_json_atomic, write_tensors_atomic
from harness.ops.untyped import norm
from harness.saes import neuronpedia
from harness.saes.batchtopk import prefix_ends
from harness.saes.trained import TrainedSae, load

FORMATS = ("saelens", "sparsify", "dictionary_learning", "neuronpedia")

_GUESSED_SUFFIX = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}


_SAELENS = {
    "topk": "topk",
    "multi_topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "topk_decoder_norm": "jumprelu",
    "relu": "standard",
    "relu_decoder_norm": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "jumprelu_tanh": "jumprelu",
}
"""Architecture -> that of SAELens which computes the same at inference."""

_DICTIONARY_LEARNING = {
    "topk": ("TopKTrainer", "AutoEncoderTopK"),
    "multi_topk": ("TopKTrainer", "AutoEncoderTopK"),
    "batchtopk": ("BatchTopKTrainer", "BatchTopKSAE"),
    "matryoshka": ("MatryoshkaBatchTopKTrainer", "MatryoshkaBatchTopKSAE"),
    "topk_decoder_norm": ("JumpReluTrainer", "JumpReluAutoEncoder"),
    "relu": ("StandardTrainer", "AutoEncoder"),
    "gated": ("GatedSAETrainer", "GatedAutoEncoder"),
    "jumprelu": ("JumpReluTrainer", "JumpReluAutoEncoder"),
    "jumprelu_tanh": ("JumpReluTrainer", "JumpReluAutoEncoder"),
}
"""Architecture -> trainer and class of dictionary_learning. Its ReLU SAE has unit decoder rows."""

_ARCHITECTURES = {
    "saelens": set(_SAELENS),
    "sparsify": {"topk", "multi_topk"},
    "dictionary_learning": set(_DICTIONARY_LEARNING),
}
"""What each format has."""


class LinearSae(NamedTuple):
    """An SAE with its constant scale folded into biases and thresholds: float32, on the CPU."""

    W_enc: Float[Tensor, "n d"]
    W_dec: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]
    b_dec: Float[Tensor, " d"]
    frequency: Float64[Tensor, " n"]
    """Share of the training tokens on which each latent fired."""
    architecture: str
    k: int
    """0 where no fixed number is active."""
    further: dict[str, Tensor]
    """`threshold` (n) of those that choose by one; `r_mag` and `b_mag` (n) of a Gated SAE."""
    group_sizes: list[int]
    """Matryoshka: latents of each prefix beyond the one before."""
    pre_bias: bool
    """Whether the encoder sees x − b_dec."""
    activations: dict[str, Any]
    """Description of the activations it was trained on."""
    per_token: bool
    """Whether inputs must be normalised per token (mean over d subtracted, unit norm)."""


def fold(trained: TrainedSae) -> LinearSae:
    """The same SAE for the raw output of the hooked module (or normalised per token, if it was trained on that).

    Raises `UserError` for an SAE with a router.
    """
    if trained.sae.routed:
        raise UserError(
            f"{trained.origin.run_id} is a Switch SAE: no other tool can load one, and routing has no exact TopK "
            "equivalent; load it with harness.saes.trained.load"
        )
    scale = trained.normalizer.scale / trained.origin.activations.get("module_scale", 1.0)
    return LinearSae(
        W_enc=trained.W_enc,
        W_dec=trained.W_dec,
        b_enc=trained.b_enc * scale,
        b_dec=trained.b_dec * scale,
        frequency=trained.frequency,
        architecture=trained.sae.architecture,
        k=trained.sae.k,
        further=_further(trained, scale),
        group_sizes=[end - begin for begin, end in itertools.pairwise([0, *prefix_ends(trained.sae)])],
        pre_bias=trained.sae.traits.pre_bias,
        activations=trained.origin.activations,
        per_token=trained.normalizer.per_token,
    )


def _further(trained: TrainedSae, scale: float) -> dict[str, Tensor]:
    params, n = trained.params, trained.sae.n_latents
    if trained.sae.traits.by_decoder_norm:
        return {"threshold": params["threshold"] * scale / norm(params["W_dec"], dim=1)}
    if "threshold" in params:
        return {"threshold": (params["threshold"] * scale).expand(n).contiguous()}
    if "log_threshold" in params:
        return {"threshold": params["log_threshold"].exp() * scale}
    return {"r_mag": params["r_mag"], "b_mag": params["b_mag"] * scale} if "r_mag" in params else {}


def export(run_dir: Path, form: str, out: Path) -> list[str]:
    """Write the SAE of `run_dir` into `out` in one of `FORMATS`; return warnings for the user.

    Files of an earlier export in `out` are replaced. Raises `UserError` when the run is not finished, the format is
    unknown or has no such architecture, or `out` cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form} is not known; choose one of: {', '.join(FORMATS)}")
    trained = load(run_dir, ops="reference")  # no kernel runs
    if form == "neuronpedia":  # what is shown of an SAE, not the SAE: for any architecture
        _write(out, lambda folder: neuronpedia.write(trained, run_dir, folder))
        return []
    writers = {"sparsify": _sparsify, "dictionary_learning": _dictionary_learning}
    sae = fold(trained)
    if sae.architecture not in _ARCHITECTURES[form]:
        forms = "--format saelens" if sae.architecture in _SAELENS else "harness.saes.trained.load"
        raise UserError(f"{form} has no {sae.architecture} SAE that computes the same; use {forms}")
    if form == "saelens":
        _write(out, lambda folder: _saelens(sae, folder, "/".join(neuronpedia.identity(trained)[::2])))
    else:
        _write(out, lambda folder: writers[form](sae, folder))
    warnings: list[str] = []
    if not trained.origin.hashed:
        warnings.append(f"{run_dir} has no hash of its weights (an earlier version wrote it): damage cannot be noticed")
    if sae.per_token:
        warnings.append("this SAE expects inputs normalised per token (subtract the mean over d, scale to unit norm)")
    if sae.activations["kind"] == "lm" and "module" not in sae.activations:
        warnings.append(
            f"an earlier version harvested the activations and did not record the hooked module; {_module(sae)!r} is a "
            f"guess, compare it with the names in the model"
        )
    return warnings


def _write(out: Path, write: Callable[[Path], None]) -> None:
    """Move what `write` makes in a folder of its own into `out`. Raises `UserError` if that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as beside:
            write(Path(beside))
            for path in sorted(Path(beside).rglob("*")):  # a directory comes before what is in it
                place = out / path.relative_to(beside)
                place.mkdir(exist_ok=True) if path.is_dir() else path.replace(place)
    except (OSError, SafetensorError, RuntimeError) as error:  # the libraries wrap the system's errors
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        free = f" ({shutil.disk_usage(out).free / 1e6:.1f} MB free)" if out.is_dir() else ""
        raise UserError(f"cannot write to {out}{free}: {reason}") from error


def _note(sae: LinearSae) -> str:
    return "inputs: mean over d subtracted, unit norm per token" if sae.per_token else "inputs: raw activations"


def _saelens(sae: LinearSae, out: Path, neuronpedia_id: str) -> None:
    n, d = sae.W_enc.shape
    about = sae.activations
    prefix = about.get("base_model_prefix")
    first = about.get("drop_first_position", False)
    architecture = _SAELENS[sae.architecture]
    write_json_atomic(
        out / "cfg.json",
        {
            "architecture": architecture,
            "d_in": d,
            "d_sae": n,
            **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": sae.pre_bias,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": "6.54.12",
                "sae_lens_training_version": f"sae-scaling {importlib.metadata.version('sae-scaling')}",
                "model_name": about.get("model", about["kind"]),
                "hook_name": f"{prefix}.{_module(sae)}" if prefix else _module(sae),
                "hook_head_index": None,
                "context_size": about.get("context"),
                "prepend_bos": _prepend_bos(sae),
                "seqpos_slice": [1, None] if first else [None],
                "exclude_special_tokens": about.get("dropped_ids") or False,
                "model_class_name": "AutoModelForCausalLM",  # its hooks are named like the modules of the model
                "dataset_path": about.get("dataset"),
                "neuronpedia_id": neuronpedia_id,  # of the dashboards that --format neuronpedia writes
                "note": _note(sae),
            },
        },
    )
    bias = "b_gate" if architecture == "gated" else "b_enc"
    tensors = {"W_enc": sae.W_enc.T, bias: sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, **sae.further}
    write_tensors_atomic(out / "sae_weights.safetensors", tensors)
    write_tensors_atomic(out / "sparsity.safetensors", {"sparsity": sae.frequency.clamp_min(1e-10).log10().float()})


def _sparsify(sae: LinearSae, out: Path) -> None:
    n, d = sae.W_enc.shape
    folder = out / _module(sae)
    folder.mkdir(exist_ok=True)
    write_json_atomic(
        folder / "cfg.json",
        {
            "activation": "topk",
            "expansion_factor": max(n // d, 1),
            "normalize_decoder": True,
            "num_latents": n,
            "k": sae.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": d,
        },
    )
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    write_tensors_atomic(folder / "sae.safetensors", tensors)


def _module(sae: LinearSae) -> str:
    """The module that was hooked, relative to the base model, or what it probably was for an older harvest."""
    about = sae.activations
    if about["kind"] == "synthetic":
        return "synthetic"
    return about.get("module") or f"layers.{about['layer']}{_GUESSED_SUFFIX[about['hook']]}"


def _prepend_bos(sae: LinearSae) -> bool:
    """Whether every context began with tokens of the tokenizer's own."""
    return sae.activations.get("prefix_tokens", 0) > 0


def _dictionary_learning(sae: LinearSae, out: Path) -> None:
    n, d = sae.W_enc.shape
    about = sae.activations
    trainer, dict_class = _DICTIONARY_LEARNING[sae.architecture]
    state = {name: tensor.contiguous() for name, tensor in _dictionary_state(sae, dict_class).items()}
    with replacing(out / "ae.pt") as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_json_atomic(
        out / "config.json",
        {
            "trainer": {
                "trainer_class": trainer,
                "dict_class": dict_class,
                "activation_dim": d,
                "dict_size": n,
                "k": sae.k,
                "layer": about.get("layer", 0),
                "lm_name": about.get("model", about["kind"]),
                "lr": None,
                "steps": None,
                "seed": None,
                "submodule_name": _module(sae),
                "note": _note(sae),
            },
            "buffer": {"ctx_len": about.get("context"), "d_submodule": d},
        },
    )


def _dictionary_state(sae: LinearSae, dict_class: str) -> dict[str, Tensor]:
    """The weights under the names of dictionary_learning's class."""
    encoder = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    matrices = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    k = {"k": torch.tensor(sae.k, dtype=torch.int32)}
    if dict_class == "AutoEncoderTopK":
        return k | {"threshold": torch.tensor(-1.0)} | encoder | {"b_dec": sae.b_dec}  # −1: the exact k largest
    if dict_class == "BatchTopKSAE":
        return k | {"threshold": sae.further["threshold"][0]} | encoder | {"b_dec": sae.b_dec}
    if dict_class == "MatryoshkaBatchTopKSAE":
        sizes = {"group_sizes": torch.tensor(sae.group_sizes), "threshold": sae.further["threshold"][0]}
        return k | sizes | matrices | {"b_enc": sae.b_enc}
    if dict_class == "JumpReluAutoEncoder":  # its encoder sees x itself
        bias = sae.b_enc - sae.W_enc @ sae.b_dec if sae.pre_bias else sae.b_enc
        return matrices | {"b_enc": bias, "threshold": sae.further["threshold"]}
    if dict_class == "GatedAutoEncoder":
        biases = {"gate_bias": sae.b_enc, "mag_bias": sae.further["b_mag"], "decoder_bias": sae.b_dec}
        return biases | {"r_mag": sae.further["r_mag"], "encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T}
    return encoder | {"bias": sae.b_dec}
