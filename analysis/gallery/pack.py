"""Columns of numbers as a script file, because a page of the file system may not fetch: `receive(name, text)`.

The text is base64 of gzip of: the length of a JSON header (4 bytes, little-endian), the header, and the columns one
after the other, each at a multiple of 8 bytes. The header says where each begins, its type and its shape, and holds
whatever is no column. No text of others is ever written as script: base64 has no quotes.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"u1", "u2", "u4", "i2", "i4", "f2", "f4"}
"""Of columns, little-endian, as numpy names them."""


def packed(columns: Mapping[str, np.ndarray], **content: Any) -> str:
    """`columns` have one of `TYPES`; `content` is JSON."""
    places: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, column in columns.items():
        kind = column.dtype.str[1:]
        assert kind in TYPES, f"{name}: {kind}"
        data = column.astype(f"<{kind}").tobytes()
        places[name] = {"type": kind, "shape": column.shape, "at": offset}
        parts += [data, b"\0" * (-len(data) % 8)]
        offset += len(data) + (-len(data) % 8)
    header = json.dumps({"columns": places, **content}, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(4 + len(header)) % 8)
    raw = len(header).to_bytes(4, "little") + header + b"".join(parts)
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def write_script(folder: Path, name: str, columns: Mapping[str, np.ndarray], **content: Any) -> None:
    """Write `<folder>/<name>.js`. `name` is one of ours."""
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'receive("{name}", "{packed(columns, **content)}");\n', encoding="ascii")


def smallest(values: np.ndarray) -> np.ndarray:
    """Whole numbers that are not negative, in the smallest type that holds them."""
    top = int(values.max()) if values.size else 0
    return values.astype("u1" if top < 2**8 else "u2" if top < 2**16 else "u4")


def shares(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`values` in 65535ths of `whole`, which is their largest."""
    return np.round(values / np.where(whole > 0, whole, 1) * 65535).clip(0, 65535).astype(np.uint16)
