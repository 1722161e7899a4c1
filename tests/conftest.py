"""What tests of several packages share.

Where there is no GPU, tests marked `gpu` are skipped and Triton's kernels run in its interpreter.
"""

import os

# threads of small tensors wait for each other where ranks, workers or other tests have the cores; torch reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY, Launch, train_tiny

if not torch.cuda.is_available():
    # Triton decides when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 kB; mounting one needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Launch tiny cells into `tmp_path`, with further arguments; returns the exit code."""
    from harness.launch import main

    def run(*arguments: str) -> int:
        return main([*TINY, f"out={tmp_path}", *arguments])

    return run


@pytest.fixture(scope="session")
def topk_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    return train_tiny(tmp_path_factory.mktemp("topk"))


@pytest.fixture(scope="session")
def layernorm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    return train_tiny(tmp_path_factory.mktemp("layernorm"), "sae.normalize=layernorm", "sae.enc_bias=false")


@pytest.fixture(scope="session")
def switch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    return train_tiny(tmp_path_factory.mktemp("switch"), "sae=switch", "sae.n_experts=2")
