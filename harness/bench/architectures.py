"""The step of several architectures in turn, at equal size and about equal L0, in one interleaved run."""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.architectures import ARCHITECTURES
from harness.bench.contender import Process
from harness.bench.measure import WARM_UP, spread, write_data
from harness.bench.shapes import Shape
from harness.errors import UserError
from harness.terminal import table

VARIANTS = ("start", "dense")
"""`relu:start`: half of all latents are active. `relu:dense`: the same step, as plain dense products."""
WITH_PEERS = ("batchtopk", "matryoshka", "jumprelu", "relu", "gated")
"""Those that SAELens and dictionary_learning have too (`peer_trainers`)."""
PARTS = ("select_ms", "decode_ms", "backward_ms", "optimizer_ms", "other_ms")


def parse_architectures(text: str) -> list[str]:
    """Names, with `:start` for the start of training. Raises `UserError` for any other text."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        base, _, variant = name.partition(":")
        if base not in ARCHITECTURES or base == "switch" or (variant and (base, variant) not in _VARIANTS):
            known = [name for name in ARCHITECTURES if name != "switch"]
            raise UserError(f"--architectures {name}: choose from {', '.join(known)}, relu:start, relu:dense")
    return names


_VARIANTS = {("relu", variant) for variant in VARIANTS}


def measure_architectures(
    shape: Shape, names: list[str], peers: dict[str, list[str]], settings: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Name → milliseconds of a step and its parts (medians), and the median ratio to the first name's step.

    `NAME PEER` is the step of a peer's own trainer, without parts. `peers`: name → command of its worker.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = Path(folder) / "data.safetensors"
        write_data(shape, data)
        task = settings | {"data": str(data), "d": shape.d, "n": shape.n, "k": shape.k, "experts": 1}
        command = [sys.executable, "-m", "harness.bench.ours"]
        contenders: dict[str, Process] = {}
        for name in names:
            base, _, variant = name.partition(":")
            of_it = task | {"architecture": base, "variant": variant}
            contenders[name] = stack.enter_context(Process(name, command, of_it))
        theirs = [name for name in names if name in WITH_PEERS]
        for name, (peer, its_command) in itertools.product(theirs, peers.items()):
            of_it = task | {"architecture": name, "peer": peer, "steel": True}
            contenders[f"{name} {peer}"] = stack.enter_context(Process(f"{name} {peer}", its_command, of_it))
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for number in range(WARM_UP + rounds):
            for name, process in contenders.items():
                answer = process.ask("round")
                if number >= WARM_UP:
                    answers[name].append(answer)
    first = [answer["step_ms"] for answer in answers[names[0]]]
    results: dict[str, dict[str, Any]] = {}
    for name, rows in answers.items():
        steps = [row["step_ms"] for row in rows]
        parts = [part for part in ("step_ms", *PARTS) if part in rows[0]]
        results[name] = {part: statistics.median(row[part] for row in rows) for part in parts}
        results[name]["ratio"] = spread([own / other for own, other in zip(steps, first, strict=True)])
        if "auxk_extra_ms" in rows[0]:
            with_dead = [1 + row["auxk_extra_ms"] / row["step_ms"] for row in rows]
            results[name]["auxk_step_ratio"] = statistics.median(with_dead)
    return results


def text(shape: Shape, results: dict[str, dict[str, Any]]) -> str:
    """The results as a table for standard output."""
    first = next(iter(results))
    headings = (shape.name, "step ms", f"/ {first}", *(part.replace("_ms", " ms") for part in PARTS), "with AuxK")
    rows = [
        (
            name,
            f"{result['step_ms']:.1f}",
            f"{result['ratio']['median']:.2f}",
            *(f"{result[part]:.1f}" if part in result else "" for part in PARTS),
            f"{result['auxk_step_ratio']:.2f}" if "auxk_step_ratio" in result else "",
        )
        for name, result in results.items()
    ]
    return table(list(headings), [list(row) for row in rows], optional=("other ms", "optimizer ms"))
