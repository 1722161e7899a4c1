"""The contexts and tokens that the pages of one text show, once for all SAEs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.gallery.subjects import Subject


class Text:
    """Contexts and tokens by consecutive numbers, so that few bytes name one."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        contexts = [subject.table("contexts") for subject in subjects]
        tokens = [subject.table("tokens") for subject in subjects]
        self._context, first = np.unique(np.concatenate([each["context"] for each in contexts]), return_index=True)
        self.ids = np.concatenate([each["ids"] for each in contexts])[first]
        self.document = np.concatenate([each["document"] for each in contexts])[first]
        self._token, first = np.unique(np.concatenate([each["token"] for each in tokens]), return_index=True)
        every = [text for each in tokens for text in each["text"]]
        self.words: list[str] = [every[place] for place in first]

    @property
    def length(self) -> int:
        """Tokens of a context."""
        return self.ids.shape[1]

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of tokens, from 1; 0 stands for none (−1)."""
        return np.where(ids < 0, 0, np.searchsorted(self._token, ids) + 1)

    def contexts(self, numbers: np.ndarray) -> np.ndarray:
        """The same for contexts."""
        return np.where(numbers < 0, 0, np.searchsorted(self._context, numbers) + 1)
