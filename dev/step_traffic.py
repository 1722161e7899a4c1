"""What a step launches on a GPU and how many bytes it moves, without a GPU: `python -m dev.step_traffic SHAPE…`.

The real step runs at real sizes on tensors without numbers (`harness.bench.allocated`). Every operation counts the
bytes of its operands and results, each tensor once: also what a kernel does not read all of, and not what it reads
twice. Products that cuBLAS writes in float32 from bfloat16 are not seen. SHAPE is one of `harness.bench`. With
`--dead SHARE` AuxK works on that share of the latents. `--least MB` lists operations that move at least so much.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from harness.bench.allocated import GPU, Live, no_kernels
from harness.bench.phases import planned_dead
from harness.bench.shapes import SHAPES, Shape
from harness.config import SaeConfig, TrainConfig
from harness.errors import WRONG_REQUEST
from harness.ops import triton
from harness.parallel import Solo
from harness.process.runtime import alone
from harness.saes import Params, resolve_sae, step
from harness.terminal import Parser, run_command, say, table
from harness.training.optimizer import Optimizer

NO_WORK = ("empty", "empty_strided", "empty_like", "new_empty", "lift_fresh")
NO_READS = ("new_zeros", "new_ones", "zeros_like", "ones_like")
KERNELS = "triton.runtime.jit.JITFunction.run"


class Traffic(Live):
    """Notes (operation, bytes) of everything that is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        views = any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)
        if not views and name not in NO_WORK:
            self.note(name, [result] if name in NO_READS else [args, kwargs, result])
        return result

    def note(self, name: str, operands: object) -> None:
        tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, Tensor) and leaf.device == GPU]
        moved = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
        self.launched.append((name, sum(moved.values())))

    def kernel(self, kernel: Any, *args: Any, **_: Any) -> None:
        """In place of a kernel of ours."""
        self.note(kernel.fn.__name__, args)


def launched(shape: Shape, dead_share: float) -> list[tuple[str, int]]:
    """The operations of one step in bfloat16 with float32 Adam states, in order."""
    d, n, experts = shape.d, shape.n, shape.experts
    name = "switch" if experts > 1 else "topk"
    config = SaeConfig(name, n, shape.k, experts, aux_alpha=1 / 32, balance_weight=0.1 if experts > 1 else 0.0)
    sae = resolve_sae(config, d, 1.0, 1.0, 1.0)
    sizes = {"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "W_r": (experts, d), "b_r": (d,)}
    params: Params = {key: torch.zeros(size, device=GPU) for key, size in sizes.items() if key in sae.layout()}
    optimizer = Optimizer(sae, params, TrainConfig(tokens=1e6), torch.bfloat16)
    batch, runtime = torch.zeros(shape.batch, d, device=GPU), alone(GPU, triton)
    dead = planned_dead(sae, torch.zeros(n, dtype=torch.bool, device=GPU), Solo(), triton, dead_share)
    traffic = Traffic()
    with no_kernels(), patch(KERNELS, lambda kernel, *args, **named: traffic.kernel(kernel, *args)), traffic:
        stats = step(sae, optimizer.params, optimizer.compute, batch, runtime, dead, optimizer.grads)
        optimizer.apply(1e-4, 1, stats.loss.isfinite(), runtime)
    return traffic.launched


def main() -> int:
    parser = Parser(prog="python -m dev.step_traffic")
    parser.add_argument("shapes", nargs="+", choices=SHAPES, metavar="SHAPE")
    parser.add_argument("--dead", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--least", type=float, metavar="MB")
    arguments = parser.parse_args()
    if not 0 <= arguments.dead < 1:
        say(f"--dead {arguments.dead:g} is not a share: give a number from 0 to below 1")
        return WRONG_REQUEST
    rows = []
    for name in arguments.shapes:
        operations = launched(SHAPES[name], arguments.dead)
        total = sum(moved for _, moved in operations)
        rows.append([name, str(len(operations)), f"{total / 1e9:.2f}"])
        if arguments.least is not None:
            for place, (operation, moved) in enumerate(operations):
                if moved >= 1e6 * arguments.least:
                    print(f"{name} {place:4} {operation} {moved / 1e6:.0f} MB")
    print(table(("shape", "launches", "GB moved"), rows))
    return 0


if __name__ == "__main__":
    run_command(main)
