"""Whether the files of a store are those that its manifest names: each is hashed once, and again if it was touched."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import sha256_of, write_json_atomic
from harness.process.claim import claim
from harness.progress import Progress
from harness.schema import dict_of, list_of, read_json, whole

VERIFIED = "verified.json"
"""What `identity` was of every file when its hash was last checked."""
LOCK = "verified.lock"
"""Held by the process that hashes."""
RECORD_S = 20.0
"""Seconds of hashing that a kill may lose."""


def identity(directory: Path, manifest: dict[str, Any]) -> dict[str, list[int]]:
    """File name → size, time of the last write, time of the last change of any kind, inode. Who writes into a file can
    put the second back, not the third. Raises `UserError` for a file that is missing or has another size."""
    again, found = f"delete {directory} to harvest it again", {}
    for entry in _files(manifest):
        path = directory / entry["file"]
        if not path.is_file():
            raise UserError(f"the shard {path} is missing; {again}")
        found[entry["file"]] = identity_of(path)
        if (size := found[entry["file"]][0]) != entry["bytes"]:
            raise UserError(f"the shard {path} has {size} bytes instead of {entry['bytes']}; {again}")
    return found


def identity_of(path: Path) -> list[int]:
    """The entry of a file in `identity`."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def verify(
    directory: Path, manifest: dict[str, Any], elsewhere: Path | None = None, progress: Progress | None = None
) -> dict[str, list[int]]:
    """Compare every file with its hash, unless that was done before and `identity` is what it was then; return that.

    What was compared is recorded in the store, or in the file `elsewhere` if the store may only be read. Processes that
    come meanwhile wait, and find the record. Hashing takes about two seconds for a gigabyte on a slow core; the cores
    share the files. Raises `UserError` that names the wrong file.
    """
    found = identity(directory, manifest)
    if _changed(manifest, found, _verified_before(directory, elsewhere)):
        with _one_at_a_time(directory):
            before = _verified_before(directory, elsewhere)
            known = {name: value for name, value in before.items() if found.get(name) == value}
            _hash(directory, _changed(manifest, found, known), found, known, elsewhere, progress)
    return found


def _changed(
    manifest: dict[str, Any], found: dict[str, list[int]], known: dict[str, list[int]]
) -> list[dict[str, Any]]:
    return [entry for entry in _files(manifest) if known.get(entry["file"]) != found[entry["file"]]]


def _hash(
    directory: Path,
    entries: list[dict[str, Any]],
    found: dict[str, list[int]],
    known: dict[str, list[int]],
    elsewhere: Path | None,
    progress: Progress | None,
) -> None:
    """Hash the files of `entries`, move what is right from `found` to `known`, and record `known`."""
    if progress is not None and entries:
        progress.start("verify the activations", sum(entry.get("rows", 0) for entry in entries))
    rows, recorded = 0, time.monotonic()
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = pool.map(lambda entry: sha256_of(directory / entry["file"]), entries)
            for entry, sha256 in zip(entries, hashes, strict=True):
                if sha256 != entry["sha256"]:
                    pool.shutdown(cancel_futures=True)
                    raise UserError(
                        f"the shard {directory / entry['file']} is damaged (its sha256 is not the manifest's); "
                        f"delete {directory} to harvest it again"
                    )
                known[entry["file"]] = found[entry["file"]]
                rows += entry.get("rows", 0)
                if progress is not None:
                    progress.update(rows, {})
                if time.monotonic() - recorded > RECORD_S:
                    record(known, directory, elsewhere)
                    recorded = time.monotonic()
    except OSError as error:
        raise UserError(f"cannot read {error.filename or directory}: {error.strerror or error}") from error
    finally:
        record(known, directory, elsewhere)
        if progress is not None:
            progress.finish("")


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Wait for another process that hashes the same store; in a store that may only be read nobody waits."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(claim(directory / LOCK, wait=True))
        yield


def record(known: dict[str, list[int]], directory: Path, elsewhere: Path | None = None) -> None:
    """Write down which files, with which `identity`, have the right hash."""
    for path in filter(None, (directory / VERIFIED, elsewhere)):
        try:
            path.parent.mkdir(exist_ok=True)
            write_json_atomic(path, known)
            return
        except OSError:
            continue  # a store that this user may only read


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [*manifest["shards"]["train"], *manifest["shards"]["heldout"], manifest["statistics"]["file"]]


def _verified_before(directory: Path, elsewhere: Path | None) -> dict[str, list[int]]:
    known: dict[str, list[int]] = {}
    for path in filter(None, (elsewhere, directory / VERIFIED)):
        try:
            known |= read_json(path, dict_of(list_of(whole())), "")
        except (FileNotFoundError, UserError):
            continue
    return known
