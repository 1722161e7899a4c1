"""Where the checks of `harness.bench.gpu` run, and where their figures go."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.bench.shapes import SHAPES, Shape
from harness.ops import Ops, choose_ops

TOY = {name: Shape(name, 16, 128, 4, 64, min(4, shape.experts)) for name, shape in SHAPES.items()}
"""What `--dry` measures under the names of the real shapes."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run and where their figures go."""

    device: torch.device
    dry: bool
    """Toy sizes on the CPU, kernels in Triton's interpreter."""
    out: Path
    record: Callable[[str, Any], None]
    """Keeps a figure under `check.name…`, on disk at once."""

    @property
    def ops(self) -> Ops:
        return choose_ops("triton", self.device)

    def shape(self, name: str) -> Shape:
        return TOY[name] if self.dry else SHAPES[name]

    def milliseconds(self, work: Callable[[], object], repeats: int = 10) -> float:
        """Median time of one call, after one that does not count."""
        work()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - begin)
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def free(setting: Setting) -> None:
    """Return what earlier checks held, so that peaks and limits are those of the next one."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
