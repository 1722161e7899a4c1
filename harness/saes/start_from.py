"""Initial weights from a finished SAE: ours, or one that another tool wrote."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from harness.errors import UserError
from harness.files import sha256_of
from harness.ops.untyped import norm
from harness.parallel import Shards
from harness.record.initial import OWN, Initial, find_initial
from harness.saes.normalize import Normalizer
from harness.saes.sae import Params, Sae
from harness.saes.trained import load
from harness.schema import FLAG, fields, read_json


def params_from(
    text: str, expected_hash: str, sae: Sae, normalizer: Normalizer, initial: Params, shards: Shards
) -> Params:
    """The parameters that `train.init_from` names, for activations normalised by `normalizer`, as this rank holds them.

    `initial` gives devices, precisions and those parameters that the source has not. Raises `UserError` for files that
    cannot be read, that have changed since the launch, or that hold another SAE.
    """
    source = find_initial(text)
    if expected_hash and sha256_of(source.weights) != expected_hash:
        raise UserError(f"{source.weights} has changed since the launch; launch again, which makes another run of it")
    raw = _own(source, sae, normalizer) if source.form == OWN else _foreign(source, sae, normalizer)
    rows, params = shards.rows(sae.n_latents), dict(initial)
    for name, cut in sae.layout().items():
        if name not in raw:
            continue
        if tuple(raw[name].shape) != sae.shape(name):
            raise UserError(
                f"train.init_from={text}: {name} has shape {tuple(raw[name].shape)} there, this run needs "
                f"{sae.shape(name)}; set sae.n_latents and activations to its own"
            )
        value = raw[name][rows] if cut == "latent_rows" else raw[name]
        params[name] = value.to(initial[name].device, initial[name].dtype, copy=True).contiguous()
    return params


def _rescaled(params: Params, factor: float) -> Params:
    """The same SAE of activations that are `factor` times as large."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda value: value * factor for name in ("b_enc", "b_dec", "b_mag", "b_r", "threshold")
    }
    changes |= {"W_r": lambda value: value / factor, "log_threshold": lambda value: value + math.log(factor)}
    return {name: changes[name](value) if name in changes else value for name, value in params.items()}


def _own(source: Initial, sae: Sae, normalizer: Normalizer) -> Params:
    trained = load(source.directory, ops="reference")
    if trained.sae.architecture != sae.architecture or trained.sae.n_experts != sae.n_experts:
        raise UserError(
            f"train.init_from={source.directory} is a {trained.sae.architecture} SAE with {trained.sae.n_experts} "
            f"expert(s), this run a {sae.architecture} SAE with {sae.n_experts}; set sae={trained.sae.architecture}"
        )
    if trained.normalizer.rule != normalizer.rule:
        raise UserError(
            f"train.init_from={source.directory} was trained with sae.normalize={trained.normalizer.rule}; set that"
        )
    return _rescaled(trained.params, trained.normalizer.scale / normalizer.scale)


_NAMES = {
    "saelens": {"b_gate": "b_enc"},
    "sparsify": {"encoder.weight": "W_enc", "encoder.bias": "b_enc"},
    "dictionary_learning": {
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "decoder.weight": "W_dec",
        "bias": "b_dec",
        "decoder_bias": "b_dec",
        "gate_bias": "b_enc",
        "mag_bias": "b_mag",
    },
}
"""Names of tensors of other tools, where they differ from ours."""

_TRANSPOSED = {"saelens": ("W_enc",), "sparsify": (), "dictionary_learning": ("decoder.weight", "W_enc")}
"""Matrices with a column per latent."""


def _foreign(source: Initial, sae: Sae, normalizer: Normalizer) -> Params:
    if normalizer.per_token:
        raise UserError(f"train.init_from={source.directory}: another tool's SAE needs sae.normalize=scale or none")
    try:
        if source.weights.suffix == ".pt":
            tensors = torch.load(source.weights, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(source.weights)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(f"{source.weights} cannot be read: {' '.join(str(error).split())}") from error
    params = {
        _NAMES[source.form].get(name, name): (value.T if name in _TRANSPOSED[source.form] else value).double()
        for name, value in tensors.items()
    }
    missing = [name for name in ("W_enc", "W_dec", "b_dec") if name not in params]
    if missing:
        raise UserError(f"{source.weights} has no {', '.join(missing)}; is it a {source.form} SAE?")
    if _sees_x(source, tensors) == sae.traits.pre_bias:  # W(x − b) = Wx − Wb
        sign = 1 if sae.traits.pre_bias else -1
        params["b_enc"] = params["b_enc"] + sign * params["W_enc"] @ params["b_dec"]
    threshold = params.pop("threshold", None)
    if threshold is not None and "log_threshold" in sae.traits.vectors:
        params["log_threshold"] = threshold.clamp_min(1e-6).log()
    elif threshold is not None and sae.traits.per_batch:
        params["threshold"] = threshold.flatten()[:1].clamp_min(0)
    if sae.traits.unit_decoder:
        norms = norm(params["W_dec"], dim=1)
        if not sae.traits.per_token and float((norms - 1).abs().max()) > 1e-3:
            raise UserError(f"{source.weights}: its decoder rows have not norm 1, as those of a {sae.architecture} SAE")
        params["W_dec"] = params["W_dec"] / norms[:, None]
        params["W_enc"] = params["W_enc"] * norms[:, None]
        params["b_enc"] = params["b_enc"] * norms
    return _rescaled(params, 1 / normalizer.scale)


_SAELENS_CONFIG = fields({"apply_b_dec_to_input": FLAG})


def _sees_x(source: Initial, tensors: dict[str, Tensor]) -> bool:
    """Whether the encoder of the other tool's SAE sees x itself; otherwise x less the decoder's bias."""
    if source.form == "saelens":
        again = "export the SAE again"
        return not read_json(source.directory / "cfg.json", _SAELENS_CONFIG, again)["apply_b_dec_to_input"]
    # of dictionary_learning's classes this is JumpReluAutoEncoder alone
    return "threshold" in tensors and "W_enc" in tensors and "group_sizes" not in tensors
