"""A finished SAE of any architecture, for raw activations in the model's own units.

    sae = load(run_dir)
    codes = sae.encode(x)       # active latents of each token
    x_hat = sae.decode(codes)   # codes may be changed in between, e.g. to ablate a latent
    x_hat = sae.forward(x)      # both, with the same bits

The normaliser is applied and undone inside. The maths is that of the training: `harness.saes.step` and a kernel set,
without ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.config import SaeConfig
from harness.errors import UserError
from harness.files import sha256_of
from harness.ops import Codes, Groups, Ops, choose_ops
from harness.process.runtime import alone
from harness.record import names
from harness.record.result import read_result
from harness.record.rundir import require_own
from harness.saes import hub
from harness.saes.normalize import Normalizer, TokenUnits
from harness.saes.sae import Params, Sae
from harness.saes.step import encode
from harness.saes.weights import read_weights
from harness.schema import OBJECT, TEXT, fields, number, one_of, read_json, whole

FORMAT = 1
"""Of `sae/config.json`: the one this program reads."""
_AGAIN = "copy the run directory again, or delete it and train the run again"
_VERSION = fields({"format": whole()})
_SETTINGS = fields(
    {
        "run_id": TEXT,
        "store_id": TEXT,
        "sae": OBJECT,
        "d_model": whole(1),
        "aux_k": whole(),
        "balance_weight": number(0),
        "normalizer": fields({"rule": one_of("scale", "layernorm", "none"), "scale": number(above=0)}),
        "variance": number(above=0),
        "tokens": whole(),
        "activations": fields({"kind": TEXT}),
    }
)


@dataclass(frozen=True, eq=False)
class TokenCodes:
    """The active latents of each token, and the per-token numbers that decoding needs.

    In normalised space x̂ = gate·Σ_j values[:, j]·W_dec[index[:, j]] + b_dec. To edit codes, use
    `dataclasses.replace(codes, values=…)`.
    """

    values: Float[Tensor, "tokens k"]
    """Activations z, descending; equal positive values by ascending index. 0 is no entry."""
    index: Int[Tensor, "tokens k"]
    """Latent of each entry, 0 to n−1. With several experts it counts over all of them, in blocks of n/E."""
    gate: Float[Tensor, " tokens"] | None
    """Switch: the router's probability p of the chosen expert. TopK: None, which stands for 1."""
    units: TokenUnits | None
    """Mean and norm of each raw row where normalisation is per token, else None."""


@dataclass(frozen=True)
class Origin:
    """Where a trained SAE comes from."""

    run_id: str
    store_id: str
    """Recipe hash of the activations it was trained on."""
    tokens: int
    """Tokens it was trained on, repeats included."""
    activations: dict[str, Any]
    """Description of the activations: kind, model, hook, layer, context, text …"""
    hashed: bool
    """Whether the weights were compared with the hash in `result.json`; earlier versions wrote none."""

    @property
    def model(self) -> str | None:
        """The language model as the configuration names it; None for synthetic activations."""
        return self.activations.get("model")

    @property
    def layer(self) -> int | None:
        """0-based block; None for synthetic activations."""
        return self.activations.get("layer")

    @property
    def hook(self) -> str | None:
        """`resid_post`, `mlp_out` or `attn_out`; None for synthetic activations."""
        return self.activations.get("hook")


@dataclass(frozen=True, eq=False)
class TrainedSae:
    """Weights, normaliser, settings and origin of a finished SAE. Its methods record no gradients.

    `encode` and `forward` take rows of any float dtype from any device, and compute in `dtype` on `device`. Memory
    grows with tokens·d and tokens·k, so callers cut long inputs into batches.
    """

    sae: Sae
    """Resolved numbers: architecture, n_latents, k, n_experts, variance …"""
    params: Params
    """By name, see `harness.saes.sae.Params`. Normalised space."""
    normalizer: Normalizer
    config: SaeConfig
    """The settings under `sae` that it was trained with."""
    origin: Origin
    fire_counts: Int[Tensor, " n"]
    """Training tokens on which each latent fired."""
    ops: Ops
    """Kernel set that computes."""

    @property
    def W_enc(self) -> Float[Tensor, "n d"]:
        return self.params["W_enc"]

    @property
    def W_dec(self) -> Float[Tensor, "n d"]:
        """Rows have norm 1, unless the architecture leaves them free."""
        return self.params["W_dec"]

    @property
    def b_dec(self) -> Float[Tensor, " d"]:
        return self.params["b_dec"]

    @property
    def b_enc(self) -> Float[Tensor, " n"]:
        """Zeros when the SAE has no encoder bias."""
        return self.params["b_enc"] if "b_enc" in self.params else self.W_enc.new_zeros(self.sae.n_latents)

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def frequency(self) -> Float64[Tensor, " n"]:
        """Share of the training tokens on which each latent fired."""
        return self.fire_counts.double() / max(float(self.origin.tokens), 1.0)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "tokens d"]) -> TokenCodes:
        """Active latents of raw rows."""
        x = x.to(self.device, self.dtype)
        runtime = alone(self.device, self.ops)
        batch, entries = encode(self.sae, self.params, self.params, self.normalizer(x, self.dtype), runtime)
        values, index, gate = entries.z, entries.index, batch.routing.scale
        if not self.sae.traits.per_token:  # by index so far
            values, place = values.sort(dim=1, descending=True, stable=True)
            index = index.gather(1, place)
        if batch.routing.order is not None:  # sorted by expert: back to the order of x
            place = batch.routing.order.argsort()
            values, index = values[place], index[place]
            gate = None if gate is None else gate[place]
        return TokenCodes(values, index, gate, self.normalizer.units(x))

    @torch.no_grad()
    def decode(self, codes: TokenCodes) -> Float[Tensor, "tokens d"]:
        """Reconstruction x̂ in the model's own units."""
        tokens = codes.values.shape[0]
        # one group over all latents: decoding needs no routing
        groups = Groups(torch.tensor([0, tokens], device=self.device), (0, self.sae.n_latents))
        nothing = self.W_dec.new_zeros(tokens, self.sae.d_model)
        # the operation returns target − x̂
        minus, _, _ = self.ops.reconstruct(Codes(codes.values, codes.index), self.W_dec, nothing, codes.gate, groups)
        return self.normalizer.undo(self.b_dec - minus, codes.units)

    def forward(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Reconstruction x̂ of raw rows, in the model's own units: `decode(encode(x))`."""
        return self.decode(self.encode(x))


def load(
    run_dir: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ops: str = "auto",
) -> TrainedSae:
    """The SAE of a finished run, from `sae/` in its directory, or from the hub: `hf:ORG/NAME/RUN`. `ops` as in the
    configuration.

    Raises `UserError` when the run has no weights yet, or when a file is missing, damaged, of another version, of
    another run, does not fit the settings or is not the one whose hash stands in `result.json`. Raises `ValueError` for
    a kernel set that does not run on `device`.
    """
    device = torch.device(device)
    run_dir = hub.fetch(str(run_dir)) if str(run_dir).startswith(hub.PREFIX) else Path(run_dir)
    config_path = run_dir / names.SAE / names.WEIGHTS_CONFIG
    if not config_path.is_file():
        raise UserError(
            f"{run_dir} has no finished weights ({names.SAE}/{names.WEIGHTS_CONFIG}); let the run end first"
        )
    expected = _recorded_hashes(run_dir)
    sae, normalizer, config, origin = _read_settings(config_path, run_dir, hashed=bool(expected))
    tensors = _read_weights(run_dir / names.SAE, sae)
    _compare(run_dir / names.SAE, expected)
    params = {name: tensors[name].to(device, dtype) for name in sae.layout()}
    fire_counts = tensors["fire_counts"].to(device)
    return TrainedSae(sae, params, normalizer, config, origin, fire_counts, choose_ops(ops, device))


def _recorded_hashes(run_dir: Path) -> dict[str, str]:
    """File in `sae/` → its sha256; empty for a run of an earlier version, or one whose result is not written yet."""
    return (read_result(run_dir) or {}).get("weights", {})


def _compare(folder: Path, expected: dict[str, str]) -> None:
    for name, sha256 in expected.items():
        path = folder / name
        try:
            found = sha256_of(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); {_AGAIN}") from error
        if found != sha256:
            raise UserError(f"{path} is damaged or of another run (its sha256 is not that in {names.RESULT}); {_AGAIN}")


def _read_settings(path: Path, run_dir: Path, *, hashed: bool) -> tuple[Sae, Normalizer, SaeConfig, Origin]:
    version = read_json(path, _VERSION, _AGAIN)["format"]
    if version != FORMAT:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT}: use the version that wrote it")
    about = read_json(path, _SETTINGS, _AGAIN)
    require_own(path, run_dir, about["run_id"])
    try:
        config = SaeConfig(**about["sae"])
        sae = Sae(
            architecture=config.architecture,
            d_model=about["d_model"],
            n_latents=config.n_latents,
            k=config.k,
            n_experts=config.n_experts,
            enc_bias=config.enc_bias,
            variance=float(about["variance"]),
            aux_alpha=config.aux_alpha,
            aux_k=about["aux_k"],
            balance_weight=float(about["balance_weight"]),
            prefixes=tuple(config.prefixes),
            routing=config.routing,
            consistency=config.consistency,
        )
        normalizer = Normalizer(about["normalizer"]["rule"], float(about["normalizer"]["scale"]))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {_AGAIN}") from error
    origin = Origin(about["run_id"], about["store_id"], about["tokens"], about["activations"], hashed)
    return sae, normalizer, config, origin


def _read_weights(folder: Path, sae: Sae) -> dict[str, Tensor]:
    """The parameters and `fire_counts`, checked against the settings."""
    tensors = read_weights(folder, _AGAIN)
    path = folder / names.WEIGHTS
    for name, shape in {name: sae.shape(name) for name in (*sae.layout(), "fire_counts")}.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}; {_AGAIN}")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensors[name].shape)} instead of {shape}; {_AGAIN}")
    return tensors
