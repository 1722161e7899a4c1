"""The training text cut into windows, one after the other, from any place that is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from harness.activations.lm.contexts import Encoder, Special, Writer, batched, is_heldout, pieces
from harness.activations.lm.documents import documents
from harness.config import ActivationsConfig


class TextWindows:
    """Cuts the training documents into windows of `cfg.window_tokens` rows each. The held-out documents are those of
    the store: the share `heldout_share` by content."""

    def __init__(
        self,
        cfg: ActivationsConfig,
        tokenizer: Any,
        special: Special,
        revision: str,
        heldout_share: float,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        """Begin at `start`: documents before it, and contexts of the next document before it."""
        self._cfg, self._special, self._encode = cfg, special, Encoder(tokenizer)
        self._documents, self._contexts = start
        self._read = self._encoded(revision, heldout_share)
        self._current: Iterator[tuple[Int[np.ndarray, " length"], int]] = iter(())

    @property
    def place(self) -> tuple[int, int]:
        """Where the next window begins."""
        return self._documents, self._contexts

    def cut(self, directory: Path) -> bool:
        """Write the contexts of the next window to `directory`. Returns whether the text had enough for it."""
        rows = round(self._cfg.window_tokens)
        writer = Writer(directory, "train", rows, rows)
        try:
            while not writer.full:
                context, kept = next(self._current, (None, 0))
                if context is not None:
                    self._contexts += 1
                    writer.begin_document(self._documents)
                    writer.add(context, kept)
                elif not self._next_document():
                    break
        finally:
            writer.close()
        return writer.full

    def _next_document(self) -> bool:
        """Go to the next training document; false at the end of the text."""
        number, ids = next(self._read, (-1, None))
        if ids is None:
            return False
        before = self._contexts if number == self._documents else 0
        self._documents, self._contexts = number, before
        self._current = itertools.islice(pieces(ids, self._special, self._cfg), before, None)
        return True

    def _encoded(self, revision: str, share: float) -> Iterator[tuple[int, Int[np.ndarray, " tokens"]]]:
        numbered = enumerate(documents(self._cfg, revision))
        wanted = (
            (number, "train", document)
            for number, document in itertools.islice(numbered, self._documents, None)
            if not is_heldout(document, share)
        )
        for batch in batched(wanted):
            encoded = self._encode([document for _, _, document in batch])
            yield from ((number, ids) for (number, _, _), ids in zip(batch, encoded, strict=True))
