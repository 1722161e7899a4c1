"""Weights of a finished run in the formats of other tools (each checked by loading it with that tool).

All formats hold an SAE of raw activations x. A run that divided by a constant s computes on y = x/s; since unit
decoder rows are to stay unit, only the biases change: b_enc → s·b_enc, b_dec → s·b_dec, and activations come out
s times larger. Per-token normalisation is no linear map and stays with whoever feeds the SAE.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import UserError
from harness.files import replacing, write_json_atomic, write_tensors_atomic

FORMATS = ("saelens", "sparsify", "dictionary_learning")

_SAELENS_HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
_MODULE_SUFFIX = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}


class TrainedSae(NamedTuple):
    """A TopK SAE for raw activations, and where it comes from."""

    W_enc: Float[Tensor, "n d"]
    W_dec: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]
    b_dec: Float[Tensor, " d"]
    fire_counts: Int[Tensor, " n"]
    """Tokens of the training on which each latent fired."""
    k: int
    settings: dict[str, Any]
    """`sae/config.json` of the run."""

    @property
    def activations(self) -> dict[str, Any]:
        return self.settings["activations"]

    @property
    def per_token(self) -> bool:
        """Whether x has to be normalised per token (mean over d subtracted, unit norm) before it is encoded."""
        return self.settings["normalizer"]["rule"] == "layernorm"


def load_trained(run_dir: Path) -> TrainedSae:
    """Read `sae/` of a run and fold its constant scale into the biases. Raises `UserError`."""
    folder = run_dir / "sae"
    if not (folder / "config.json").is_file():
        raise UserError(f"{run_dir} has no finished weights (sae/config.json); let the run end first")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings["sae"]["architecture"] != "topk":
        raise UserError(
            f"{run_dir.name} is a Switch SAE: no other tool can load one, and routing has no exact TopK equivalent; "
            "read sae/sae.safetensors instead"
        )
    tensors = load_file(folder / "sae.safetensors")
    scale = float(settings["normalizer"]["scale"])
    W_enc = tensors["W_enc"].float()
    b_enc = tensors["b_enc"].float() if "b_enc" in tensors else torch.zeros(W_enc.shape[0])
    return TrainedSae(
        W_enc=W_enc,
        W_dec=tensors["W_dec"].float(),
        b_enc=b_enc * scale,
        b_dec=tensors["b_dec"].float() * scale,
        fire_counts=tensors["fire_counts"],
        k=settings["sae"]["k"],
        settings=settings,
    )


def export(run_dir: Path, form: str, out: Path) -> list[str]:
    """Write the SAE of `run_dir` into `out` in one of `FORMATS`; returns warnings for the reader.

    Raises `UserError` when the run is not finished, is a Switch SAE, or the format is unknown.
    """
    writers = {"saelens": _saelens, "sparsify": _sparsify, "dictionary_learning": _dictionary_learning}
    if form not in writers:
        raise UserError(f"--format {form} is not known; choose one of: {', '.join(FORMATS)}")
    sae = load_trained(run_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        writers[form](sae, out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    if sae.per_token:
        return ["this SAE expects inputs normalised per token (subtract the mean over d, scale to unit norm)"]
    return []


def _note(sae: TrainedSae) -> str:
    return "inputs: mean over d subtracted, unit norm per token" if sae.per_token else "inputs: raw activations"


def _saelens(sae: TrainedSae, out: Path) -> None:
    n, d = sae.W_enc.shape
    about = sae.activations
    hook = _SAELENS_HOOKS.get(about.get("hook", ""))
    write_json_atomic(
        out / "cfg.json",
        {
            "architecture": "topk",
            "d_in": d,
            "d_sae": n,
            "k": sae.k,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "metadata": {
                "sae_lens_version": "6.54.12",
                "sae_lens_training_version": f"sae-scaling {importlib.metadata.version('sae-scaling')}",
                "model_name": about.get("model", about["kind"]),
                "hook_name": f"blocks.{about['layer']}.{hook}" if hook else "synthetic",
                "hook_head_index": None,
                "context_size": about.get("context"),
                "prepend_bos": False,
                "model_class_name": about.get("model_class", "AutoModel"),
                "dataset_path": about.get("dataset", about.get("text")),
                "note": _note(sae),
            },
        },
    )
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    write_tensors_atomic(out / "sae_weights.safetensors", tensors)
    frequency = sae.fire_counts.double() / max(float(sae.settings["tokens"]), 1.0)
    write_tensors_atomic(out / "sparsity.safetensors", {"sparsity": frequency.clamp_min(1e-10).log10().float()})


def _sparsify(sae: TrainedSae, out: Path) -> None:
    n, d = sae.W_enc.shape
    folder = out / _hookpoint(sae)
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


def _hookpoint(sae: TrainedSae) -> str:
    about = sae.activations
    if about["kind"] == "synthetic":
        return "synthetic"
    return f"layers.{about['layer']}{_MODULE_SUFFIX[about['hook']]}"


def _dictionary_learning(sae: TrainedSae, out: Path) -> None:
    n, d = sae.W_enc.shape
    about = sae.activations
    state = {
        "k": torch.tensor(sae.k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),  # unset: exact top k instead of a threshold
        "encoder.weight": sae.W_enc,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T.contiguous(),
        "b_dec": sae.b_dec,
    }
    with replacing(out / "ae.pt") as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_json_atomic(
        out / "config.json",
        {
            "trainer": {
                "trainer_class": "TopKTrainer",
                "dict_class": "AutoEncoderTopK",
                "activation_dim": d,
                "dict_size": n,
                "k": sae.k,
                "layer": about.get("layer", 0),
                "lm_name": about.get("model", about["kind"]),
                "lr": None,
                "steps": None,
                "seed": None,
                "submodule_name": _hookpoint(sae),
                "note": _note(sae),
            },
            "buffer": {"ctx_len": about.get("context"), "d_submodule": d},
        },
    )
