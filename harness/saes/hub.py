"""Addresses of the Hugging Face hub, `hf:ORG/NAME` and `hf:ORG/NAME/RUN`, and runs that were published there."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError
from harness.record import names

PREFIX = "hf:"
_ADDRESS = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?")


class Address(NamedTuple):
    repository: str
    run: str
    """Folder of the run; empty for the whole repository."""


def parse(address: str) -> Address:
    """Raises `UserError` for anything but `hf:ORG/NAME` and `hf:ORG/NAME/RUN`."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is no address on the hub: write hf:ORG/NAME or hf:ORG/NAME/RUN")
    return Address(match[1], match[2] or "")


@contextmanager
def speaking(address: str) -> Generator[None, None, None]:
    """Raises `UserError` in one line for whatever the hub or the way to it answers."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises errors of several libraries, which differ by its version
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(f"{address}: {reason}") from error


def fetch(address: str) -> Path:
    """A run directory with the weights of a published run, in the cache of the Hugging Face libraries.

    Without a run, the only one of the repository. Raises `UserError` if it is not there or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    wanted = parse(address)
    run = wanted.run or "*"
    with speaking(address):
        patterns = [f"{run}/{names.SAE}/*", f"{run}/{names.RESULT}"]
        root = Path(snapshot_download(wanted.repository, allow_patterns=patterns))
    if wanted.run:
        found = [root / wanted.run]
    else:
        found = sorted(path for path in root.iterdir() if (path / names.SAE).is_dir())
    if len(found) != 1:
        runs = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{address} holds {len(found)} runs ({runs}): name one, as {address}/RUN")
    if not (found[0] / names.SAE / names.WEIGHTS_CONFIG).is_file():
        raise UserError(f"{address} holds no SAE that harness.export --push wrote")
    return found[0]
