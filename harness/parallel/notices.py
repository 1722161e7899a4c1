"""What the first rank of a mesh tells ranks that were started with it and take no part in its exchanges."""

from __future__ import annotations

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]


class Notices:
    """One notice at a time, and counters, in the store at which all ranks have met."""

    def __init__(self, store: Store, listeners: int) -> None:
        """`listeners`: ranks that read the notices."""
        self._store, self.listeners = PrefixStore("notices", store), listeners

    def post(self, notice: str) -> None:
        self._store.set("notice", notice)

    def latest(self) -> str | None:
        """The last notice; empty before the first one, None when the process that holds the store has ended."""
        try:
            return self._store.get("notice").decode() if self._store.check(["notice"]) else ""
        except RuntimeError:
            return None

    def count(self, what: str, more: int = 0) -> int:
        """Add to a counter; returns its value."""
        return self._store.add(what, more)
