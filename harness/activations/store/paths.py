"""Where stores lie and whether they are complete. Job scripts ask this, so it loads almost nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.config import ActivationsConfig

MANIFEST = "manifest.json"
"""Written last: a directory that has it is a complete store."""
MANIFEST_VERSION = 1


def store_name(cfg: ActivationsConfig) -> str:
    """The recipe hash that was frozen with the run if there is one, else `store_id`.

    A frozen run needs neither model nor text to find its store. Raises `UserError` as `store_id` does.
    """
    if cfg.store:
        return cfg.store
    from harness.activations.store.identity import store_id

    return store_id(cfg)


def store_root(cfg: ActivationsConfig, out: Path) -> Path:
    """The directory that holds the stores: `activations.dir`, or `_activations` in the output directory."""
    return Path(cfg.dir) if cfg.dir else out / "_activations"


def store_path(cfg: ActivationsConfig, out: Path) -> Path:
    """The directory of this store, whether it exists or not."""
    return store_root(cfg, out) / store_name(cfg)


def is_complete(store: Path) -> bool:
    """Whether the store exists and is whole."""
    return (store / MANIFEST).is_file()


def shares_forwards(cfg: ActivationsConfig, other: ActivationsConfig) -> bool:
    """Whether one pass gives the rows of both: they differ in layer or hook, and in nothing else."""
    same = dataclasses.replace(other, layer=cfg.layer, hook=cfg.hook, store=cfg.store)
    return same == cfg and (other.layer, other.hook) != (cfg.layer, cfg.hook)
