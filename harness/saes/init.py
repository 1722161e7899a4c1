"""Initial weights: a function of the seed and the sample of activations, not of the mesh."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from harness.ops.untyped import norm
from harness.parallel import Shards
from harness.process.runtime import Runtime
from harness.saes.catalogue import ACTIVATIONS
from harness.saes.sae import Params, Sae
from harness.saes.start import Start
from harness.saes.step import forward

_ROWS_PER_SEED = 1024
"""Each block of rows has its own generator, so that a shard draws only its own rows and gets the same numbers."""


LEAST_DISTANCE = 1e-150
"""A row at the median itself would have an infinite weight."""


def geometric_median(
    x: Float[Tensor, "rows d"], tolerance: float = 1e-6, most_iterations: int = 200
) -> Float[Tensor, " d"]:
    """The point with the least mean distance to the rows, in float64 (Weiszfeld's iteration).

    Stops when it moves by less than `tolerance` of the rows' mean distance.
    """
    x = x.double()
    median = x.mean(dim=0)
    for _ in range(most_iterations):
        distance = norm(x - median, dim=1).clamp_min(LEAST_DISTANCE)
        weight = 1 / distance
        moved = (weight @ x) / weight.sum()
        step = float(norm(moved - median))
        median = moved
        if step <= tolerance * float(distance.mean()):
            break
    return median


def _generator(seed: int, purpose: int, block: int) -> torch.Generator:
    # a fixed mixing of three small integers; torch spreads the result over its whole state
    mixed = (seed * 0x9E3779B97F4A7C15 + purpose * 0xBF58476D1CE4E5B9 + block * 0x94D049BB133111EB) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def _unit_rows(
    seed: int, rows: slice, d_model: int, device: torch.device, dtype: torch.dtype, purpose: int = 1
) -> Float[Tensor, "rows d"]:
    """Random directions, drawn in float64 block by block: on the host there is never more than a block of them."""
    drawn = torch.empty(rows.stop - rows.start, d_model, device=device, dtype=dtype)
    for number in range(rows.start // _ROWS_PER_SEED, -(-rows.stop // _ROWS_PER_SEED)):
        begin = number * _ROWS_PER_SEED
        own = slice(max(rows.start, begin), min(rows.stop, begin + _ROWS_PER_SEED))
        block = torch.randn(_ROWS_PER_SEED, d_model, dtype=torch.float64, generator=_generator(seed, purpose, number))
        block = block[own.start - begin : own.stop - begin]
        drawn[own.start - rows.start : own.stop - rows.start] = block / norm(block, dim=1, keepdim=True)
    return drawn


DECODER_NORM = 0.1
"""Of the initial rows of a free decoder (Conerly et al. 2024)."""


def initial_params(
    sae: Sae,
    sample: Float[Tensor, "rows d"],
    seed: int,
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype,
    tied: bool = True,
) -> Params:
    """`sample` are normalised rows in float64.

    Decoder rows random with norm 1; encoder rows equal to them if `tied`, else of their own; b_dec and b_r at the
    geometric median of the sample, as two tensors; router rows uniform in ±1/√d; b_enc zero. A free decoder has rows
    of norm 0.1 and b_dec zero. Then the architecture adds its own, or replaces some (`Activation.parameters`).
    """
    rows = shards.rows(sae.n_latents)
    directions = _unit_rows(seed, rows, sae.d_model, device, dtype)
    encoder = directions.clone() if tied else _unit_rows(seed, rows, sae.d_model, device, dtype, purpose=3)
    # without a bias before the encoder, biases begin at zero
    center = geometric_median(sample) if sae.traits.pre_bias else sample.new_zeros(sae.d_model)
    params = {"W_enc": encoder, "W_dec": directions.clone(), "b_dec": center.to(device, dtype, copy=True)}
    if sae.enc_bias:
        params["b_enc"] = torch.zeros(directions.shape[0], device=device, dtype=dtype)
    if "W_r" in sae.layout():
        bound = 1 / math.sqrt(sae.d_model)
        router = torch.rand(sae.n_experts, sae.d_model, dtype=torch.float64, generator=_generator(seed, 2, 0))
        params["W_r"] = ((2 * router - 1) * bound).to(device, dtype)
        params["b_r"] = center.to(device, dtype, copy=True)
    if not sae.traits.unit_decoder:
        for name in ("W_enc", "W_dec"):
            params[name] *= DECODER_NORM
    start = Start(sae, params, sample, directions, shards)
    params |= ACTIVATIONS[sae.architecture].parameters(start)
    return {name: params[name] for name in sae.layout()}


def match_norm(sae: Sae, params: Params, x: Float[Tensor, "tokens d"], runtime: Runtime) -> None:
    """Scale the encoder so that reconstructions have the norm of the centred inputs (Gao et al. 2024, appendix A.1).

    Without encoder bias the reconstruction is linear in the encoder's scale, so one sample suffices.
    """
    run = forward(sae, params, params, x, runtime)
    reconstruction = (run.centred - run.residual).square().sum()
    inputs = run.centred.square().sum()
    both = torch.stack([inputs, reconstruction])
    if sae.routed:
        runtime.shards.sum_(both, "shard", "scalars")
    params["W_enc"] *= (both[0] / both[1]).sqrt()
