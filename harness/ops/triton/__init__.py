"""GPU kernels in Triton; cuBLAS computes the products of a single group. Tests without a GPU use Triton's interpreter.

Selection is exact. There are no atomics on floating-point numbers, so every call gives the same bits. Products of
bfloat16 or float32 are added up in float32; float64 goes to `reference`. No operation waits for the device, except in
float64 and when a selection is too wide for a program's registers (`selection.fits`). `interface` has the contracts.
"""

from harness.ops.reference import fired, latent_sums, select_above
from harness.ops.sizes import list_length
from harness.ops.triton.adam import project, update
from harness.ops.triton.dense import centred
from harness.ops.triton.products import dense_rows_per_k, latent_grads, reconstruct, select, weight_grads
from harness.ops.triton.selection import select_preactivations

__all__ = [
    "NAME",
    "centred",
    "dense_rows_per_k",
    "fired",
    "latent_grads",
    "latent_sums",
    "list_length",
    "project",
    "reconstruct",
    "select",
    "select_above",
    "select_preactivations",
    "update",
    "weight_grads",
]

NAME = "triton"
