"""A run: a cell with its name, its directory and the store that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import budget
from harness.config import Config
from harness.record.rundir import read_config


@dataclass(frozen=True)
class Store:
    """What is known of an activation store before it is opened."""

    id: str
    """Hash of its recipe."""
    d_model: int | None
    problem: str = ""
    """Why `id` or `d_model` is unknown."""


@dataclass(frozen=True)
class Run:
    """A named cell."""

    config: Config
    """Resolved and complete."""
    run_dir: Path
    store: Store
    status: str = "pending"
    """One of `state.STATES`, when the run was planned."""

    @property
    def run_id(self) -> str:
        return self.run_dir.name

    @property
    def sweep_dir(self) -> Path:
        return self.run_dir.parent

    @property
    def tokens(self) -> int | None:
        """Tokens that the budget buys (with `until=convergence`: at most); None while d_model is unknown."""
        d_model = self.store.d_model
        return None if d_model is None else budget.total_steps(self.config, d_model) * self.config.train.batch_tokens

    @property
    def flops(self) -> float | None:
        """FLOPs of the closed form for all `tokens`; None while d_model is unknown."""
        d_model, tokens = self.store.d_model, self.tokens
        if d_model is None or tokens is None:
            return None
        train = self.config.train
        parts = budget.flops_per_token(self.config.sae, d_model, train.batch_tokens, train.optimizer, train.peers)
        return tokens * sum(parts.values())


def frozen_run(run_dir: Path, config: Config) -> Run:
    """The run in `run_dir`, whose store the frozen configuration names."""
    return Run(config, run_dir, Store(config.activations.store, None))


def read_run(run_dir: Path) -> Run:
    """The run whose frozen configuration lies in `run_dir`. Raises `UserError` when there is none."""
    return frozen_run(run_dir, read_config(run_dir))
