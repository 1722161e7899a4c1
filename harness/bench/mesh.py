"""`python -m harness.bench.mesh`: the training step on several ranks against the cost model of docs/scaling.md.

It starts the ranks of each mesh on this machine (gloo on CPUs, NCCL on GPUs). It measures the network alone, the step,
the time inside each kind of exchange and the bytes sent. Next to them it prints the bytes of `harness.budget` and the
time predicted from latency and bandwidth.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from harness.bench.command import machine
from harness.bench.shapes import Shape, parse_shapes
from harness.errors import INTERRUPTED, WRONG_REQUEST, UserError
from harness.files import write_json_atomic
from harness.places.ranks import end_ranks, rank_environment
from harness.process.signals import interrupt_on_signals
from harness.terminal import Parser, run_command, say, table

EXCHANGES_PER_CALL = {"selection": 2}
"""Candidates one way, counts back; every other kind is one all-reduce."""


def parse_meshes(text: str) -> list[tuple[int, int]]:
    """(dp, shard) pairs from `1x1,2x1`. Raises `UserError`."""
    meshes = []
    for item in text.split(","):
        pair = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", item.strip())
        if pair is None:
            raise UserError(f"'{item.strip()}' is not a mesh: write DPxSHARD, as in 2x1")
        meshes.append((int(pair[1]), int(pair[2])))
    return meshes


def run_mesh(task: dict[str, Any]) -> dict[str, Any]:
    """The answer of rank 0. Raises `UserError` with the last line of the first rank that failed."""
    world = task["dp"] * task["shard"]
    environment = rank_environment(world)
    command = [sys.executable, "-m", "harness.bench.mesh_rank", json.dumps(task)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        try:
            for rank in range(world):
                with Path(folder, f"{rank}.out").open("w") as out, Path(folder, f"{rank}.err").open("w") as err:
                    own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    process = subprocess.Popen(
                        command, env=own, stdin=subprocess.PIPE, stdout=out, stderr=err, process_group=0
                    )
                    ranks.append(process)
            codes = [process.wait() for process in ranks]
        finally:
            end_ranks(ranks)
        for rank, code in enumerate(codes):
            if code:
                lines = Path(folder, f"{rank}.err").read_text().strip().splitlines()
                raise UserError(f"rank {rank} of {world} ended with {code}: {lines[-1] if lines else 'no output'}")
        return json.loads(Path(folder, "0.out").read_text())


def predicted_ms(kind: str, exchange: dict[str, float], network: dict[str, dict[str, float]]) -> float:
    """Predicted milliseconds: the latency of the exchanges plus their bytes over the measured bandwidth."""
    rates = network["all_to_all" if kind == "selection" else "all_reduce"]
    transfer = rates["small_bytes"] / rates["bytes_per_s"]
    latency = EXCHANGES_PER_CALL.get(kind, 1) * max(0.0, rates["small_s"] - transfer)
    return 1e3 * (exchange["calls"] * latency + exchange["bytes"] / rates["bytes_per_s"])


def entry(shape: Shape, dp: int, shard: int, threads: int, measured: dict[str, Any], network: Any) -> dict[str, Any]:
    """One entry of `results`: the shape, the mesh, what was measured, and what the cost model predicts."""
    exchanges = measured.pop("exchanges")
    for kind, exchange in exchanges.items() if network else ():
        exchange["predicted_ms"] = predicted_ms(kind, exchange, network)
    sizes = asdict(shape)
    result = {"shape": sizes.pop("name"), **sizes, "dp": dp, "shard": shard, "threads": threads, **measured}
    result["n_experts"] = result.pop("experts")
    return result | {
        "tokens_per_s": 1e3 * shape.batch / measured["step_ms"],
        "exchange_ms": sum(exchange["ms"] for exchange in exchanges.values()) if network else 0.0,
        "predicted_exchange_ms": sum(exchange["predicted_ms"] for exchange in exchanges.values()) if network else 0.0,
        "bytes_sent": sum(exchange["bytes"] for exchange in exchanges.values()),
        "formula_bytes": sum(exchange["formula_bytes"] for exchange in exchanges.values()),
        "exchanges": exchanges,
    }


def network_table(ranks: int, network: dict[str, dict[str, float]]) -> str:
    """The measured network as text for standard output."""
    rows = [
        (kind, str(ranks), f"{1e6 * rates['small_s']:.0f}", f"{rates['bytes_per_s'] / 1e9:.2f}")
        for kind, rates in network.items()
    ]
    return table(("network", "ranks", "µs for 16 KiB", "GB/s sent"), rows)


def result_table(results: Sequence[dict[str, Any]]) -> str:
    """Results of one mesh as text for standard output."""
    headings = ("shape", "dp", "shard", "step ms", "quartiles", "exchanges ms", "predicted ms", "sent MB", "formula MB")
    rows = [
        (
            result["shape"],
            str(result["dp"]),
            str(result["shard"]),
            f"{result['step_ms']:.1f}",
            f"{result['step_ms_spread']['q1']:.1f}–{result['step_ms_spread']['q3']:.1f}",
            f"{result['exchange_ms']:.1f}",
            f"{result['predicted_exchange_ms']:.1f}",
            f"{result['bytes_sent'] / 1e6:.3f}",
            f"{result['formula_bytes'] / 1e6:.3f}",
        )
        for result in results
    ]
    return table(headings, rows, optional=("quartiles",))


def main() -> int:
    parser = Parser(prog="python -m harness.bench.mesh", description="The step on several ranks.")
    add = parser.add_argument
    add("--shapes", default="384x1024x16x2048,384x4096x32x2048,384x4096x32x2048x8", help="names or DxNxKxB[xE]")
    add("--meshes", default="1x1,1x2,2x1", help="DPxSHARD, separated by commas")
    add("--rounds", type=int, default=15, help="timed steps")
    add("--precision", default="fp32", help="fp32, bf16 or fp64")
    add("--ops", default="auto", help="kernels")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="CPU threads of each rank; 0: the cores divided by the ranks")
    add("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    interrupt_on_signals()
    try:
        shapes, meshes = parse_shapes(arguments.shapes), parse_meshes(arguments.meshes)
        if arguments.rounds < 2:
            raise UserError(f"--rounds {arguments.rounds}: at least 2, for quartiles")
        settings = {key: getattr(arguments, key) for key in ("precision", "ops", "device", "threads", "rounds")}
        sizes = [
            {("n_experts" if key == "experts" else key): value for key, value in asdict(s).items()} for s in shapes
        ]
        results, networks = [], []
        for dp, shard in meshes:
            for shape in shapes:
                if shape.n % shard or (shape.experts > 1 and shape.experts % shard) or shape.batch % dp:
                    raise UserError(f"{shape.name} cannot be cut {dp} × {shard}")
            answer = run_mesh(settings | {"dp": dp, "shard": shard, "shapes": sizes, "out": "unused"})
            network = answer.get("network")
            if network:
                networks.append({"ranks": dp * shard, **network})
                print(network_table(dp * shard, network))
            own = [
                entry(shape, dp, shard, arguments.threads, measured, network)
                for shape, measured in zip(shapes, answer["results"], strict=True)
            ]
            print(result_table(own), flush=True)
            results += own
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST
    except KeyboardInterrupt:
        say("interrupted; no file was written")
        return INTERRUPTED
    if arguments.json:
        about = machine(torch.device(arguments.device), arguments.threads)
        write_json_atomic(arguments.json, {"machine": about, "network": networks, "results": results})
    return 0


if __name__ == "__main__":
    run_command(main)
