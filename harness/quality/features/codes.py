"""The activations of one SAE on a text, on the disk: in the order of tokens, and gathered by latent.

Both files grow with the activations; in memory are 8 bytes a token, one chunk that is written, and the activations of
the latents that are read. So a text may be longer than memory, and what is computed from it is exact all the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

_CHUNK = 1 << 20
"""Activations that are sorted and written at once."""
_ENTRY = np.dtype([("latent", np.int32), ("token", np.int32), ("value", np.float32)])


class Entries(NamedTuple):
    """Activations of some latents, by latent and then by token."""

    latent: Int32[np.ndarray, " entries"]
    token: Int32[np.ndarray, " entries"]
    """Number of the token among those that are judged."""
    value: Float32[np.ndarray, " entries"]


class CodeFiles:
    """`add` the activations of all tokens, `finish`, then read."""

    def __init__(self, folder: Path, n_latents: int) -> None:
        folder.mkdir(parents=True)
        self.n_latents = n_latents
        self._by_token, self._by_latent = folder / "by_token", folder / "by_latent"
        self._tokens_file, self._latents_file = self._by_token.open("wb"), self._by_latent.open("wb")
        self._waiting: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._tokens = self._entries = 0
        self._starts: list[np.ndarray] = []  # per chunk: where each latent begins in `by_latent`

    def add(self, values: Float32[np.ndarray, "tokens k"], index: Int64[np.ndarray, "tokens k"]) -> None:
        """The activations of the next tokens; values that are not above 0 are no entries."""
        row, column = np.nonzero(values > 0)
        entries = np.empty(len(row), _ENTRY)
        entries["latent"], entries["token"] = index[row, column], row + self._tokens
        entries["value"] = values[row, column]
        self._ends.append(self._entries + np.bincount(row, minlength=len(values)).cumsum())
        self._tokens += len(values)
        self._entries += len(entries)
        self._waiting.append(entries)
        if sum(map(len, self._waiting)) >= _CHUNK:
            self._write()

    def _write(self) -> None:
        entries = np.concatenate([np.empty(0, _ENTRY), *self._waiting])
        self._waiting = []
        entries.tofile(self._tokens_file)
        entries = entries[entries["latent"].argsort(kind="stable")]
        before = self._starts[-1][-1] if self._starts else 0
        self._starts.append(before + np.searchsorted(entries["latent"], np.arange(self.n_latents + 1)))
        entries.tofile(self._latents_file)

    def finish(self) -> None:
        self._write()
        self._tokens_file.close()
        self._latents_file.close()
        self.ends = np.concatenate([np.zeros(1, np.int64), *self._ends])
        self._ends = []

    @property
    def tokens(self) -> int:
        return self._tokens

    def of_latents(self, first: int, last: int) -> Entries:
        """All activations of the latents `first` … `last` − 1."""
        parts = [_read(self._by_latent, int(starts[first]), int(starts[last])) for starts in self._starts]
        entries = np.concatenate(parts)
        entries = entries[entries["latent"].argsort(kind="stable")]  # chunks are in the order of tokens
        return Entries(*(np.ascontiguousarray(entries[name]) for name in Entries._fields))

    def of_tokens(self, first: int, last: int) -> Entries:
        """All activations at the tokens `first` … `last` − 1, by token."""
        entries = _read(self._by_token, int(self.ends[first]), int(self.ends[last]))
        return Entries(*(np.ascontiguousarray(entries[name]) for name in Entries._fields))


def _read(path: Path, begin: int, end: int) -> np.ndarray:
    return np.fromfile(path, _ENTRY, end - begin, offset=begin * _ENTRY.itemsize)
