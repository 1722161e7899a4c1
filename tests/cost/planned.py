"""Runs as the plan sees them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harness.config import ClusterConfig, Config, MeshConfig
from harness.record.run import Run, Store
from tests.training.members import small_config


def a_config(cluster: dict[str, Any] | None = None, mesh: dict[str, int] | None = None, **changes: Any) -> Config:
    config = small_config(**changes)
    return dataclasses.replace(config, cluster=ClusterConfig(**(cluster or {})), mesh=MeshConfig(**(mesh or {})))


def a_run(out: Path, config: Config, name: str = "", d_model: int | None = 16, status: str = "pending") -> Run:
    name = name or f"{config.sae.architecture}-n{config.sae.n_latents}-k{config.sae.k}"
    return Run(config, out / "s" / name, Store("0" * 16, d_model), status)
