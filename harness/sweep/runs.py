"""From cells to runs: names, places, and which have ended already."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from harness.config import ActivationsConfig, Config, run_id
from harness.errors import UserError
from harness.grid.cells import Cell
from harness.process.device import trains_on_gpu
from harness.record.initial import content_hash, find_initial
from harness.record.run import Run, Store
from harness.record.rundir import run_directory
from harness.record.state import state_of

UNRESOLVED = "unresolved"
"""Stands for the id of a store that cannot be known here, for example without the hub that has the model."""

KNOWN_WIDTHS = {"gpt2": 768, "openai-community/gpt2": 768}
"""d_model of models that our studies name: their plans can be shown without a hub."""


def resolve_precision(config: Config) -> Config:
    """Replace `train.precision=auto` by what the training machine computes in: a bf16 and an fp32 run are different
    runs."""
    if config.train.precision != "auto":
        return config
    train = dataclasses.replace(config.train, precision="bf16" if trains_on_gpu(config) else "fp32")
    return dataclasses.replace(config, train=train)


def resolve_initial(config: Config) -> Config:
    """Put the content of the SAE that a run starts from into its identity. Raises `UserError` if there is none."""
    if not config.train.init_from:
        return config
    found = content_hash(config.train.init_from)
    if config.train.init_hash not in ("", found):
        raise UserError(f"train.init_hash is set and is not that of {config.train.init_from}; leave it to the launcher")
    path = config.train.init_from
    form, _, rest = path.partition(":")
    path = f"{form}:{Path(rest).absolute()}" if find_initial(path).form == form else str(Path(path).absolute())
    return dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=path, init_hash=found))


def with_own_rows(cells: Sequence[Cell]) -> list[Cell]:
    """The cells; those that ask for rows in a precision in which an existing store of their recipe was not computed get
    a store of another name."""
    sections = {id(cell.config.activations): cell.config for cell in cells}  # cells share their sections
    own = {key: _own_rows(config.activations, Path(config.out)) for key, config in sections.items()}

    def with_rows(cell: Cell) -> Cell:
        found = own[id(cell.config.activations)]
        if found is cell.config.activations:  # a new configuration is checked anew, ten thousand times in a large grid
            return cell
        return cell._replace(config=dataclasses.replace(cell.config, activations=found))

    return [with_rows(cell) for cell in cells]


def _own_rows(activations: ActivationsConfig, out: Path) -> ActivationsConfig:
    from harness.activations.store.manifest import read_manifest
    from harness.activations.store.paths import is_complete, store_path

    if activations.kind == "synthetic" or activations.lm_precision == "auto" or activations.store:
        return activations
    try:
        store = store_path(activations, out)
    except (UserError, OSError):  # `find_stores` tells
        return activations
    if not is_complete(store) or read_manifest(store)["description"].get("precision") == activations.lm_precision:
        return activations
    return dataclasses.replace(activations, rows_precision=activations.lm_precision)


def find_stores(configs: Sequence[ActivationsConfig], *, tolerant: bool) -> dict[str, Store]:
    """Id and width of every distinct store, by `recipe_key`.

    `tolerant`: a hub that cannot be reached leaves the store unresolved instead of raising `UserError`.
    """
    distinct = {id(config): config for config in configs}  # cells share their sections
    return {key: _find_store(config, tolerant) for key, config in {recipe_key(c): c for c in distinct.values()}.items()}


def recipe_key(config: ActivationsConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _find_store(config: ActivationsConfig, tolerant: bool) -> Store:
    from harness.activations.lm.location import model_width, needs_hub
    from harness.activations.store.paths import store_name

    try:
        return Store(store_name(config), model_width(config))
    except (UserError, OSError) as error:
        if not tolerant or not needs_hub(config):
            raise UserError(str(error)) from error
        return Store(UNRESOLVED, KNOWN_WIDTHS.get(config.model), " ".join(str(error).split()))


def make_runs(cells: Sequence[Cell], stores: dict[str, Store]) -> list[Run]:
    """Name every cell and look up its state; cells with the same name are one run. Cheap ones first."""
    runs: dict[Path, Run] = {}
    resolved: dict[int, tuple[Store, ActivationsConfig]] = {}  # cells share their sections
    for cell in cells:
        section = cell.config.activations
        if id(section) not in resolved:
            store = stores[recipe_key(section)]
            resolved[id(section)] = (store, dataclasses.replace(section, store=store.id))
        store, activations = resolved[id(section)]
        config = dataclasses.replace(cell.config, activations=activations)
        run_dir = run_directory(config, run_id(config, store.id))
        if run_dir not in runs:
            status = "pending" if store.id == UNRESOLVED else state_of(run_dir).status
            runs[run_dir] = Run(config, run_dir, store, status)
    return sorted(runs.values(), key=lambda run: (run.flops or 0.0, run.run_id))


def sweep_dirs_of(runs: Sequence[Run]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(run.sweep_dir for run in runs))
