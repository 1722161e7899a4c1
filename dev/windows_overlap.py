"""`python -m dev.windows_overlap`: how well a process that computes windows and the training that reads them overlap.

Three loops over the same windows, in turns: the language model alone (nobody trains), the training alone (the batches
are there), both. Rates are rows a second by the clock and, for a machine that others use too, by the processor time of
the slower of the two processes, which is what two free cores would give. One thread each, MiniLM.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from harness.activations.open import open_source
from harness.activations.window.source import Windows
from harness.config import Config
from harness.ops import choose_ops
from harness.parallel import Solo
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.sweep.request import Request, plan_runs, requested_cells
from harness.terminal import Parser
from harness.training.state import make_state

CPU = torch.device("cpu")


class Rates(NamedTuple):
    """Rows a second."""

    clock: float
    processor: float


def measured(config: Config, source: Windows, windows: int, *, trains: bool, given: list[Tensor] | None) -> Rates:
    """Read windows 1 … `windows`; window 0 and the loading of the model are not counted."""
    runtime = Runtime(CPU, Solo(), choose_ops("auto", CPU), StopFlag())
    state = make_state(config, source, runtime)
    per_window = round(config.activations.window_tokens) // config.train.batch_tokens
    begun = own = others = 0.0
    with source.stream(0, config.train.batch_tokens, CPU) as stream:
        for step, batch in enumerate(given if given is not None else stream.batches(0)):
            if step == per_window:
                begun, own, others = time.monotonic(), time.process_time(), _children_s()
            if step == (windows + 1) * per_window:
                break
            if trains:
                state.train_step(batch, runtime)
        rows = windows * per_window * config.train.batch_tokens
        slower = max(time.process_time() - own, _children_s() - others)
        return Rates(rows / (time.monotonic() - begun), rows / slower)


def _children_s() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the process that computes the windows
    with tempfile.TemporaryDirectory() as out:
        window = ("activations=minilm", "activations.keep=window", "activations.window_tokens=20480")
        rows = ("activations.tokens=102400", "activations.heldout_tokens=4096", "train.batch_tokens=512")
        words = [*window, *rows, "train.tokens=102400", "train.threads=1", f"out={out}", *arguments.overrides]
        config = plan_runs(requested_cells(Request(words)), dry_run=True)[0].config
        source = open_source(config.activations, Path(out), progress=False, stop=StopFlag())
        assert isinstance(source, Windows)
        with source.stream(0, config.train.batch_tokens, CPU) as stream:
            steps = (arguments.windows + 1) * round(config.activations.window_tokens) // config.train.batch_tokens + 1
            given = [batch.clone() for _, batch in zip(range(steps), stream.batches(0), strict=False)]
        found: dict[str, list[Rates]] = {"language model": [], "training": [], "both": []}
        for _ in range(arguments.rounds):
            found["language model"].append(measured(config, source, arguments.windows, trains=False, given=None))
            found["training"].append(measured(config, source, arguments.windows, trains=True, given=given))
            found["both"].append(measured(config, source, arguments.windows, trains=True, given=None))
    for clock in ("clock", "processor"):
        rates = {name: statistics.median(getattr(each, clock) for each in rounds) for name, rounds in found.items()}
        lm, training, both = rates.values()
        print(
            f"{clock}: language model {lm:,.0f} rows/s, training {training:,.0f}, both {both:,.0f}: "
            f"{both / min(lm, training):.2f} of the slower, {both * (1 / lm + 1 / training):.2f} of alternating"
        )


if __name__ == "__main__":
    main()
