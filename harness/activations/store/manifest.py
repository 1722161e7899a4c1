"""The manifest of a store, and whether the files are those that it names. No torch."""

from __future__ import annotations

import dataclasses
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.activations.store.identity import recipe_hash
from harness.activations.store.paths import MANIFEST, MANIFEST_VERSION
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import sha256_of, write_json_atomic
from harness.schema import (
    FILE_NAME,
    OBJECT,
    SHA256,
    TEXT,
    Check,
    dict_of,
    fields,
    list_of,
    number,
    one_of,
    read_json,
    sealed,
    whole,
)

VERIFIED = "verified.json"
"""What `_identity` was of every file when its hash was last checked."""

STORE_ID = re.compile(r"[0-9a-f]{16}")
"""A directory with such a name must hold the store of this name. Under another name anybody may keep a copy."""

_FILE = fields({"file": FILE_NAME, "bytes": whole(1), "sha256": SHA256})
_SHARDS = list_of(fields({"file": FILE_NAME, "bytes": whole(1), "sha256": SHA256, "rows": whole(1)}))
_RAW = fields({"count": whole(1), "mean_sq_norm": number(above=0), "variance": number(above=0)})
_LAYERNORM = fields({"count": whole(1), "mean_sq_norm": number(0), "variance": number(0)})


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


def identity(directory: Path, manifest: dict[str, Any]) -> dict[str, list[int]]:
    """File name → size, time of the last write, time of the last change of any kind, inode. Who writes into a file can
    put the second back, not the third. Raises `UserError` for a file that is missing or has another size."""
    again, found = f"delete {directory} to harvest it again", {}
    for entry in _files(manifest):
        path = directory / entry["file"]
        if not path.is_file():
            raise UserError(f"the shard {path} is missing; {again}")
        status = path.stat()
        if status.st_size != entry["bytes"]:
            raise UserError(f"the shard {path} has {status.st_size} bytes instead of {entry['bytes']}; {again}")
        found[entry["file"]] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def verify(directory: Path, manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Compare every file with its hash, unless that was done before and `identity` is what it was then; return that.

    Hashing takes about two seconds for a gigabyte on a slow core; the cores share the files. Raises `UserError` that
    names the wrong file.
    """
    found, earlier = identity(directory, manifest), _verified_before(directory)
    changed = [entry for entry in _files(manifest) if earlier.get(entry["file"]) != found[entry["file"]]]
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = list(pool.map(lambda entry: sha256_of(directory / entry["file"]), changed))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or directory}: {error.strerror or error}") from error
    for entry, sha256 in zip(changed, hashes, strict=True):
        if sha256 != entry["sha256"]:
            raise UserError(
                f"the shard {directory / entry['file']} is damaged (its sha256 is not the manifest's); "
                f"delete {directory} to harvest it again"
            )
    if changed:
        try:
            write_json_atomic(directory / VERIFIED, found)
        except OSError:
            return found  # a store that this user may only read is verified at every opening
    return found


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [*manifest["shards"]["train"], *manifest["shards"]["heldout"], manifest["statistics"]["file"]]


def _verified_before(directory: Path) -> dict[str, list[int]]:
    try:
        return read_json(directory / VERIFIED, dict_of(list_of(whole())), "")
    except (FileNotFoundError, UserError):
        return {}
