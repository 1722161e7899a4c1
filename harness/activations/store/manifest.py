"""The manifest of a store: what it must hold, and whether it is the one that is wanted. No torch."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from harness.activations.store.identity import recipe_hash
from harness.activations.store.paths import MANIFEST, MANIFEST_VERSION
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.schema import (
    FILE_NAME,
    OBJECT,
    SHA256,
    TEXT,
    Check,
    fields,
    list_of,
    number,
    one_of,
    read_json,
    sealed,
    whole,
)

STORE_ID = re.compile(r"[0-9a-f]{16}")
"""A directory with such a name must hold the store of this name. Under another name anybody may keep a copy."""

_FILE = fields({"file": FILE_NAME, "bytes": whole(1), "sha256": SHA256})
_SHARDS = list_of(fields({"file": FILE_NAME, "bytes": whole(1), "sha256": SHA256, "rows": whole(1)}))
_EXPLAINED = {"explained?": list_of(number(0))}
_RAW = fields({"count": whole(1), "mean_sq_norm": number(above=0), "variance": number(above=0), **_EXPLAINED})
_LAYERNORM = fields({"count": whole(1), "mean_sq_norm": number(0), "variance": number(0), **_EXPLAINED})


def _split(item: Check) -> Check:
    return fields({"train": item, "heldout": item})


_VERSION = fields({"schema_version": whole()})
_MANIFEST = sealed(
    fields(
        {
            "id": TEXT,
            "recipe": OBJECT,
            "description": fields({"kind": TEXT}),
            "d_model": whole(1),
            "dtype": one_of("fp16", "bf16", "fp32"),
            "rows": _split(whole(1)),
            "shards": _split(_SHARDS),
            "statistics": fields({"file": _FILE, "raw": _RAW, "layernorm": _LAYERNORM}),
        }
    )
)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the store in `directory`. Raises `UserError` when it is damaged, of another version, or that of
    another store than the name of the directory says."""
    path, again = directory / MANIFEST, f"delete {directory} to harvest it again"
    try:
        version = read_json(path, _VERSION, again)["schema_version"]
        if version != MANIFEST_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this program reads {MANIFEST_VERSION}; "
                f"use the version that wrote it, or {again}"
            )
        manifest = read_json(path, _MANIFEST, again)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {again}") from None
    if manifest["id"] != recipe_hash(manifest["recipe"]):
        raise UserError(f"{path} is damaged (id is not the hash of its recipe); {again}")
    if manifest["id"] != directory.name and STORE_ID.fullmatch(directory.name):
        raise UserError(
            f"{directory} holds another store, {manifest['id']}: give the directory its right name back, or {again}"
        )
    for split, shards in manifest["shards"].items():
        if split in manifest["rows"] and sum(shard["rows"] for shard in shards) != manifest["rows"][split]:
            raise UserError(f"{path} is damaged (rows.{split} is not the sum over shards.{split}); {again}")
    return manifest


def require_recipe(directory: Path, manifest: dict[str, Any], cfg: ActivationsConfig) -> None:
    """Raises `UserError` if the store was made with other settings than `cfg` tells of.

    A frozen configuration names its store, so nothing else compares its other settings. Model and text are not
    compared: a path does not identify them.
    """
    recipe, settings = manifest["recipe"], dataclasses.asdict(cfg)
    settings |= {"tokens": round(cfg.tokens), "heldout_tokens": round(cfg.heldout_tokens)}
    for name in ("hook", "layer", "context", "seed", "dtype", "drop_first_position", "tokens", "heldout_tokens"):
        if name in recipe and recipe[name] != settings[name]:
            raise UserError(
                f"activations.{name} is {settings[name]}, but the store {directory} was made with {recipe[name]}; "
                "the configuration was edited: put the value back, or launch the cell anew"
            )
