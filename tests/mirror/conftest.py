"""A run in training, made of files alone: what a mirror sees of one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.files import write_json_atomic
from harness.mirror import follow as mirror
from harness.record.metrics import MetricsFile, cut_back
from harness.record.rundir import read_config
from tests.analysis.wandb_server import KEY, Store, serving

LINES = [{"step": step, "tokens": 100 * step, "loss": 1.0 / step, "fvu": None} for step in range(1, 2001)]
RESULT = {"status": "done", "steps": 2000, "fvu": 0.1, "config": {}}

PATIENCE_S = 55.0
"""More than a program waits for its mirror: the machine may be busy."""

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(topk_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRun]:
    """Makes run directories that nothing was recorded in; there is no W&B key in the environment."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))

    def make(name: str = "", tracker: str = "wandb") -> Path:
        run_dir = tmp_path / "sweep" / (name or topk_run.name)
        run_dir.mkdir(parents=True)
        config = (topk_run / "config.yaml").read_text()
        assert "name: none" in config
        (run_dir / "config.yaml").write_text(config.replace("name: none", f"name: {tracker}"))
        return run_dir

    yield make
    mirror.close(0.1)


@pytest.fixture
def run_dir(make_run: MakeRun) -> Path:
    return make_run()


def train(run_dir: Path, lines: Sequence[dict[str, Any]] = LINES, result: dict[str, Any] | None = RESULT) -> float:
    """What training does to the record, with its announcement. Returns the seconds that it took."""
    begin = time.monotonic()
    mirror.follow(run_dir, read_config(run_dir))
    with MetricsFile(run_dir / "metrics.jsonl") as metrics:
        for line in lines:
            metrics.append(line)
    if result is not None:
        write_json_atomic(run_dir / "result.json", result)
    return time.monotonic() - begin


def cut_to(run_dir: Path, step: int) -> None:
    """Cut the record back to after `step`, as a resume does."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    cut_back(path, sum(len(line) for line in whole if json.loads(line)["step"] <= step))


def sync(run_dir: Path, store: Store, home: Path) -> dict[str, Any]:
    """Send the offline recordings of a run to a mock server, oldest first; returns what arrived there."""
    with serving(store) as address:
        for recording in sorted(run_dir.glob("wandb/offline-run-*")):
            subprocess.run(
                [sys.executable, "-m", "wandb", "sync", str(recording)],
                env=server_environment(address, home),
                cwd=run_dir,  # it writes logs there
                check=True,
                capture_output=True,
            )
    (run,) = store.runs.values()
    return run


def server_environment(address: str, home: Path) -> dict[str, str]:
    """The environment of a process that uses the mock server; `home` is for W&B's own files."""
    folders = {name: str(home / name) for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    return os.environ | folders | {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}


def steps(run: dict[str, Any]) -> list[int]:
    return [line["_step"] for line in run["history"]]
