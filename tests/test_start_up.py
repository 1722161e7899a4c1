"""Commands that people and job scripts call often start without torch, in about the time that numpy needs to load."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parent / "analysis" / "data" / "recorded_quick"
ROUNDS = 7

COMMANDS = {
    "status": ("harness.status", str(SWEEP)),
    "cancel": ("harness.cancel", str(SWEEP)),
    "slurm": ("harness.places.slurm", "--help"),
}


def seconds(*arguments: str) -> float:
    """Processor time of a Python process: unlike wall-clock time, it does not depend on what else runs."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return spent() - before


@pytest.mark.parametrize("name", COMMANDS)
def test_loads_no_torch(name: str) -> None:
    module, *arguments = COMMANDS[name]
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[module, *arguments]!r}\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'hydra', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_starts_about_as_fast_as_numpy() -> None:
    """The fastest of several alternating starts."""
    best = {name: float("inf") for name in ("numpy", *COMMANDS)}
    for _ in range(ROUNDS):
        best["numpy"] = min(best["numpy"], seconds("-c", "import numpy"))
        for name, (module, *arguments) in COMMANDS.items():
            best[name] = min(best[name], seconds("-m", module, *arguments))
    for name in COMMANDS:
        assert best[name] <= 3 * best["numpy"], best
