"""What a run allocates on its GPU, without a GPU.

The real initialisation, step, evaluation and gathering of the weights run at real sizes on tensors that have a shape
but no numbers (torch's `meta` device stands for the GPU), on a mesh whose other ranks do not exist. Kernels are not
launched, but everything that is handed to them is allocated. Needs neither a GPU nor memory. Not tracked: what a
library allocates inside one call (the workspace of a sort or a product), and what the allocator loses between blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import budget
from harness.bench.phases import FakeRows, Phases, phases
from harness.config import Config
from harness.cost.estimate import rank_memory
from harness.parallel import Shards, Solo
from harness.parallel.mesh import Mesh
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.record.run import Run

BLOCK_BYTES = 512
"""What an allocation on a GPU is rounded up to."""

GPU = torch.device("meta")


def allocated(run: Run) -> Phases:
    """What the first rank of a run alone allocates on its GPU, and what the plan says."""
    from harness.ops import triton

    config, d_model = run.config, run.store.d_model or 0
    live, source = Live(), FakeRows(d_model, 2 * budget.EVALUATION_BATCH, torch.empty)
    runtime = Runtime(GPU, _mesh_of(config), triton, StopFlag())
    with no_kernels(), live:
        found = {phase: live.since() for phase in phases(config, source, runtime)}
    return Phases(sum(rank_memory(config, d_model).values()), found)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors on the GPU that are alive. What the host reads from there is arbitrary."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if func is torch.ops.aten._local_scalar_dense.default and source is not None and source.device == GPU:
            return 1.0 if source.is_floating_point() else 1
        if func is torch.ops.aten._to_copy.default and source is not None and source.device == GPU:
            to = torch.device(kwargs.get("device") or GPU)
            if to != GPU:
                return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=to)
        to_host = func is torch.ops.aten.copy_.default and source is not None and source.device != GPU
        if to_host and args[1].device == GPU:
            return source
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device == GPU:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size

    def since(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


class _LoneRank(Mesh):
    """The first rank of a mesh whose others do not exist."""

    def __init__(self, dp: int, shard: int) -> None:
        self.rank, self.size, self.dp, self.shard, self.dp_rank, self.shard_rank = 0, dp * shard, dp, shard, 0, 0
        self._sent = {}
        self._groups = dict.fromkeys(("dp", "shard"))
        self._sizes = {"dp": dp, "shard": shard, "all": dp * shard}

    def agree(self, bits: int) -> int:
        return bits


def _mesh_of(config: Config) -> Shards:
    mesh = config.mesh
    return Solo() if mesh.training_ranks == 1 else _LoneRank(mesh.dp, mesh.shard)


@contextmanager
def no_kernels() -> Iterator[None]:
    """Nothing is launched or sent."""
    replaced = {
        "triton.runtime.jit.JITFunction.run": lambda *_, **__: None,
        "harness.ops.triton.grouped._aligned": lambda *_: True,
        "harness.ops.triton.grouped._describable": lambda *_: False,
        "harness.ops.triton.grouped._product": lambda *_: None,
        "harness.parallel.collectives.all_reduce": lambda *_: None,
        "harness.parallel.collectives.all_to_all": lambda *_: None,
        "harness.parallel.collectives.all_gather": lambda *_: None,
        "harness.saes.init._unit_rows": _undrawn,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch(name, function))
        yield


def _undrawn(
    seed: int, rows: slice, d_model: int, device: torch.device, dtype: torch.dtype, purpose: int = 1
) -> Tensor:
    """Directions are drawn on the host, block by block: minutes for the largest SAEs."""
    return torch.empty(rows.stop - rows.start, d_model, device=device, dtype=dtype)
