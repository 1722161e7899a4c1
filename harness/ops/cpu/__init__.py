"""CPU kernels: products by torch's BLAS in tiles that stay in cache, everything else in loops compiled by Numba.

Exact and deterministic: results depend neither on the number of threads nor on which thread does what, beyond what
BLAS does inside one tile. float64 goes to `reference`. See `interface` for the contracts, and docs/performance.md
for the gain of each choice.
"""

from harness.ops.cpu.adam import project, update
from harness.ops.cpu.gradients import fired, latent_sums, nested_weight_grads, weight_grads
from harness.ops.cpu.products import dense_rows_per_k, latent_grads, reconstruct, reconstruct_nested
from harness.ops.cpu.selection import select, select_above, select_preactivations, select_with_subset
from harness.ops.reference import centred, list_length

__all__ = [
    "NAME",
    "centred",
    "dense_rows_per_k",
    "fired",
    "latent_grads",
    "latent_sums",
    "list_length",
    "nested_weight_grads",
    "project",
    "reconstruct",
    "reconstruct_nested",
    "select",
    "select_above",
    "select_preactivations",
    "select_with_subset",
    "update",
    "weight_grads",
]

NAME = "cpu"
