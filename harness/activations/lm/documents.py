"""The documents of one text or a mixture of texts, in an order that depends on their content and the seed.

A document is identified by the hash of its content, so that neither the order nor the choice of held-out documents
depends on the file system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from harness.activations.lm.hub import resolve_commit
from harness.activations.lm.text import texts
from harness.activations.shuffle import digest64
from harness.config import ActivationsConfig
from harness.files import user_path

CHARACTERS_PER_TOKEN = 4
"""About how many characters of text a token stands for."""
WINDOW_CHARACTERS = 1 << 26
"""Documents are sorted by hash within windows of this size, so that memory stays bounded for any text."""


class Document(NamedTuple):
    text: str
    digest: bytes
    """sha256 of the UTF-8 text, or of the ids."""
    ids: Int[np.ndarray, " tokens"] | None = None
    """Token ids of a text that comes tokenized; `text` is empty then."""

    @property
    def size(self) -> int:
        """Characters, or about as many as its ids stand for."""
        return len(self.text) if self.ids is None else CHARACTERS_PER_TOKEN * len(self.ids)


def documents(cfg: ActivationsConfig, revision: str) -> Iterator[Document]:
    """Distinct documents in an order that depends only on their content and `cfg.seed`.

    For a hub dataset, and for text longer than a window, it also depends on the order of the rows. `revision` is the
    resolved commit of a hub dataset; the texts of a mixture have their own. Raises `UserError` for text that cannot be
    read.
    """
    seen: set[bytes] = set()
    for document in _mixed(cfg) if cfg.mixture else _ordered(texts(cfg, revision), cfg.seed):
        if document.digest not in seen:
            seen.add(document.digest)
            yield document


def _mixed(cfg: ActivationsConfig) -> Iterator[Document]:
    """Always the next document of the text from which the fewest characters were taken, over its weight."""
    streams: list[Iterator[Document]] = []
    for text, _ in cfg.texts:
        commit = resolve_commit("dataset", text.dataset, text.dataset_revision) if is_hub_dataset(text) else ""
        streams.append(_ordered(texts(text, commit), cfg.seed))
    taken = [0.0] * len(streams)
    while True:
        number = min(range(len(streams)), key=taken.__getitem__)
        document = next(streams[number], None)
        if document is None:
            return
        taken[number] += document.size / cfg.texts[number][1]
        yield document


def is_hub_dataset(cfg: ActivationsConfig) -> bool:
    """Whether the text is a dataset on the hub, not in a local directory."""
    return cfg.text == "hub" and not Path(user_path(cfg.dataset)).is_dir()


def _ordered(each: Iterable[str | Int[np.ndarray, " tokens"]], seed: int) -> Iterator[Document]:
    window: list[Document] = []
    characters = 0
    for text in each:
        if isinstance(text, np.ndarray):
            window.append(Document("", hashlib.sha256(text.tobytes()).digest(), text))
        elif text.strip():
            # a lone surrogate is legal in JSON but has no UTF-8; it becomes a question mark
            encoded = text.encode("utf-8", errors="replace")
            window.append(Document(encoded.decode("utf-8"), hashlib.sha256(encoded).digest()))
        else:
            continue
        characters += window[-1].size
        if characters >= WINDOW_CHARACTERS:
            yield from _by_hash(window, seed)
            window, characters = [], 0
    yield from _by_hash(window, seed)


def _by_hash(window: list[Document], seed: int) -> list[Document]:
    return sorted(window, key=lambda document: digest64(seed, document.digest))
