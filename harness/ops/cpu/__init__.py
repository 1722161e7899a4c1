"""CPU kernels: products by torch's BLAS in tiles that stay in cache, everything else in loops compiled by Numba.

Exact and deterministic: results depend neither on the number of threads nor on which thread does what, beyond what
BLAS does inside one tile. float64 goes to `reference`. See `interface` for the contracts, `docs/performance.md` for
what each choice was worth.
"""

from harness.ops.cpu.adam import project, update
from harness.ops.cpu.gradients import fired, weight_grads
from harness.ops.cpu.products import reconstruct
from harness.ops.cpu.selection import select, select_preactivations

__all__ = ["NAME", "fired", "project", "reconstruct", "select", "select_preactivations", "update", "weight_grads"]

NAME = "cpu"
