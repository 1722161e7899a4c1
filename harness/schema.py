"""What a file must hold. Every file that the harness reads is checked here when it is read; behind it, it is trusted.

PLAN = fields({"calibrations": list_of(ANYTHING), "runs": dict_of(fields({"tokens": optional(whole())}))})
plan = read_json(path, PLAN, "remove it and launch the sweep again")
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import UserError
from harness.files import open_plain, representable

Check = Callable[[Any, str], None]
"""Raises `ValueError` if a value is not what it must be. The string is its key, such as `runs[2].tokens`."""

MAX_BYTES = 2**26
"""Of a file that is read whole; the largest of ours, the plan of ten thousand runs, has three million."""


def _refuse(value: Any, key: str, wanted: str) -> NoReturn:
    kind = type(value).__name__
    shown = "null" if value is None else kind if isinstance(value, list | dict) else f"{value!r:.40}"
    raise ValueError(f"{key or 'the content'} must be {wanted}, not {shown}")


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Check:
    """A finite number from `low` to `high`, and above `above`."""
    bounds = [
        f"{word} {bound:g}" for word, bound in (("from", low), ("to", high), ("above", above)) if abs(bound) < 1e99
    ]

    def check(value: Any, key: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(value, key, "a number")
        if not (abs(value) <= sys.float_info.max and low <= value <= high and value > above):
            text = "a huge whole number" if isinstance(value, int) and abs(value) > 2**63 else f"{value:g}"
            raise ValueError(f"{key} must be a number {' '.join(bounds) or 'that is finite'}, not {text}")

    return check


def whole(low: int = 0) -> Check:
    """A whole number of at least `low` that fits into 64 bits."""
    finite = number(low, 2**63 - 1)

    def check(value: Any, key: str) -> None:
        finite(value, key)
        if not isinstance(value, int):
            _refuse(value, key, "a whole number")

    return check


def text(pattern: str = r"(?s:.*)", wanted: str = "a text") -> Check:
    """A text that matches `pattern`; `wanted` says that in words."""
    compiled = re.compile(pattern)

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str) or not compiled.fullmatch(value) or _SURROGATE.search(value):
            _refuse(value, key, wanted)

    return check


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: JSON can hold it, and no terminal can show it."""


def one_of(*values: str) -> Check:
    return text("|".join(map(re.escape, values)), f"one of {', '.join(values)}")


def optional(check: Check) -> Check:
    """Null, or what `check` wants."""
    return lambda value, key: None if value is None else check(value, key)


def list_of(item: Check) -> Check:
    def check(value: Any, key: str) -> None:
        if not isinstance(value, list):
            _refuse(value, key, "a list")
        for place, part in enumerate(value):
            item(part, f"{key}[{place}]")

    return check


def dict_of(item: Check, name: Check | None = None) -> Check:
    """An object with any keys; `name` checks each of them."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, key, "an object")
        for part, content in value.items():
            inner = f"{key}.{part:.80}".lstrip(".")
            if name is not None:
                name(part, inner)
            item(content, inner)

    return check


def fields(checks: Mapping[str, Check]) -> Check:
    """An object with these keys; a key that ends in `?` may be missing. Other keys are allowed."""
    known = [(name.removesuffix("?"), name.endswith("?"), item) for name, item in checks.items()]

    def check(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, key, "an object")
        for name, may_be_missing, item in known:
            inner = f"{key}.{name}".lstrip(".")
            if name in value:
                item(value[name], inner)
            elif not may_be_missing:
                raise ValueError(f"{inner} is missing")

    return check


def ANYTHING(value: Any, key: str) -> None:
    """Accepts every value."""


def FLAG(value: Any, key: str) -> None:
    """Accepts true and false."""
    if not isinstance(value, bool):
        _refuse(value, key, "true or false")


TEXT = text()
OBJECT = fields({})
FILE_NAME = text(r"(?!\.)[^/\\\x00-\x1f]{1,255}", "the name of a file in the same directory")
SHA256 = text(r"[0-9a-f]{64}", "a sha256 in 64 hex digits")


SEAL = "sha256"
"""Key of a sealed file: the hash of all its other keys."""


def with_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its own hash, so that a change by hand or by a disk is found."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    canonical = json.dumps(representable(rest), sort_keys=True, allow_nan=False).encode()
    return rest | {SEAL: hashlib.sha256(canonical).hexdigest()}


def sealed(check: Check) -> Check:
    """What `check` accepts, unchanged since `with_seal`. Files of earlier versions have no seal and are accepted."""

    def whole_check(value: Any, key: str) -> None:
        check(value, key)
        if SEAL in value and with_seal(value)[SEAL] != value[SEAL]:
            raise ValueError(f"it was changed after it was written: its {SEAL} is not that of its content")

    return whole_check


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8.

    Raises `FileNotFoundError`, and `UserError` for everything else: no permission, a directory or a pipe in its place,
    bytes that are no UTF-8, a file that is too large to be one of ours.
    """
    with open_plain(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES} bytes, more than any file of this kind")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged (byte {error.start} is not UTF-8)") from error


def parse_json(content: str | bytes) -> Any:
    """A JSON value. Raises `ValueError` for what is not JSON, NaN and infinity included, and for what is nested or long
    beyond sense."""
    try:
        return json.loads(content, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path, check: Check, advice: str) -> Any:
    """The content of a JSON file that `check` accepts.

    Raises `FileNotFoundError`, and `UserError` in one line: the file, the key, and `advice`, what to do.
    """
    try:
        content = parse_json(read_text(path))
        check(content, "")
        return content
    except UserError as error:
        if isinstance(error.__cause__, PermissionError):
            raise  # what to do is said already
        raise UserError(f"{error}; {advice}") from error
    except ValueError as error:
        reason = "".join(mark if mark.isprintable() else "?" for mark in " ".join(str(error).split()))
        raise UserError(f"{path} is damaged ({reason}); {advice}") from error
