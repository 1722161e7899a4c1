"""The benchmark's arguments, table and files."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from harness.bench.measure import measure
from harness.bench.picture import draw
from harness.bench.shapes import parse_shapes
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.ops import choose_ops

PEERS = ("sparsify", "dictionary_learning", "saelens", "openai")
GPU_PEERS = ("openai",)
"""Those that have no CPU code."""
WORKER = Path(__file__).with_name("peer_worker.py")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def installed_peers(python: Path, wanted: list[str]) -> dict[str, list[str]]:
    """Commands of the workers of those wanted peers that are installed in their environment."""
    if not wanted:
        return {}
    if not python.exists():
        print(f"no peers: {python} is not there (make bench-peers)", file=sys.stderr)
        return {}
    listed = subprocess.run([str(python), str(WORKER), "installed"], capture_output=True, text=True, check=True)
    found = listed.stdout.split()
    for name in wanted:
        if name not in found:
            print(f"no {name}: not installed beside {python} (make bench-peers)", file=sys.stderr)
    return {name: [str(python), str(WORKER)] for name in wanted if name in found}


def add_comparisons(results: list[dict[str, Any]]) -> None:
    """To the last result, if it is of a Switch SAE: how much longer the TopK of its size took, if that was measured."""
    last = results[-1]
    for other in results[:-1] if last["n_experts"] > 1 else ():
        if other["n_experts"] == 1 and all(other[key] == last[key] for key in ("d", "n", "k", "batch")):
            last["topk_over_switch"] = other["step_ms"] / last["step_ms"]


def table(results: list[dict[str, Any]]) -> str:
    """For the terminal: one line per shape, and one per peer."""
    lines = [
        f"{'shape':12} {'step ms':>9} {'/ product':>9} {'% floor':>7} {'select':>8} {'decode':>8} {'backward':>8} "
        f"{'optim':>7} {'rest':>6} {'tokens/s':>9} {'peak MB':>8}"
    ]
    for r in results:
        lines.append(
            f"{r['shape']:12} {r['step_ms']:9.1f} {r['step_over_gemm']:9.2f} {r['pct_of_floor']:7.0f} "
            f"{r['select_ms']:8.1f} {r['decode_ms']:8.1f} {r['backward_ms']:8.1f} {r['optimizer_ms']:7.1f} "
            f"{r['other_ms']:6.1f} {r['tokens_per_s']:9.0f} {r['peak_mem_bytes'] / 1e6:8.0f}"
        )
        if "torch_topk_ms" in r:
            lines.append(
                f"  {'selection alone':30} {r['selection_ms']:9.2f} ms   torch.topk takes "
                f"{r['selection_over_topk']:.1f} times as long   "
                f"the encoder runs at {r['encoder_pct_of_cublas']:.0f} % of cuBLAS"
            )
        if "topk_over_switch" in r:
            lines.append(f"  {'TopK of the same size':30} takes {r['topk_over_switch']:.2f} times as long")
        if r["dead"]:
            lines.append(
                f"  {'AuxK, ' + format(r['dead'], '.0%') + ' dead':30} {r['auxk_extra_ms']:9.1f} ms more"
                f"   a step takes {r['auxk_step_ratio']:.2f} times as long"
            )
        lines += [
            f"  {name + ' ' + p['version']:30} {p['step_ms']:9.1f} ms   ours is {p['ours_is_faster_by']:.2f}× faster   "
            f"gradients differ by {p['gradient_difference']:.1e}   peak {p['peak_mem_bytes'] / 1e6:.0f} MB"
            for name, p in r["peers"].items()
        ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m harness.bench", description=__doc__)
    add = result.add_argument
    add("--shapes", default="C1,C2,C3,C3-E8", help="names, or DxNxKxB[xE], separated by commas")
    add("--json", type=Path, metavar="FILE", help="write the results here")
    add("--picture", type=Path, metavar="FILE", help="draw the results here (.svg, .png)")
    add("--rounds", type=int, default=11, help="steps per contender, taken in turn")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32")
    add("--ops", choices=("auto", "reference", "cpu", "triton"), default="auto", help="our kernels")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add(
        "--dead", type=float, help="share of latents that are dead: what AuxK adds to a step (ours only); 0.05 on a GPU"
    )
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    add(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: CPU time, for a machine that others use too; only with --threads 1 on a CPU",
    )
    add("--peers", default=",".join(PEERS), help="which of the installed peers to run beside ours; empty for none")
    add("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="their environment")
    return result


def _resolve(arguments: argparse.Namespace) -> None:
    """Fill in what depends on the machine."""
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = arguments.device == "cuda"
    if arguments.precision == "auto":
        arguments.precision = "bf16" if on_gpu else "fp32"
    if arguments.dead is None:
        arguments.dead = 0.05 if on_gpu else 0.0
    if not on_gpu:
        arguments.peers = ",".join(name for name in arguments.peers.split(",") if name not in GPU_PEERS)


def _check(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for what would fail only after minutes, or in a contender."""
    if not 0 <= arguments.dead <= 1:
        raise UserError(f"--dead {arguments.dead} is not a share: give a number from 0 to 1")
    if arguments.rounds < 1 or arguments.threads < 0:
        raise UserError(f"--rounds {arguments.rounds} --threads {arguments.threads}: at least 1 round and 0 threads")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; leave it out, or check the driver")
    try:
        choose_ops(arguments.ops, torch.device(arguments.device))
    except ValueError as error:
        raise UserError(f"--ops {arguments.ops}: {error}") from None
    for file in (arguments.json, arguments.picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no directory {file.parent}")
        if file is not None and not os.access(file.absolute().parent, os.W_OK):
            raise UserError(f"{file} cannot be written: {file.parent} is not writable")


def main() -> int:
    """Run the command; returns its exit code. Raises `KeyboardInterrupt`, all contenders gone."""
    arguments = parser().parse_args()
    try:
        shapes = parse_shapes(arguments.shapes)
        _resolve(arguments)
        _check(arguments)
        wanted = [name for name in arguments.peers.split(",") if name]
        if unknown := set(wanted) - set(PEERS):
            raise UserError(f"unknown peers {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")
        if arguments.clock == "process" and (arguments.threads != 1 or arguments.device != "cpu"):
            raise UserError("--clock process adds up all threads and knows no GPU: use it with --threads 1 on the CPU")
        settings = {key: getattr(arguments, key) for key in ("precision", "ops", "device", "threads", "clock", "dead")}
        peers = installed_peers(arguments.peers_python, wanted)
        results = []
        for shape in shapes:
            results.append(measure(shape, peers, settings, arguments.rounds))
            add_comparisons(results)
            print(table(results[-1:]), flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        about = machine(torch.device(arguments.device), arguments.threads) | {"clock": arguments.clock}
        write_json_atomic(arguments.json, {"machine": about, "results": results})
    if arguments.picture:
        draw(results, arguments.picture)
    return 0
