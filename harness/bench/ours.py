"""Our step as a contender. Also measures the parts of its floor in the same process.

Reads one JSON line with the task, then commands, and answers each with one JSON line; see `contender`.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.bench.settled import dense_relu_step, settled
from harness.config import TrainConfig
from harness.ops import Ops, choose_ops
from harness.parallel import Solo
from harness.process import memory
from harness.process.runtime import alone
from harness.saes import DeadLatents, find_dead, step
from harness.training.graph import StepGraph
from harness.training.optimizer import Optimizer
from harness.training.state import COMPUTE

LR = 1e-4
SPARSITY = 1e-3
"""λ·V of architectures with a penalty: small, so that L0 stays."""
SHORT_MS = 250.0
"""Shorter work is done twice, and the second time counts; so it is for the peers (`peer_worker`)."""
PARTS = {
    "select_ms": ("select", "select_above"),
    "decode_ms": ("reconstruct", "reconstruct_nested", "latent_grads"),
    "backward_ms": ("weight_grads", "nested_weight_grads", "latent_sums"),
}
"""Which operations make up a part of the step."""
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
COPY_BYTES = 1 << 28
"""Bytes read and written by the copy that measures bandwidth on a CPU, an eighth of those on a GPU: far more than any
cache."""

GPU_REPEATS = 5
"""Work is queued this many times between two events on a GPU, and the mean counts: training queues steps too."""


class Timed:
    """A kernel set that notes a mark before and after each operation."""

    def __init__(self, ops: Ops, mark: Callable[[], Any]) -> None:
        self._ops, self._mark = ops, mark
        self.marks: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            result = operation(*args, **kwargs)
            self.marks.append((name, begin, self._mark()))
            return result

        return timed


class Contender:
    """One SAE in training on one batch."""

    def __init__(self, task: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """`tensors`: initial weights and the batch `x` (`measure.random_data`)."""
        task = {"architecture": "switch" if task["experts"] > 1 else "topk", "variant": ""} | task
        self.device = torch.device(task["device"])
        tensors = {name: value.to(self.device) for name, value in tensors.items()}
        self.x = tensors.pop("x")
        n, experts = task["n"], task["experts"]
        self.sae, self.params = settled(task, tensors, self.x)
        silent = torch.rand(n, generator=torch.Generator().manual_seed(1)) < task["dead"]
        self.ops = choose_ops(task["ops"], self.device)
        self.dead = find_dead(self.sae, silent.to(self.device), Solo(), self.ops)
        train, compute = TrainConfig(tokens=1e6), COMPUTE[task["precision"]]
        self.optimizer = Optimizer(self.sae, self.params, train, compute)
        self.taken, self.dense = 0, task["variant"] == "dense"
        self._last: dict[str, float] = {}
        self._seconds = CLOCKS[task["clock"]]
        self._product = self._encoder_product(compute, experts)
        self._graphed = self.graphed()
        self._copied_bytes = COPY_BYTES * (8 if self.device.type == "cuda" else 1)
        self._copy = torch.empty(2, self._copied_bytes // 8, device=self.device)

    def mark(self) -> Any:
        """A point in time: milliseconds of the chosen clock, on a GPU an event in the queue."""
        if self.device.type != "cuda":
            return 1e3 * self._seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds from one mark to the other."""
        if self.device.type != "cuda":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end)

    def gradients(self, ops: Ops, dead: DeadLatents | None = None) -> Tensor:
        """Loss of the batch; leaves the gradients in the optimiser."""
        optimizer = self.optimizer
        runtime = alone(self.device, ops)
        if self.dense:
            return dense_relu_step(self.params, self.x, SPARSITY, optimizer.grads)
        return step(
            self.sae,
            self.params,
            optimizer.compute,
            self.x,
            runtime,
            dead,
            optimizer.grads,
            sparsity=SPARSITY / self.sae.variance,
            done=1 + self.taken,
        ).loss

    def take_step(self, ops: Ops, dead: DeadLatents | None = None) -> tuple[Any, Any]:
        """One whole training step; returns the marks around its optimiser part."""
        loss = self.gradients(ops, dead)
        self.taken += 1
        begin = self.mark()
        self.optimizer.apply(LR, self.taken, loss.isfinite(), alone(self.device, ops))
        return begin, self.mark()

    def graphed(self) -> Callable[[DeadLatents | None], None] | None:
        """The step as a CUDA graph, as training replays it; None without a GPU."""
        if self.device.type != "cuda" or self.ops.NAME != "triton":
            return None
        runtime, listed = alone(self.device, self.ops), None
        self.optimizer.rates = torch.empty(2, device=self.device)

        def compute(_: Tensor) -> None:
            self.optimizer.apply(LR, 1, self.gradients(self.ops, listed).isfinite(), runtime)

        graph = StepGraph(compute, self.x)

        def replay(dead: DeadLatents | None) -> None:
            nonlocal listed
            listed = dead
            self.taken += 1
            self.optimizer.set_rates(LR, self.taken)
            graph(self.x, dead is None)

        return replay

    def round(self) -> dict[str, float]:
        """Milliseconds of the bare product, of one step, of its parts (in a second step), and of what AuxK adds when
        latents are dead; bandwidth in bytes/s."""
        product_ms = self._steady("product", self._product)
        step_ms = self._steady("step", lambda: self.take_step(self.ops))
        end = self.mark()
        timed = Timed(self.ops, self.mark)
        optimizer = self.take_step(timed)  # pyright: ignore[reportArgumentType]  (forwards every operation)
        parts_end = self.mark()
        spent: dict[str, float] = {}
        for name, begin, ended in timed.marks:
            spent[name] = spent.get(name, 0.0) + self.between(begin, ended)
        copy_ms = self._steady("copy", lambda: self._copy[1].copy_(self._copy[0]))
        with_dead_ms = step_ms
        if self.dead is not None:
            with_dead_ms = self._steady("dead", lambda: self.take_step(self.ops, self.dead))
        parts = {part: sum(spent.get(operation, 0.0) for operation in operations) for part, operations in PARTS.items()}
        parts["optimizer_ms"] = self.between(*optimizer)
        return {
            "gemm_ms_shape": product_ms,
            "step_ms": step_ms,
            **parts,
            "other_ms": self.between(end, parts_end) - sum(parts.values()),
            "auxk_extra_ms": with_dead_ms - step_ms,
            "bytes_per_s": 1e3 * self._copied_bytes / copy_ms,
            **self._graph_ms(),
            **self._selection(),
        }

    def _graph_ms(self) -> dict[str, float]:
        """Milliseconds of the step as a CUDA graph, also with dead latents where their lists can be recorded."""
        replay = self._graphed
        if replay is None:
            return {}
        times = {"graph_ms": self._steady("graph", lambda: replay(None))}
        if self.dead is not None and self.dead.barred is not None:
            times["graph_with_dead_ms"] = self._steady("graph with dead", lambda: replay(self.dead))
        return times

    def _selection(self) -> dict[str, float]:
        """On a GPU: the selection alone, from the bare product's output, and `torch.topk` on the same numbers."""
        if self.device.type != "cuda":
            return {}
        z, k, ops = self._preactivations.flatten(0, 1), self.sae.k, self.ops
        return {
            "selection_ms": self._steady("selection", lambda: ops.select_preactivations(z, k)),
            "torch_topk_ms": self._steady("topk", lambda: torch.topk(z, k, dim=1, sorted=False)),
        }

    def _steady(self, name: str, work: Callable[[], object]) -> float:
        """Milliseconds of `work`. Short work is done twice, and the second time counts: after the other contenders'
        turns caches are cold and threads asleep, unlike in training."""
        repeats = GPU_REPEATS if self.device.type == "cuda" else 1
        for _ in range(2 if self._last.get(name, SHORT_MS) < SHORT_MS else 1):
            begin = self.mark()
            for _ in range(repeats):
                work()
            self._last[name] = self.between(begin, self.mark()) / repeats
        return self._last[name]

    def _encoder_product(self, dtype: torch.dtype, experts: int) -> Callable[[], object]:
        """The bare encoder product of this shape and dtype, output preallocated; for Switch its grouped form, with
        the tokens spread evenly."""
        x, weight = self.x.to(dtype), self.params["W_enc"].to(dtype)
        rows, width = x.shape[0] // experts, weight.shape[0] // experts
        grouped = x[: rows * experts].view(experts, rows, -1)
        weights = weight.view(experts, width, -1)
        out = self._preactivations = torch.empty(experts, rows, width, dtype=dtype, device=self.device)

        def product() -> None:
            if x.is_cuda:  # one launch, as the floor of all experts
                torch.bmm(grouped, weights.transpose(1, 2), out=out)
                return
            for expert in range(experts):
                torch.mm(grouped[expert], weights[expert].T, out=out[expert])

        return product


def peak_bytes(device: torch.device, before: int) -> int:
    """Peak memory of this process above what it held before the data came, or of the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory.peak_bytes() - before


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently if nobody waits for an answer any more
    first = sys.stdin.readline()
    if not first.endswith("\n"):
        return  # the driver ended before it sent the task
    task = json.loads(first)
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    before = psutil.Process().memory_info().rss
    contender = Contender(task, load_file(task["data"]))
    for line in sys.stdin:
        command = line.split()
        answer: dict[str, Any] = {}
        if command[0] == "round":
            answer = contender.round()
        elif command[0] == "gradients":
            contender.gradients(contender.ops)
            save_file({name: grad.cpu().contiguous() for name, grad in contender.optimizer.grads.items()}, command[1])
        elif command[0] == "peak":
            answer = {"peak_mem_bytes": peak_bytes(contender.device, before), "ops": contender.ops.NAME}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
