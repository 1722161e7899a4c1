"""One shape: start the contenders, check that they compute the same step, time them in turn, and compare."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness import budget
from harness.bench.contender import Process
from harness.bench.shapes import Shape
from harness.config import SaeConfig
from harness.errors import UserError
from harness.terminal import say

WARM_UP = 2
"""Rounds that are not counted; the first compiles our kernels."""
SWITCH_PEERS = ("bionemo_like",)
"""Peers that have a Switch SAE."""


CPU = torch.device("cpu")


def random_data(shape: Shape, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Initial weights (encoder = decoder, unit rows) and a batch whose spectrum falls off like a model's."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = draw(shape.n, shape.d)
    weight /= weight.norm(dim=1, keepdim=True)
    tensors = {
        "W_enc": weight,
        "W_dec": weight.clone(),
        "b_enc": torch.zeros(shape.n, device=device),
        "b_dec": torch.zeros(shape.d, device=device),
        "x": draw(shape.batch, shape.d) * torch.arange(1, shape.d + 1, device=device) ** -0.25,
    }
    if shape.experts > 1:
        tensors |= {"W_r": draw(shape.experts, shape.d) / shape.d**0.5, "b_r": torch.zeros(shape.d, device=device)}
    return tensors


def write_data(shape: Shape, path: Path) -> None:
    """`random_data` for contenders in other processes."""
    save_file(random_data(shape), path)


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": middle, "q1": low, "q3": high}


def floor_ms(shape: Shape, gemm_ms: float, bytes_per_s: float, element_bytes: int) -> float:
    """The least a step can take with this product and this bandwidth (docs/performance.md): the encoder product and
    `budget.floor_bytes`."""
    sae = SaeConfig("switch" if shape.experts > 1 else "topk", shape.n, shape.k, shape.experts)
    return gemm_ms + 1e3 * budget.floor_bytes(sae, shape.d, shape.batch, element_bytes) / bytes_per_s


def gradient_difference(ours: Path, theirs: Path) -> float:
    """Largest relative distance (Frobenius) of the matrices' gradients. Losses differ by a constant factor, which is
    fitted first."""
    worst = 0.0
    expected = load_file(ours)
    for name, gradient in load_file(theirs).items():
        their, our = gradient.double(), expected[name].double()
        factor = (their * our).sum() / their.square().sum()
        worst = max(worst, float((factor * their - our).norm() / our.norm()))
    return worst


def measure(
    shape: Shape,
    peers: dict[str, list[str]],
    settings: dict[str, Any],
    rounds: int,
    variants: Sequence[bool] = (False, True),
) -> dict[str, Any]:
    """One entry of `results`. `peers`: name → command of its worker; a Switch shape has only `SWITCH_PEERS`.

    Each peer runs as published, with its `steel` settings, or both: `variants`. All contenders hold their memory at the
    same time, so a large shape on one GPU takes few peers at once.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = Path(folder) / "data.safetensors"
        write_data(shape, data)
        task = settings | {"data": str(data), "d": shape.d, "n": shape.n, "k": shape.k, "experts": shape.experts}
        ours = stack.enter_context(Process("ours", [sys.executable, "-m", "harness.bench.ours"], task))
        others = {}
        for name, command in peers.items():
            if shape.experts > 1 and name not in SWITCH_PEERS:
                continue
            for steel in variants:
                label = f"{name}_steel" if steel else name
                peer_task = task | {"peer": name, "steel": steel}
                others[label] = stack.enter_context(Process(label, command, peer_task))
        ours.ask("gradients", Path(folder) / "ours.safetensors")
        differences = {}
        for label in _ask_all(others, "gradients", Path(folder)):
            differences[label] = gradient_difference(
                Path(folder) / "ours.safetensors", Path(folder) / f"{label}.safetensors"
            )
        samples: dict[str, list[float]] = {}
        for number in range(WARM_UP + rounds):
            answers = [("", ours.ask("round"))]
            answers += [(f"{label}.", answer) for label, answer in _ask_all(others, "round").items()]
            if number >= WARM_UP:
                for prefix, answer in answers:
                    for key, value in answer.items():
                        samples.setdefault(prefix + key, []).append(value)
        peaks = _ask_all(others, "peak")
        own_peak = ours.ask("peak")
    return entry(shape, settings, samples, own_peak, peaks, differences)


def _ask_all(peers: dict[str, Process], command: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The peers' answers, in turn. A peer that dies (say, out of memory) is reported and removed from `peers`."""
    answers = {}
    for label, process in list(peers.items()):
        try:
            answers[label] = process.ask(command, *([] if folder is None else [folder / f"{label}.safetensors"]))
        except UserError as error:
            say(f"continuing without {label}: {error}")
            del peers[label]
    return answers


def entry(
    shape: Shape,
    settings: dict[str, Any],
    samples: dict[str, list[float]],
    own_peak: dict[str, Any],
    peaks: dict[str, dict[str, Any]],
    differences: dict[str, float],
) -> dict[str, Any]:
    """One entry of `results` (docs/performance.md). `samples`: answers of `Contender.round` by name, a peer's after
    `<peer>.`; `peaks` and `differences` by peer."""
    middle = {key: statistics.median(values) for key, values in samples.items()}
    floor = floor_ms(shape, middle["gemm_ms_shape"], middle["bytes_per_s"], 2 if settings["precision"] == "bf16" else 4)
    # ratios within a round, so that a change of the machine's speed between rounds cancels
    ratio = [own / product for own, product in zip(samples["step_ms"], samples["gemm_ms_shape"], strict=True)]
    peers = {}
    for label, peak in peaks.items():
        theirs = samples[f"{label}.step_ms"]
        peers[label] = {
            "step_ms": statistics.median(theirs),
            "step_ms_spread": spread(theirs),
            "ours_is_faster_by": statistics.median(t / o for t, o in zip(theirs, samples["step_ms"], strict=True)),
            "gradient_difference": differences[label],
            **peak,
        }
    names = ("step_ms", "gemm_ms_shape", "select_ms", "decode_ms", "backward_ms", "optimizer_ms", "other_ms")
    names = (*names, "auxk_extra_ms")
    with_dead = [1 + extra / own for extra, own in zip(samples["auxk_extra_ms"], samples["step_ms"], strict=True)]
    on_gpu: dict[str, float] = {}
    if "graph_ms" in middle:
        on_gpu["graph_ms"] = middle["graph_ms"]
        on_gpu["graph_pct_of_floor"] = 100 * floor / middle["graph_ms"]
        fastest = min(middle["step_ms"], middle["graph_ms"])
        with_dead_ms = middle["step_ms"] + middle["auxk_extra_ms"]
        if "graph_with_dead_ms" in middle:
            on_gpu["graph_with_dead_ms"] = middle["graph_with_dead_ms"]
        on_gpu["auxk_over_fastest"] = min(with_dead_ms, on_gpu.get("graph_with_dead_ms", with_dead_ms)) / fastest
    if "selection_ms" in middle:
        selection, topk = middle["selection_ms"], middle["torch_topk_ms"]
        on_gpu |= {
            "selection_ms": selection,
            "torch_topk_ms": topk,
            "selection_over_topk": topk / selection,
            # select is the encoder, then the selection
            "encoder_pct_of_cublas": 100 * middle["gemm_ms_shape"] / (middle["select_ms"] - selection),
        }
    return {
        "shape": shape.name,
        "d": shape.d,
        "n": shape.n,
        "k": shape.k,
        "batch": shape.batch,
        "n_experts": shape.experts,
        "precision": settings["precision"],
        "dead": settings["dead"],
        **{name: middle[name] for name in names},
        **on_gpu,
        "step_ms_spread": spread(samples["step_ms"]),
        "auxk_step_ratio": statistics.median(with_dead),
        "step_over_gemm": statistics.median(ratio),
        "tokens_per_s": 1e3 * shape.batch / middle["step_ms"],
        "bandwidth_GB_per_s": middle["bytes_per_s"] / 1e9,
        "floor_ms": floor,
        "pct_of_floor": 100 * floor / middle["step_ms"],
        **own_peak,
        "rounds": len(samples["step_ms"]),
        "peers": peers,
    }
