"""One small finished run for tests of what is made from records."""

from pathlib import Path

import pytest

from harness.launch import main
from tests.jobs.conftest import TINY


def train(out: Path, *arguments: str) -> Path:
    """Train one tiny cell; returns its run directory."""
    assert main([*TINY, f"out={out}", *arguments]) == 0
    (config,) = out.glob("t/*/config.yaml")
    return config.parent


@pytest.fixture(scope="session")
def topk_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return train(tmp_path_factory.mktemp("topk"))


@pytest.fixture(scope="session")
def layernorm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return train(tmp_path_factory.mktemp("layernorm"), "sae.normalize=layernorm", "sae.enc_bias=false")


@pytest.fixture(scope="session")
def switch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return train(tmp_path_factory.mktemp("switch"), "sae=switch", "sae.n_experts=2")
