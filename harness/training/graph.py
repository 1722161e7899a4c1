"""A training step as a CUDA graph: recorded once, then replayed with a single call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from jaxtyping import Float
from torch import Tensor

from harness.config import Config
from harness.ops import Ops


def can_repeat(config: Config, ops: Ops) -> bool:
    """Whether a graph is asked for and these kernels do the same in all steps of a run of one process, as long as lists
    of dead latents have the same length."""
    train, sae = config.train, config.sae
    # other kernels read the learning rate on the host, so a recorded graph would keep its first value
    able = train.cuda_graph and ops.NAME == "triton" and train.precision != "fp64"
    # selections by threshold wait for the device, and Signum takes its learning rate from the host
    able = able and sae.traits.per_token and train.optimizer == "adam"
    # a graph would repeat one draw of experts, and one k
    return able and sae.routing != "random" and not sae.k_anneal_fraction


WARM_UP = 3
"""Steps of a kind on the recording's stream before recording: they compile kernels and make lasting allocations."""


class StepGraph:
    """Calls `compute(batch)`; from the fourth call of a `kind` on it replays the device work recorded for that kind.

    `compute` must always do the same device work on the same tensors for a kind. It must not wait for the device or
    change anything on the host. Every call does one step: recording executes nothing.
    """

    def __init__(self, compute: Callable[[Float[Tensor, "tokens d"]], None], like: Float[Tensor, "tokens d"]) -> None:
        self._compute, self._batch = compute, torch.empty_like(like)
        self._stream = torch.cuda.Stream(like.device)
        self._taken: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        # graphs leave nothing in their memory, and one is replayed at a time
        self._pool = torch.cuda.graph_pool_handle()

    def fits(self, batch: Float[Tensor, "tokens d"]) -> bool:
        """Whether `batch` has the recorded shape and dtype."""
        return batch.shape == self._batch.shape and batch.dtype == self._batch.dtype

    def __call__(self, batch: Float[Tensor, "tokens d"], kind: Hashable = ()) -> None:
        self._batch.copy_(batch)
        if self._taken[kind] < WARM_UP:
            self._taken[kind] += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._compute(self._batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if kind not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # the default mode forbids other threads to allocate, and the stream's thread pins memory all the time
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                self._compute(self._batch)
            self._graphs[kind] = graph
        self._graphs[kind].replay()
