"""Training itself on a GPU: graphs, waits, memory, NCCL, and a sweep that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.activations.open import open_source
from harness.activations.synthetic import Synthetic
from harness.bench.gpu.setting import Setting, free
from harness.config import Config, from_container
from harness.cost.estimate import rank_memory
from harness.parallel import Shards, Solo
from harness.parallel.mesh import Ranks, mesh
from harness.places.ranks import free_port
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.training.state import TrainState, make_state


def small_config(setting: Setting, auxk: bool = False, **changes: Any) -> Config:
    """A TopK cell on synthetic activations at S1, or a toy."""
    shape = setting.shape("S1")
    container: dict[str, Any] = {
        "sae": {"architecture": "topk", "n_latents": shape.n, "k": shape.k} | ({} if auxk else {"aux_alpha": 0.0}),
        "activations": {
            "kind": "synthetic",
            "heldout_tokens": 1000,
            "synthetic": {"d_model": shape.d, "n_features": 4 * shape.d, "active_features": 8.0},
        },
        "train": {
            "tokens": 1000 * shape.batch,
            "batch_tokens": shape.batch,
            "precision": "fp32" if setting.dry else "bf16",
            **changes,
        },
        "tracker": {"name": "none"},
    }
    return from_container(container)


def prepared(
    setting: Setting, config: Config, source: Synthetic, shards: Shards | None = None
) -> tuple[TrainState, Runtime]:
    runtime = Runtime(setting.device, shards or Solo(), setting.ops, StopFlag())
    return make_state(config, source, runtime), runtime


def loop(setting: Setting) -> None:
    """The training step itself: CUDA graph against eager, waits for the device, memory against the plan, NCCL."""
    config = small_config(setting)
    source = open_source(config.activations, setting.out, progress=False, stop=StopFlag())
    assert isinstance(source, Synthetic)
    batch_tokens, steps = config.train.batch_tokens, 3 if setting.dry else 12
    with source.stream(0, batch_tokens, setting.device) as stream:
        batches = [batch for _, batch in zip(range(4), stream.batches(0), strict=False)]

        def train(config: Config, shards: Shards | None = None) -> tuple[TrainState, float, int]:
            """A state after `steps` steps, milliseconds of a step, and the peak of the bytes that it added."""
            free(setting)
            held = 0 if setting.dry else torch.cuda.memory_allocated()
            state, runtime = prepared(setting, config, source, shards)
            state.silent[::20] = round(config.sae.dead_after_tokens)  # for AuxK, if there is one
            for number in range(steps):
                state.train_step(batches[number % len(batches)], runtime)
            peak = 0 if setting.dry else torch.cuda.max_memory_allocated() - held
            tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
            ms = setting.milliseconds(lambda: state.train_step(batches[0], runtime), 30)
            for name, tensor in state.tensors().items():
                tensor.copy_(tensors[name])
            return state, ms, peak

        eager, eager_ms, peak = train(config)
        if not setting.dry:
            setting.record("loop.memory", memory(config, eager, peak))
            other, runtime = prepared(setting, config, source)
            setting.record("loop.waits_per_step", waits(other, batches[0], runtime))
            del other
        setting.record("loop.eager_ms", eager_ms)
        graph, graph_ms, _ = train(small_config(setting, cuda_graph=True))
        setting.record("loop.graph_ms", graph_ms)
        setting.record("loop.graph_equals_eager", same_bits(eager, graph))
        del graph
        ends = []
        for cuda_graph in (False, True):
            state, ms, _ = train(small_config(setting, auxk=True, cuda_graph=cuda_graph))
            setting.record(f"loop.auxk_{'graph' if cuda_graph else 'eager'}_ms", ms)
            ends.append(state)
        setting.record("loop.auxk_graph_equals_eager", same_bits(*ends))
        del ends, state
        if not setting.dry:
            ranks = Ranks(0, 1, 0, ("127.0.0.1", free_port()))
            with mesh(1, 1, setting.device, ranks, even_alone=True) as shards:
                nccl, nccl_ms, _ = train(config, shards)
                setting.record("loop.nccl_ms", nccl_ms)
                setting.record("loop.nccl_equals_one_process", same_bits(eager, nccl))


def same_bits(one: TrainState, other: TrainState) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def memory(config: Config, state: TrainState, peak: int) -> dict[str, float]:
    """Planned and measured peak of the device, bytes."""
    planned = sum(rank_memory(config, state.sae.d_model).values())
    return {"planned_bytes": planned, "measured_bytes": peak, "planned_over_measured": planned / peak}


def waits(state: TrainState, batch: Tensor, runtime: Runtime) -> float:
    """Times that the host waits for the device in a step."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                state.train_step(batch, runtime)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught) / 4


def sweep(setting: Setting) -> None:
    """Two runs from the command line, killed with SIGKILL in the middle of the first, then resumed to their end."""
    settings = {
        "sae": "topk,switch",
        "sae.n_latents": 256 if setting.dry else 4096,
        "sae.k": 8,
        "activations": "synthetic",
        "activations.heldout_tokens": 4000,
        "train.tokens": 40_000 if setting.dry else 500_000,
        "train.device": setting.device.type,
        "train.log_every_steps": 2,
        "train.checkpoint_every_steps": 4,
        "tracker": "none",
        "sweep": "gpu-check",
        "out": setting.out,
    }
    command = [sys.executable, "-m", "harness.launch", *(f"{name}={value}" for name, value in settings.items())]
    with (setting.out / "sweep.txt").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while first.poll() is None and not lines_logged(setting.out / "gpu-check") > 3:
            time.sleep(0.05)
        killed = first.poll() is None
        if killed:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        begin = time.monotonic()
        second = subprocess.run(command, stdout=log, stderr=log)
    done = [path.parent.name for path in setting.out.glob("gpu-check/*/result.json")]
    seconds = time.monotonic() - begin
    result = {"killed_on_the_way": killed, "exit_code": second.returncode, "resumed_s": seconds, "results": len(done)}
    setting.record("sweep", result)


def lines_logged(sweep: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in sweep.glob("*/metrics.jsonl"))
