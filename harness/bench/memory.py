"""`python -m harness.bench.memory --study NAME`: the planned memory of a GPU beside what the real code allocates there.

The real initialisation, step, evaluation and gathering of the weights run at real sizes on tensors that have a shape
but no numbers (torch's `meta` device stands for the GPU), on a mesh whose other ranks do not exist. Kernels are not
launched, but everything that is handed to them is allocated. Needs neither a GPU nor memory. Not tracked: what a
library allocates inside one call (the workspace of a sort or a product), and what the allocator loses between blocks.
Architectures that choose by a threshold are left out: how much they hold depends on the numbers.

Exit codes: 0 if plan and peak agree within a tenth for every cell, else 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import budget
from harness.activations.source import SAMPLE_ROWS
from harness.activations.statistics import Statistics
from harness.cell_names import cell_names
from harness.config import Config, to_container
from harness.cost.estimate import rank_memory
from harness.errors import FAILED, WRONG_REQUEST, UserError
from harness.grid.study import load_study
from harness.parallel import Shards, Solo
from harness.parallel.mesh import Mesh
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.record.run import Run
from harness.saes.dead import DeadLatents
from harness.saes.mutual import Peers
from harness.saes.sae import Sae
from harness.sweep.request import Request, plan_runs, requested_cells
from harness.terminal import run_command, say, si, table
from harness.training.state import TrainState

BLOCK_BYTES = 512
"""What an allocation on a GPU is rounded up to."""
TOLERANCE = 0.1
PHASES = ("start", "step", "evaluation", "weights")
GPU = torch.device("meta")


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


class _FakeRows:
    """An `ActivationSource` whose rows have no numbers."""

    id, dictionary, train_rows = "fake", None, None

    def __init__(self, d_model: int, rows: int) -> None:
        self.d_model, self.heldout_rows, self.description = d_model, rows, dict[str, Any]()

    def statistics(self, layernorm: bool) -> Statistics:
        square = 1.0 if layernorm else float(self.d_model)
        return Statistics(SAMPLE_ROWS, torch.zeros(self.d_model, dtype=torch.float64), square, 0.9 * square)

    def sample(self) -> Tensor:
        return torch.empty(SAMPLE_ROWS, self.d_model)

    def heldout(self, batch_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(0, self.heldout_rows, batch_rows):
            yield torch.empty(batch_rows, self.d_model, dtype=torch.bfloat16), torch.zeros(batch_rows).long()


class Tracked(NamedTuple):
    planned: int
    phases: dict[str, int]
    """Phase → its peak, in bytes of one rank."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def track(config: Config, d_model: int) -> Tracked:
    """What the first rank of a run alone allocates on its GPU, and what the plan says."""
    from harness.ops import triton

    live, source = Live(), _FakeRows(d_model, 2 * budget.EVALUATION_BATCH)
    with _no_kernels(), live:
        phases = _phases(config, source, Runtime(GPU, _mesh_of(config), triton, StopFlag()), live)
    return Tracked(sum(rank_memory(config, d_model).values()), phases)


def _phases(config: Config, source: Any, runtime: Runtime, live: Live) -> dict[str, int]:
    from harness.training.evaluate import heldout_errors
    from harness.training.state import make_state

    shards, device, found = runtime.shards, runtime.device, {}
    state = make_state(config, source, runtime)
    found["start"] = live.since()
    shape = config.train.batch_tokens // shards.dp, source.d_model
    raw, ahead = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    _step(state, raw, runtime)
    _step(state, ahead, runtime)
    found["step"] = live.since()
    weights = state.optimizer.averaged(state.done)
    heldout_errors(state.sae, weights, source, state.normalizer, source.heldout_rows, runtime)
    del weights
    found["evaluation"] = live.since()
    weights = state.optimizer.averaged(state.done)
    for name in [] if shards.size > 1 else filter(state.is_cut, weights):
        shards.gather(weights[name])
    found["weights"] = live.since()
    return found


def _step(state: TrainState, raw: Tensor, runtime: Runtime) -> None:
    """A step. Peers are in the plans of their own runs, so the own decoder stands for theirs."""
    peers = state.config.train.peers
    if not peers:
        state.train_step(raw, runtime)
        return
    state.begin_step(runtime)
    stats = state.gradients(raw, runtime, Peers([state.params["W_dec"]] * peers, 1.0))
    state.update(stats, state.is_well(stats), runtime)
    state.end_step(runtime)


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
def _no_kernels() -> Iterator[None]:
    """Nothing is launched or sent."""
    replaced = {
        "triton.runtime.jit.JITFunction.run": lambda *_, **__: None,
        "harness.ops.triton.grouped._aligned": lambda *_: True,
        "harness.ops.triton.grouped._describable": lambda *_: False,
        "harness.ops.triton.grouped._product": lambda *_: None,
        "harness.parallel.collectives.all_reduce": lambda *_: None,
        "harness.parallel.collectives.all_to_all": lambda *_: None,
        "harness.parallel.collectives.all_gather": lambda *_: None,
        "harness.training.state.find_dead": _planned_dead,
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


def _planned_dead(sae: Sae, dead: Tensor, shards: Shards) -> DeadLatents | None:
    """As many dead latents as the plan expects."""
    count = math.ceil(budget.PLANNED_DEAD * dead.shape[0])
    if sae.aux_alpha == 0 or not count:
        return None
    groups = dead.shape[0] // sae.latents_per_expert if sae.routed else 1
    rows = torch.zeros(count // groups * groups, dtype=torch.int64, device=dead.device)
    offsets = tuple(itertools.accumulate([0, *[count // groups] * groups]))
    return DeadLatents(rows, offsets, max(1, min(sae.aux_k, count // groups)), count * shards.shard)


def shapes(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in what decides their memory, and have it decided by their configuration."""
    found: dict[str, Run] = {}
    for run in runs:
        if not (run.config.sae.traits.per_token and run.store.d_model):
            continue
        train = run.config.train
        seeds = {"seed": 0, "mfr_seeds": list(range(len(train.mfr_seeds)))}
        train = dataclasses.replace(train, **seeds, lr=0.0, lr_factor=1.0, warmup_tokens=0.0)
        found.setdefault(repr((run.config.sae, train, run.config.mesh)), run)
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.bench.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--study", default="", metavar="NAME|FILE")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return _compare(arguments.study, arguments.overrides)
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST


def _compare(name: str, overrides: Sequence[str]) -> int:
    """Print the table. Raises `UserError`."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("the kernels of a GPU need the package triton; pip install triton")
    study = load_study(name) if name else None
    request = Request([*overrides, "cluster=slurm", "cluster.gpu_type=h100"], study)
    runs = shapes(plan_runs(requested_cells(request), dry_run=True))
    rows, apart = [], 0
    for cell, run in zip(cell_names([to_container(run.config) for run in runs]), runs, strict=True):
        found = track(run.config, run.store.d_model or 0)
        parts = [f"{si(found.phases[phase])}B" for phase in PHASES]
        mesh = f"{run.config.mesh.dp} × {run.config.mesh.shard}"
        ratio = found.planned / found.peak
        apart += abs(ratio - 1) > TOLERANCE
        rows.append([cell, mesh, *parts, f"{si(found.planned)}B", f"{ratio:.2f}"])
    print(table(["cell", "mesh", *PHASES, "planned", "planned / peak"], rows))
    return FAILED if apart else 0


if __name__ == "__main__":
    run_command(main)
