"""GPU kernels in Triton, products of one group by cuBLAS. Without a GPU they run in Triton's interpreter, for tests.

Exact selection, no atomics on floating-point numbers: the same bits from call to call. bfloat16 or float32 products
added up in float32; float64 goes to `reference`. No operation waits for the device, except where a selection is too
wide for a program's registers (`selection.fits`) and for float64. See `interface` for the contracts.
"""

from harness.ops.reference import fired
from harness.ops.triton.adam import project, update
from harness.ops.triton.products import reconstruct, select, weight_grads
from harness.ops.triton.selection import select_preactivations

__all__ = ["NAME", "fired", "project", "reconstruct", "select", "select_preactivations", "update", "weight_grads"]

NAME = "triton"
