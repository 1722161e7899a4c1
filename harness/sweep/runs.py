"""From cells to runs: names, places, and what is done already."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import budget
from harness.config import ActivationsConfig, Config, run_id
from harness.errors import UserError
from harness.grid.cells import Cell
from harness.record.rundir import run_directory
from harness.record.state import state_of

UNRESOLVED = "unresolved"
"""Stands for the recipe hash of a store that cannot be known here, e.g. without the hub that has the model."""

KNOWN_WIDTHS = {"gpt2": 768, "openai-community/gpt2": 768}
"""d_model of models that our studies name, so that their plan can be shown where no hub is reachable."""


@dataclass(frozen=True)
class Store:
    """What launch knows of an activation store before it is opened."""

    id: str
    d_model: int | None
    problem: str = ""
    """Why `id` or `d_model` is unknown."""


@dataclass(frozen=True)
class Run:
    """A cell with its name, its place and its price."""

    label: str
    config: Config
    run_id: str
    run_dir: Path
    status: str
    store: Store

    @property
    def flops(self) -> float | None:
        d_model = self.store.d_model
        if d_model is None:
            return None
        per_token = sum(budget.flops_per_token(self.config.sae, d_model, self.config.train.batch_tokens).values())
        return per_token * tokens_of(self.config, d_model)


def tokens_of(config: Config, d_model: int) -> int:
    """Tokens that the budget buys (with `until=convergence`: at most)."""
    return budget.total_steps(config, d_model) * config.train.batch_tokens


def resolve_precision(config: Config) -> Config:
    """Replace `train.precision=auto` by what the training machine computes in: a bf16 and an fp32 run are different
    runs. A job on a cluster computes on a GPU if it asks for one."""
    if config.train.precision != "auto":
        return config
    if config.cluster.name == "slurm":
        on_gpu = config.train.device != "cpu" and config.cluster.gpus_per_task > 0
    else:
        import torch

        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    train = dataclasses.replace(config.train, precision="bf16" if on_gpu else "fp32")
    return dataclasses.replace(config, train=train)


def find_stores(configs: Sequence[ActivationsConfig], *, tolerant: bool) -> dict[str, Store]:
    """Recipe hash and width of every distinct store, by `recipe_key`.

    `tolerant`: a hub that cannot be reached leaves the store unresolved instead of raising `UserError`.
    """
    distinct = {id(config): config for config in configs}  # cells share their sections
    return {key: _find_store(config, tolerant) for key, config in {recipe_key(c): c for c in distinct.values()}.items()}


def recipe_key(config: ActivationsConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _find_store(config: ActivationsConfig, tolerant: bool) -> Store:
    from harness.activations.lm.location import model_width, needs_hub
    from harness.activations.store.identity import store_name

    try:
        return Store(store_name(config), model_width(config))
    except (UserError, OSError) as error:
        if not tolerant or not needs_hub(config):
            raise UserError(str(error)) from error
        return Store(UNRESOLVED, KNOWN_WIDTHS.get(config.model), " ".join(str(error).split()))


def make_runs(cells: Sequence[Cell], stores: dict[str, Store]) -> list[Run]:
    """Name every cell and see what is done; cells with the same name are one run. Cheap ones first."""
    runs: dict[Path, Run] = {}
    found: dict[int, tuple[Store, ActivationsConfig]] = {}  # cells share their sections
    for cell in cells:
        section = cell.config.activations
        if id(section) not in found:
            store = stores[recipe_key(section)]
            found[id(section)] = (store, dataclasses.replace(section, store=store.id))
        store, named = found[id(section)]
        config = dataclasses.replace(cell.config, activations=named)
        name = run_id(config, store.id)
        run_dir = run_directory(config, name)
        if run_dir not in runs:
            status = "pending" if store.id == UNRESOLVED else state_of(run_dir).status
            runs[run_dir] = Run(cell.label, config, name, run_dir, status, store)
    return sorted(runs.values(), key=lambda run: (run.flops or 0.0, run.run_id))
