"""The benchmark's arguments, table and files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from harness.bench.architectures import measure_architectures, parse_architectures
from harness.bench.architectures import text as architectures_text
from harness.bench.measure import measure
from harness.bench.picture import draw
from harness.bench.shapes import parse_shapes
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.ops import choose_ops
from harness.process.device import pick_device
from harness.record.provenance import cpu_name
from harness.terminal import Parser, say, table

REFERENCES = ("bionemo_like", "flashsae_like")
"""Peers that were written from a description, in `tests/peers`: they run in our own environment."""
PEERS = ("sparsify", "dictionary_learning", "saelens", "openai", *REFERENCES)
GPU_PEERS = ("openai", *REFERENCES)
"""Peers that are compared only on a GPU."""
TRAINERS = ("dictionary_learning", "saelens")
"""Peers with trainers of other architectures."""
WORKER = Path(__file__).with_name("peer_worker.py")
REFERENCE_WORKER = "tests.peers.worker"


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """The machine that the numbers were measured on."""
    return {
        "processor": cpu_name() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _able(names: list[str], command: list[str], where: str) -> dict[str, list[str]]:
    """Name -> `command` for the peers that can take part; says of each other one why it cannot."""
    if not names:
        return {}
    answer = subprocess.run([*command, "missing", *names], capture_output=True, text=True)
    if answer.returncode:
        problem = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        reasons: dict[str, str | None] = dict.fromkeys(names, f"its worker failed: {problem}")
    else:
        reasons = json.loads(answer.stdout)
    for name, reason in reasons.items():
        if reason is not None:
            say(f"no {name}: {reason} ({where})")
    return {name: command for name, reason in reasons.items() if reason is None}


def installed_peers(python: Path, wanted: list[str]) -> dict[str, list[str]]:
    """Name -> command of its worker, for the wanted peers that can take part.

    Packages are looked for in the environment of `python`, references in a checkout that is the current directory.
    """
    references = [name for name in wanted if name in REFERENCES]
    packages = [name for name in wanted if name not in REFERENCES]
    peers = _able(references, [sys.executable, "-m", REFERENCE_WORKER], "needs a checkout as the current directory")
    if packages and not python.exists():
        say(f"no {', '.join(packages)}: {python} does not exist (make bench-peers)")
        return peers
    return peers | _able(packages, [str(python), str(WORKER)], f"environment of {python}; make bench-peers")


def add_comparisons(results: list[dict[str, Any]]) -> None:
    """Add `topk_over_switch` to the last result if it is a Switch SAE and a TopK SAE of its size came before."""
    last = results[-1]
    for other in results[:-1] if last["n_experts"] > 1 else ():
        if other["n_experts"] == 1 and all(other[key] == last[key] for key in ("d", "n", "k", "batch")):
            last["topk_over_switch"] = other["step_ms"] / last["step_ms"]


def text(result: dict[str, Any]) -> str:
    """One entry of `results` as text for standard output: its times in a table, remarks, and a table of the peers."""
    row = {
        "shape": result["shape"],
        "step ms": f"{result['step_ms']:.1f}",
        "/ product": f"{result['step_over_gemm']:.2f}",
        "% floor": f"{result['pct_of_floor']:.0f}",
        "select ms": f"{result['select_ms']:.1f}",
        "decode ms": f"{result['decode_ms']:.1f}",
        "backward ms": f"{result['backward_ms']:.1f}",
        "optimizer ms": f"{result['optimizer_ms']:.1f}",
        "rest ms": f"{result['other_ms']:.1f}",
        "tokens/s": f"{result['tokens_per_s']:.0f}",
        "peak MB": f"{result['peak_mem_bytes'] / 1e6:.0f}",
    }
    lines = [table(list(row), [list(row.values())], optional=("rest ms", "peak MB", "optimizer ms", "decode ms"))]
    lines += [f"  {line}" for line in _remarks(result)]
    if result["peers"]:
        headings = ("  peer", "version", "step ms", "ours is faster", "gradients differ", "peak MB")
        rows = [
            (
                f"  {name}",
                peer["version"],
                f"{peer['step_ms']:.1f}",
                f"{peer['ours_is_faster_by']:.2f}×",
                f"{peer['gradient_difference']:.1e}",
                f"{peer['peak_mem_bytes'] / 1e6:.0f}",
            )
            for name, peer in result["peers"].items()
        ]
        lines.append(table(headings, rows, left=("version",), optional=("peak MB", "version")))
    return "\n".join(lines)


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = []
    if "torch_topk_ms" in result:
        lines.append(
            f"selection alone takes {result['selection_ms']:.2f} ms, torch.topk {result['selection_over_topk']:.1f} "
            f"times as long; the encoder runs at {result['encoder_pct_of_cublas']:.0f} % of cuBLAS"
        )
    if "topk_over_switch" in result:
        lines.append(f"TopK of the same size takes {result['topk_over_switch']:.2f} times as long")
    if result["dead"]:
        lines.append(
            f"AuxK with {result['dead']:.0%} dead latents adds {result['auxk_extra_ms']:.1f} ms: a step takes "
            f"{result['auxk_step_ratio']:.2f} times as long"
        )
    return lines


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="python -m harness.bench", description=__doc__)
    add = result.add_argument
    add("--shapes", default="C1,C2,C3,C3-E8", help="names, or DxNxKxB[xE], separated by commas")
    add("--json", type=Path, metavar="FILE", help="write the results here")
    add("--picture", type=Path, metavar="FILE", help="draw the results here (.svg, .png)")
    add(
        "--architectures",
        default="",
        metavar="NAMES",
        help="our architectures beside each other instead, e.g. topk,relu",
    )
    add("--rounds", type=int, default=11, help="steps per contender, taken in turn")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32")
    add("--ops", choices=("auto", "reference", "cpu", "triton"), default="auto", help="our kernels")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add("--dead", type=float, help="share of dead latents, to time what AuxK adds to a step (ours only); 0.05 on a GPU")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    add(
        "--clock",
        choices=("wall", "process"),
        default="wall",
        help="process: CPU time, for a busy machine; only with --threads 1 on a CPU",
    )
    add("--peers", default=",".join(PEERS), help="peers to compare with, if they are installed; empty for none")
    add("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="their environment")
    return result


def _resolve(arguments: argparse.Namespace) -> None:
    """Replace `auto` by what this machine has. Raises `UserError` for a GPU that it does not have."""
    try:
        arguments.device = pick_device(arguments.device).type
    except ValueError as error:
        raise UserError(str(error).replace("train.device=cuda", "--device cuda")) from None
    on_gpu = arguments.device == "cuda"
    if arguments.precision == "auto":
        arguments.precision = "bf16" if on_gpu else "fp32"
    if arguments.dead is None:
        arguments.dead = 0.05 if on_gpu else 0.0
    if not on_gpu:
        arguments.peers = ",".join(name for name in arguments.peers.split(",") if name not in GPU_PEERS)


def _check(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for settings that would fail only after minutes, or in a contender."""
    if not 0 <= arguments.dead <= 1:
        raise UserError(f"--dead {arguments.dead} is not a share: give a number from 0 to 1")
    if arguments.rounds < 1 or arguments.threads < 0:
        raise UserError(f"--rounds {arguments.rounds} --threads {arguments.threads}: at least 1 round and 0 threads")
    try:
        choose_ops(arguments.ops, torch.device(arguments.device))
    except ValueError as error:
        raise UserError(f"--ops {arguments.ops}: {error}") from None
    for file in (arguments.json, arguments.picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{file} cannot be written: {file.parent} is not a directory")
        if file is not None and not os.access(file.absolute().parent, os.W_OK):
            raise UserError(f"{file} cannot be written: {file.parent} is not writable")


def main() -> int:
    """Run the command; returns its exit code. On `KeyboardInterrupt` all contenders are ended first."""
    arguments = parser().parse_args()
    try:
        shapes = parse_shapes(arguments.shapes)
        _resolve(arguments)
        _check(arguments)
        wanted = [name for name in arguments.peers.split(",") if name]
        if unknown := set(wanted) - set(PEERS):
            raise UserError(f"unknown peers {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")
        if arguments.clock == "process" and (arguments.threads != 1 or arguments.device != "cpu"):
            raise UserError(
                "--clock process adds up all threads and ignores the GPU: use it with --threads 1 on the CPU"
            )
        settings = {key: getattr(arguments, key) for key in ("precision", "ops", "device", "threads", "clock", "dead")}
        if arguments.architectures:
            wanted = [name for name in wanted if name in TRAINERS]
        peers = installed_peers(arguments.peers_python, wanted)
        results: list[dict[str, Any]] = []
        if arguments.architectures:
            names = parse_architectures(arguments.architectures)
            for shape in shapes:
                measured = measure_architectures(shape, names, peers, settings, arguments.rounds)
                results.append({"shape": shape.name, "architectures": measured})
                print(architectures_text(shape, measured), flush=True)
            shapes = []
        for shape in shapes:
            results.append(measure(shape, peers, settings, arguments.rounds))
            add_comparisons(results)
            print(text(results[-1]), flush=True)
    except UserError as error:
        say(str(error))
        return 2
    if arguments.json:
        about = machine(torch.device(arguments.device), arguments.threads) | {"clock": arguments.clock}
        write_json_atomic(arguments.json, {"machine": about, "results": results})
    if arguments.picture and not arguments.architectures:
        draw(results, arguments.picture)
    return 0
