"""Entry point of `python -m harness.bench.gpu` (`make gpu-check`): proves the GPU path and says which goals it reaches.

Works from a checkout, without installing it and without a network. Every figure is written to `DIR/gpu.json` at once,
so that a cut-off loses nothing. Exit codes: 0 everything ran and is right, 1 something is wrong or did not run, 2 a
wrong request, 75 interrupted. A goal that is missed is no error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import FAILED, INTERRUPTED, WRONG_REQUEST
from harness.files import write_json_atomic
from harness.process.signals import interrupt_on_signals
from harness.terminal import Parser, path_argument, run_command, say, table

LIMITS_S = {
    "device": 40,
    "shapes": 200,
    "selection": 60,
    "loop": 90,
    "shard": 60,
    "peers": 150,
    "sweep": 120,
    "kernels": 150,
}
"""The checks (functions of `checks`) in their order, and how long each may take of `MINUTES`, in seconds. The tests of
the kernels come last: compiling their many small sizes takes longest."""
MINUTES = 9.0


@dataclass(frozen=True)
class Goal:
    figure: str
    path: str
    """Where the figure stands in gpu.json; parts separated by spaces."""
    bound: float
    at_most: bool = False


GOALS = (
    Goal("share of floor S1, %", "shapes S1 pct_of_floor", 60),
    Goal("share of floor S1-131072, %", "shapes S1-131072 pct_of_floor", 65),
    Goal("share of floor S2, %", "shapes S2 pct_of_floor", 75),
    Goal("selection S1, share of copy bandwidth, %", "selection S1 gaussian pct_of_copy", 70),
    Goal("selection S2, share of copy bandwidth, %", "selection S2 gaussian pct_of_copy", 70),
    Goal("selection S1, Gaussian rows / FlashInfer", "selection S1 gaussian over_flashinfer", 1.5),
    Goal("selection S1, rows after ReLU / FlashInfer", "selection S1 relu over_flashinfer", 1.5),
    Goal("selection S1 / torch.topk", "selection S1 gaussian over_torch_topk", 5),
    Goal("selection S2 / torch.topk", "selection S2 gaussian over_torch_topk", 5),
    Goal("AuxK, 5 % dead, step ratio S1", "shapes S1 auxk_over_fastest", 1.15, at_most=True),
    Goal("AuxK, 5 % dead, step ratio S2", "shapes S2 auxk_over_fastest", 1.15, at_most=True),
    Goal("Switch over TopK, E = 8", "shapes topk_over_switch S3-E8", 1.5),
    Goal("Switch over TopK, E = 32", "shapes topk_over_switch S3-E32", 2.3),
    Goal("Switch over TopK, E = 32, B = 131072", "shapes topk_over_switch S3-131072-E32", 5),
    Goal("over openai's kernels", "peers openai openai ours_is_faster_by", 2),
    Goal("over sparsify", "peers sparsify sparsify ours_is_faster_by", 2.5),
    Goal("over dictionary_learning", "peers dictionary_learning dictionary_learning ours_is_faster_by", 3.5),
    Goal("over a BioNeMo-like SAE", "peers bionemo_like bionemo_like ours_is_faster_by", 3),
    Goal("Switch over a BioNeMo-like MoE, E = 8", "peers bionemo_like_moe bionemo_like ours_is_faster_by", 2),
    Goal("over a FlashSAE-like SAE", "peers flashsae_like flashsae_like ours_is_faster_by", 3),
    Goal("waits for the device per step", "loop waits_per_step", 0, at_most=True),
)
"""For an H100 or H200 in bf16 with float32 Adam states."""


def figure(results: dict[str, Any], path: str) -> Any:
    """The figure at `path`, or None if there is none."""
    value: Any = results
    for part in path.split():
        value = value.get(part) if isinstance(value, dict) else None
    return value


def judged(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (figure, goal, measured, reached)."""
    rows = []
    for goal in GOALS:
        value = figure(results, goal.path)
        limit = f"{'≤' if goal.at_most else '≥'} {goal.bound:g}"
        if value is None:
            rows.append((goal.figure, limit, "-", "not measured"))
            continue
        reached = value <= goal.bound if goal.at_most else value >= goal.bound
        rows.append((goal.figure, limit, f"{value:.2f}", "reached" if reached else "missed"))
    return rows


def wrong(results: dict[str, Any]) -> list[str]:
    """What is not as it must be, whatever the speed."""
    problems = [f"{name}: {error}" for name, error in results["errors"].items()]
    kernels, loop = results.get("kernels", {}), results.get("loop", {})
    problems += figure(kernels, "sizes failed") or []
    if figure(kernels, "tests exit_code"):
        problems.append(f"tests of the kernels: {kernels['tests']['summary']}")
    for name in ("graph_equals_eager", "auxk_graph_equals_eager", "nccl_equals_one_process"):
        if loop.get(name) is False:
            problems.append(f"loop: {name} is false")
    if figure(results, "sweep exit_code"):
        problems.append(f"sweep: exit code {results['sweep']['exit_code']}; see sweep.txt")
    return problems


class Figures:
    """The figures so far, in memory and in `gpu.json`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = {"errors": {}, "seconds": {}}

    def record(self, name: str, value: Any) -> None:
        """Set the figure at `name`, parts separated by dots, and write the file."""
        *parents, last = name.split(".")
        place = self.results
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
        copy = figure(self.results, "device copy_bytes_per_s")
        if copy and isinstance(value, dict) and "bytes_per_s" in value:
            value["pct_of_copy"] = 100 * value["bytes_per_s"] / copy
        write_json_atomic(self._path, self.results)
        print(f"{name} = {short(value)}", flush=True)


def short(value: Any) -> str:
    """A figure for the screen."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(part)}" for key, part in value.items() if not isinstance(part, dict))
    return str(value)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` inside after `seconds`."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_checks(names: list[str], figures: Figures, dry: bool, out: Path, minutes: float) -> None:
    """Every check within its own share of the minutes; what one raises does not stop the next."""
    import torch

    from harness.bench.gpu import checks
    from harness.bench.gpu.setting import Setting
    from harness.process.device import pick_device

    setting = Setting(pick_device("cpu" if dry else "cuda"), dry, out, figures.record)
    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * minutes
    for name in names:
        left = deadline - time.monotonic()
        begin = time.monotonic()
        if left <= 1:
            figures.record(f"errors.{name}", "no time left")
            continue
        try:
            with time_limit(min(left, LIMITS_S[name] * minutes / MINUTES)):
                getattr(checks, name)(setting)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            figures.record(f"errors.{name}", f"{type(error).__name__}: {lines[0]}")
            faulthandler.dump_traceback(file=sys.stderr)
        figures.record(f"seconds.{name}", time.monotonic() - begin)


def main() -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m harness.bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stop after this time; each check has a share")
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/gpu-check"), metavar="DIR", help="for gpu.json and logs"
    )
    parser.add_argument("--checks", default=",".join(LIMITS_S), help="which checks, in this order")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU, kernels in Triton's interpreter")
    arguments = parser.parse_args()
    names = arguments.checks.split(",")
    if unknown := set(names) - set(LIMITS_S):
        say(f"--checks: unknown {', '.join(sorted(unknown))}; choose from {', '.join(LIMITS_S)}")
        return WRONG_REQUEST
    if not 0 < arguments.minutes < math.inf:
        say(f"--minutes {arguments.minutes:g} is not a time: give a number above 0")
        return WRONG_REQUEST
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        say("torch sees no GPU here; --dry (make gpu-check ARGS=--dry) runs the same checks at toy sizes on the CPU")
        return WRONG_REQUEST
    interrupt_on_signals()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"--out {arguments.out}: {error.strerror}; choose a directory that can be made")
        return WRONG_REQUEST
    if arguments.dry:
        say("toy sizes in Triton's interpreter: whether everything runs, not how fast")
    figures = Figures(arguments.out / "gpu.json")
    # a call into the driver that never returns cannot be interrupted; the figures are on disk already
    faulthandler.dump_traceback_later(60 * arguments.minutes + 10, exit=True)
    try:
        run_checks(names, figures, arguments.dry, arguments.out.resolve(), arguments.minutes)
    except KeyboardInterrupt:
        say(f"interrupted; the figures so far are in {arguments.out / 'gpu.json'}")
        return INTERRUPTED
    if not arguments.dry:
        rows, headings = judged(figures.results), ("figure", "goal", "measured", "reached")
        figures.record("goals", [dict(zip(headings, row, strict=True)) for row in rows])
        print(table(headings, rows, left=("figure", "reached")))
    problems = wrong(figures.results)
    for problem in problems:
        say(f"wrong: {problem}")
    return FAILED if problems else 0


if __name__ == "__main__":
    run_command(main)
