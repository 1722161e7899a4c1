"""Atomic file writes: temporary file, fsync, rename. A reader sees the old content or the new, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds, and the analysis writes files without it
    from torch import Tensor


NOT_ALLOWED = "its owner can allow it, or use a copy of your own"
"""What to do about a file that another user owns."""


def user_path(text: str) -> str:
    """A path as the user means it: `~` and environment variables are filled in, in every setting and argument alike.

    What exists under just this name is meant as it stands. Raises `UserError` for a variable that is not set.
    """
    if Path(text).exists():
        return text
    expanded = os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111 (an empty path stays empty)
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset:
        raise UserError(f"the path {text!r} contains {unset[0]}, and no such environment variable is set")
    return expanded


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable; a rename is durable only after its directory is synced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Return when the content of `path` is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def open_own(path: Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """Open a file for writing. Raises `UserError` if it is a symbolic link: in a directory that others may write to, a
    planted link would lead to a file of the user elsewhere."""

    def without_links(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    try:
        return open(path, mode, encoding=encoding, opener=without_links)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a symbolic link, and nothing is written through one; remove it") from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file in the directory of `path`; when the block ends well, it becomes `path`.

    If the block raises, the temporary file is removed and `path` stays as it was; an error of the system names `path`,
    not the temporary file. A killed process leaves `.NAME.PID.tmp` behind: see `remove_left_behind`. `durable=False`
    skips fsync: after a power cut `path` may be damaged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process that had this number
        open_own(temporary, "x").close()
        yield temporary
        if durable:
            fsync_file(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # where nothing can be removed, nothing could be made
            temporary.unlink(missing_ok=True)
    if durable:
        fsync_directory(path.parent)


def remove_left_behind(directory: Path) -> None:
    """Remove the temporary files of killed processes in `directory`, which nobody else may be writing to now."""
    for path in directory.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def representable(value: Any) -> Any:
    """`value` with None for every NaN and infinity, which JSON does not have: they must not end a run at its end."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: representable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [representable(part) for part in value]
    return value


def write_json_atomic(path: Path, content: Any) -> None:
    """Write indented JSON; NaN and infinity become null."""
    write_text_atomic(path, json.dumps(representable(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_tensors_atomic(path: Path, tensors: Mapping[str, Tensor], *, durable: bool = True) -> None:
    """Write tensors of any device to a safetensors file. `durable`: see `replacing`."""
    from safetensors.torch import save_file

    with replacing(path, durable=durable) as temporary:
        mode = temporary.stat().st_mode
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read; stores and weights are shared


def open_plain(path: Path) -> IO[bytes]:
    """Open a file for reading, as bytes.

    Raises `FileNotFoundError`, and `UserError` when it cannot be read or is a directory, a pipe or a device, which
    nobody should wait for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a file")
        return path.open("rb")
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {NOT_ALLOWED}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hex. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_line(path: Path, tail_bytes: int = 4096) -> str:
    """The last line of a text that is not empty; an empty string if there is none in the last few kilobytes."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - tail_bytes))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
