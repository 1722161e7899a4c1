"""One rank of the mesh benchmark: `python -m harness.bench.mesh_rank TASK`, TASK as JSON; rank 0 answers on stdout.

Measures the network alone, and training steps of one SAE with the time spent inside its exchanges.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from harness import budget
from harness.activations.open import open_source
from harness.activations.synthetic import Synthetic
from harness.config import Config, from_container
from harness.ops import choose_ops
from harness.parallel import Axis, Kind, Shards
from harness.parallel.mesh import mesh
from harness.parallel.probe import Exchange, exchange_seconds
from harness.places.ranks import end_with_starter
from harness.process.device import pick_device
from harness.process.rank import ranks_from_environment
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.training.state import make_state

PROBE_NUMBERS = (1 << 12, 1 << 20)
"""float32 numbers per probe: 16 KiB and 4 MiB."""
WARM_UP = 3


class Timed:
    """A mesh that adds up, by kind, bytes sent and seconds in its exchanges, waiting for other ranks included."""

    def __init__(self, shards: Shards, device: torch.device) -> None:
        self._shards, self._device = shards, device
        self.spent: dict[Kind, float] = {}
        self.calls: dict[Kind, int] = {}
        self.sent: dict[Kind, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shards, name)

    def clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def keep(self, values: Tensor, k: int, kind: Kind) -> Tensor:
        begin = self.clock()
        kept = self._shards.keep(values, k, kind)
        self._add(kind, begin, self._shards.shard)
        return kept

    def sum_(self, tensor: Tensor, over: Axis, kind: Kind) -> Tensor:
        begin = self.clock()
        self._shards.sum_(tensor, over, kind)
        sizes = {"shard": self._shards.shard, "dp": self._shards.dp, "all": self._shards.size}
        self._add(kind, begin, sizes[over])
        return tensor

    def take_sent(self) -> dict[Kind, float]:
        sent = self._shards.take_sent()
        for kind, count in sent.items():
            self.sent[kind] = self.sent.get(kind, 0.0) + count
        return sent

    def _add(self, kind: Kind, begin: float, ranks: int) -> None:
        if ranks == 1:
            return
        self.spent[kind] = self.spent.get(kind, 0.0) + self.clock() - begin
        self.calls[kind] = self.calls.get(kind, 0) + 1


def config_of(task: dict[str, Any]) -> Config:
    """The configuration whose step is measured; no AuxK, since its bytes depend on how many latents are dead."""
    switch = task["n_experts"] > 1
    sae = {"architecture": "switch" if switch else "topk", "n_latents": task["n"], "k": task["k"], "aux_alpha": 0.0}
    if switch:
        sae |= {"n_experts": task["n_experts"], "balance_weight": 0.03}
    synthetic = {"d_model": task["d"], "n_features": 2 * task["d"]}
    return from_container(
        {
            "sae": sae,
            "activations": {"kind": "synthetic", "synthetic": synthetic},
            "train": {"tokens": 1e9, "batch_tokens": task["batch"], "lr": 1e-4, "device": task["device"]}
            | {"precision": task["precision"]},
            "mesh": {"dp": task["dp"], "shard": task["shard"]},
            "ops": task["ops"],
            "tracker": {"name": "none"},
        }
    )


def network(shards: Shards, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """By kind of exchange: seconds for 16 KiB, and bytes per second that a rank sends when it is 4 MiB."""
    rates = {}
    kinds: tuple[tuple[Exchange, int], ...] = (("all_reduce", 2), ("all_to_all", 1))
    for kind, passes in kinds:
        seconds = [statistics.median(exchange_seconds(kind, n, device, rounds)) for n in PROBE_NUMBERS]
        sent = [passes * 4 * n * (shards.size - 1) / shards.size for n in PROBE_NUMBERS]
        rates[kind] = {"small_s": seconds[0], "small_bytes": sent[0], "bytes_per_s": sent[1] / seconds[1]}
    return rates


def measure(task: dict[str, Any], shards: Shards, device: torch.device) -> dict[str, Any]:
    """Milliseconds and bytes of a step on this mesh, as this rank sees them."""
    config = config_of(task)
    source = open_source(config.activations, task["out"], progress=False, stop=StopFlag())
    assert isinstance(source, Synthetic)
    ops, timed = choose_ops(config.ops, device), Timed(shards, device)
    runtime = Runtime(device, shards, ops, StopFlag())
    state = make_state(config, source, runtime)
    stream = source.stream(0, task["batch"], device, shards.dp_rank, shards.dp)
    batches = [stream.batch(step) for step in range(2)]
    for step in range(WARM_UP):
        state.train_step(batches[step % 2], runtime)
    shards.take_sent()
    seconds = []
    for step in range(task["rounds"]):
        shards.barrier()
        begin = timed.clock()
        state.train_step(batches[step % 2], runtime._replace(shards=timed))  # pyright: ignore[reportArgumentType]  (it forwards the rest)
        seconds.append(timed.clock() - begin)
    rounds = task["rounds"]
    timed.take_sent()
    formula = budget.bytes_sent_per_step(config, task["d"])
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "step_ms": 1e3 * quartiles[1],
        "step_ms_spread": {"q1": 1e3 * quartiles[0], "q3": 1e3 * quartiles[2]},
        "exchanges": {
            kind: {
                "calls": timed.calls[kind] / rounds,
                "ms": 1e3 * spent / rounds,
                "bytes": timed.sent.get(kind, 0.0) / rounds,
                "formula_bytes": formula.get(kind, 0.0),
            }
            for kind, spent in timed.spent.items()
        },
    }


def main() -> None:
    end_with_starter()
    task = json.loads(sys.argv[1])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    ranks = ranks_from_environment()
    device = pick_device(task["device"], ranks.local_rank)
    with mesh(task["dp"], task["shard"], device, ranks) as shards:
        answer: dict[str, Any] = {"results": [measure(task | shape, shards, device) for shape in task["shapes"]]}
        if shards.size > 1:
            answer["network"] = network(shards, device, task["rounds"])
        if shards.rank == 0:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
