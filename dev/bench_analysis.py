"""`make bench-analysis`: how long the fits take, and how long they may take. No test: clocks lie on busy machines.

One process, with the default number of BLAS threads. `--repeat N`: the best of N.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis import RunTable, fit
from analysis.laws.catalogue import get
from harness.terminal import Parser
from tests.analysis.designs import DESIGNS, clean, covered
from tests.analysis.generate import GPT4, grid_frame

ROLES = {"n": "n_latents", "k": "k", "loss": "fvu"}


def import_analysis() -> None:
    subprocess.run([sys.executable, "-c", "import analysis"], check=True)


def fit_with_profiles() -> None:
    frame = grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), 0.01)
    assert fit(RunTable(frame, dict(ROLES))).points == 45


def coverage() -> None:
    law_name, inputs, truth, noise = DESIGNS["45 cells, 1 %"]
    rng = np.random.default_rng(0)
    y = clean(law_name, inputs, truth)
    for _ in range(500):
        covered(get(law_name), inputs, GPT4, y * np.exp(noise * rng.standard_normal(len(y))))


def chinchilla_bootstrap() -> None:
    """240 runs, Huber with δ = 1e-3, 1,000 resamples."""
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 240)), np.exp(rng.uniform(np.log(1e9), np.log(3e11), 240))
    loss = (1.82 + 482 * n**-0.348 + 2085 * d**-0.366) * np.exp(0.003 * rng.standard_t(3, 240))
    frame = pd.DataFrame({"n": n, "d": d, "loss": loss})
    table = RunTable(frame, {"n": "n", "d": "d", "loss": "loss"})
    assert fit(table, "chinchilla", robust="huber", delta=1e-3, resamples=1000).ci == "bootstrap"


def million_rows() -> None:
    rng, size = np.random.default_rng(0), 1_000_000
    n, k = rng.choice(2.0 ** np.arange(11, 20), size), rng.choice(2.0 ** np.arange(5, 10), size)
    y = (np.exp(0.5 - 0.2 * np.log(n)) + np.exp(-1.5 - 0.1 * np.log(k))) * np.exp(0.01 * rng.standard_normal(size))
    table = RunTable(pd.DataFrame({"n": n, "k": k, "loss": y}), {"n": "n", "k": "k", "loss": "loss"})
    assert fit(table).points == size


PARTS: dict[str, tuple[Callable[[], None], float]] = {
    "import analysis": (import_analysis, 1.5),
    "sae_nk, 45 runs, six profiles": (fit_with_profiles, 2.0),
    "coverage of 500 replicates": (coverage, 30.0),
    "chinchilla, 240 runs, 1,000 bootstraps": (chinchilla_bootstrap, 10.0),
    "a million rows, made and fitted": (million_rows, 10.0),
}
"""Name → (work, seconds it may take)."""

MEMORY_GB = 1.0
"""Limit for the million rows. The output shows the largest resident size of the process, libraries included."""


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=1)
    repeat = parser.parse_args().repeat
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"{'':40}{'measured':>10}{'CPU':>10}{'limit':>10}")
    for name, (work, limit) in PARTS.items():
        best, best_cpu = float("inf"), float("inf")
        for _ in range(repeat):
            begun, cpu = time.perf_counter(), _cpu()
            work()
            best, best_cpu = min(best, time.perf_counter() - begun), min(best_cpu, _cpu() - cpu)
        print(f"{name:40}{best:8.2f} s{best_cpu:8.2f} s{limit:8.1f} s{'' if best < limit else '  slower'}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{'largest resident size':40}{peak:7.2f} GB{'':10}{MEMORY_GB:7.1f} GB")
    return 0


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    sys.exit(main())
