"""What the step and its parts take, beside their floor and beside other people's code."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from harness.bench.command import installed_peers
from harness.bench.flashinfer_topk import TopK, flashinfer_top_k
from harness.bench.gpu.setting import Setting, free
from harness.bench.measure import entry, measure, random_data
from harness.bench.ours import Contender
from harness.bench.shapes import Shape

ROUNDS, WARM_UP = 7, 2


def device(setting: Setting) -> None:
    """What the machine is, and the two rates that a floor is made of."""
    about: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    size, numbers = (64, 1 << 10) if setting.dry else (8192, 1 << 30)
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        about |= {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        about["multiprocessors"] = properties.multi_processor_count
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
            about[fields] = answer.stdout.strip()
    setting.record("device.about", about)
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    setting.record("device.gemm_flops", 2 * size**3 / setting.milliseconds(lambda: a @ b) * 1e3)
    source, target = torch.empty(2, numbers, device=setting.device)
    moved = 2 * source.numel() * source.element_size()
    setting.record("device.copy_bytes_per_s", moved / setting.milliseconds(lambda: target.copy_(source)) * 1e3)


def measured(setting: Setting, shape: Shape, dead: float = 0.05) -> dict[str, Any]:
    """One shape, our step only: the fields of `harness.bench`."""
    free(setting)
    settings = {"precision": "fp32" if setting.dry else "bf16", "ops": "triton", "device": setting.device.type}
    settings |= {"threads": 0, "clock": "wall", "dead": dead}
    task = settings | {"d": shape.d, "n": shape.n, "k": shape.k, "experts": shape.experts}
    contender = Contender(task, random_data(shape, setting.device))
    samples: dict[str, list[float]] = {}
    warm_up, rounds = (0, 1) if setting.dry else (WARM_UP, ROUNDS)
    for number in range(warm_up + rounds):
        answer = contender.round()
        if number >= warm_up:
            for key, value in answer.items():
                samples.setdefault(key, []).append(value)
    peak = 0 if setting.dry else torch.cuda.max_memory_allocated()
    return entry(shape, settings, samples, {"peak_mem_bytes": peak, "ops": contender.ops.NAME}, {}, {})


def shapes(setting: Setting) -> None:
    """Steps by part, at the shapes of the goals."""
    steps: dict[str, float] = {}
    for name in ("S1", "S3-E8", "S3-E32", "S2", "S1-131072", "S3-131072-E32"):
        result = measured(setting, setting.shape(name))
        setting.record(f"shapes.{name}", result)
        steps[name] = min(result["step_ms"], result.get("graph_ms", result["step_ms"]))
    for topk, switch in (("S1", "S3-E8"), ("S1", "S3-E32"), ("S1-131072", "S3-131072-E32")):
        setting.record(f"shapes.topk_over_switch.{switch}", steps[topk] / steps[switch])


def selection(setting: Setting) -> None:
    """Selection alone against torch.topk and FlashInfer, on Gaussian rows and on rows after ReLU."""
    flashinfer = flashinfer_top_k() if setting.device.type == "cuda" else "needs a GPU"
    if isinstance(flashinfer, str):
        setting.record("selection.flashinfer", f"not compared: {flashinfer}")
    for name, (tokens, width, k) in {
        "S1": (8192, 32_768, 32),
        "S2": (16_384, 131_072, 64),
        "S7": (4096, 129_024, 32),
        "gao2024": (512, 2_097_152, 512),
    }.items():
        if setting.dry:
            tokens, width, k = 8, 256, 4
        free(setting)
        rows = torch.randn(tokens, width, device=setting.device, dtype=torch.bfloat16)
        for kind in ("gaussian", "relu"):
            rows = rows if kind == "gaussian" else rows.relu_()
            setting.record(f"selection.{name}.{kind}", selection_figures(setting, rows, k, flashinfer))


def selection_figures(setting: Setting, rows: Tensor, k: int, flashinfer: TopK | str) -> dict[str, float]:
    """Times of our selection and of others, and how much faster ours is."""
    ours = setting.milliseconds(lambda: setting.ops.select_preactivations(rows, k))
    figures = {"ms": ours, "bytes_per_s": 1e3 * rows.numel() * rows.element_size() / ours}
    others: dict[str, Callable[[], object]] = {"torch_topk": lambda: torch.topk(rows, k, dim=1, sorted=False)}
    if not isinstance(flashinfer, str):
        others["flashinfer"] = lambda: flashinfer(rows, k)
    for name, work in others.items():
        figures[f"{name}_ms"] = setting.milliseconds(work, 3)
        figures[f"over_{name}"] = figures[f"{name}_ms"] / ours
    return figures


def shard(setting: Setting) -> None:
    """One of eight ranks of an SAE with 1,032,192 latents at d = 2688."""
    setting.record("shard.S7", measured(setting, setting.shape("S7")))


def peers(setting: Setting) -> None:
    """Other people's training steps at S1, those that can be imported."""
    free(setting)
    names = ["openai", "sparsify", "dictionary_learning", "bionemo_like", "flashsae_like"]
    found = {} if setting.dry else installed_peers(Path(sys.executable), names)
    setting.record("peers.compared", sorted(found))
    settings = {"precision": "bf16", "ops": "triton", "device": "cuda", "threads": 0, "clock": "wall", "dead": 0.0}
    if "bionemo_like" in found:
        moe = measure(setting.shape("S3-E8"), {"bionemo_like": found["bionemo_like"]}, settings, 5)
        setting.record("peers.bionemo_like_moe", moe["peers"])
    for name, command in found.items():
        setting.record(f"peers.{name}", measure(setting.shape("S1"), {name: command}, settings, 5)["peers"])
