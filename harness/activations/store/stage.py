"""`python -m harness.activations.store.stage STORE DIR`: copy a store to a directory of this node before training.

One process per node runs it. If DIR has no room or cannot be written, it prints a note and exits with 0: training then
reads the shared store.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.activations.store.manifest import read_manifest
from harness.activations.store.paths import is_complete
from harness.activations.store.verify import verify
from harness.errors import UserError
from harness.files import fsync_directory
from harness.process.claim import claim
from harness.terminal import Parser, say


def stage(store: Path, target: Path) -> Path:
    """Copy `store` into `target` unless a good copy exists, and return the copy.

    The copy gets its name when it is whole. Opening it compares it with the hashes in its manifest. Raises `OSError`
    without room, and `UserError` when the manifest of `store` is damaged or that of another store.
    """
    manifest = read_manifest(store)
    copy = target / store.name
    target.mkdir(parents=True, exist_ok=True)
    with claim(target / f"{store.name}.lock", wait=True):
        if is_complete(copy):
            try:
                if read_manifest(copy) == manifest:
                    verify(copy, manifest)
                    return copy
                problem = "it is not that of the shared store"
            except UserError as error:
                problem = str(error)
            say(f"note: the copy {copy} is made anew: {problem}")
            shutil.rmtree(copy)
        for left_behind in target.glob(f"{store.name}.*.tmp"):  # by killed processes; we hold the lock
            shutil.rmtree(left_behind)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        free = shutil.disk_usage(target).free
        if free < 1.02 * size:
            raise OSError(f"{target} has {free / 1e9:.1f} GB free, the store takes {size / 1e9:.1f} GB")
        beside = target / f"{store.name}.{os.getpid()}.tmp"
        try:
            shutil.copytree(store, beside)
            beside.rename(copy)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        fsync_directory(target)
    return copy


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.activations.store.stage", description="Copy a store to a node.")
    parser.add_argument("store", type=Path)
    parser.add_argument("target", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    if not is_complete(arguments.store):
        say(f"note: {arguments.store} is not a finished store, so it is not copied")
        return 0
    try:
        stage(arguments.store, arguments.target)
    except (OSError, UserError) as error:
        say(f"note: the store is not copied to this node: {error}; reading the shared one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
