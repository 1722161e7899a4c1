"""A source whose rows are never all on the disk: two windows of them are, beside the store of the first rows.

The store gives what is needed before training: statistics, a sample for the initial values, and all held-out rows.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from harness.activations.source import DTYPES
from harness.activations.statistics import Statistics
from harness.activations.store.read import Store
from harness.activations.stream import Stream
from harness.activations.window import layout
from harness.activations.window.lm_ranks import LmRanks
from harness.activations.window.own_process import OwnProcess
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.parallel import Shards
from harness.parallel.notices import Notices
from harness.process.together import together

POLL_S = 0.05
"""Between two looks for a window that is being computed."""


class Windows:
    """An `ActivationSource` that computes its rows while they are trained on."""

    dictionary = None

    def __init__(
        self, store: Store, cfg: ActivationsConfig, directory: Path, shards: Shards, notices: Notices | None = None
    ) -> None:
        """`directory`: where the windows of this store lie. `shards`: the ranks that read the same windows.
        `notices`: to ranks of their own that compute them; without such, a process on the machine of rank 0 does."""
        self._store, self._cfg, self._directory, self._shards = store, cfg, directory, shards
        self._notices = notices
        self.id, self.d_model, self.heldout_rows = store.id, store.d_model, store.heldout_rows
        self.description: dict[str, Any] = {**store.description, "window_tokens": round(cfg.window_tokens)}

    @property
    def train_rows(self) -> int | None:
        """Rows before one repeats: of all windows of the text."""
        rows = round(self._cfg.window_tokens)
        known = layout.read_places(self._directory / layout.TEXT).windows
        return rows * min(known or sys.maxsize, max(1, round(self._cfg.tokens) // rows))

    def statistics(self, layernorm: bool) -> Statistics:
        return self._store.statistics(layernorm)

    def sample(self) -> Float[Tensor, "rows d"]:
        return self._store.sample()

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        return self._store.heldout(batch_rows)

    def stream(self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1) -> Stream:
        producer = None
        if self._shards.rank == 0:
            store = self._directory.with_suffix("")
            if self._notices is None:
                producer = OwnProcess(self._directory, self._cfg, store)
            else:
                producer = LmRanks(self._directory, self._cfg, store, self._notices)
        rows = WindowRows(self._directory, round(self._cfg.window_tokens), seed, producer, self._shards)
        dtype = DTYPES[self._cfg.dtype]
        return WindowStream(rows, self.d_model, dtype, batch_tokens, device, dp_rank, dp)


@runtime_checkable
class WindowProducer(Protocol):
    """Who computes the windows, as the first rank sees it."""

    def open(self, window: int) -> int:
        """Begin to read at `window`; returns the number of the slot where the windows will be."""
        ...

    def train_on(self, window: int) -> None:
        """Tell that `window` and the next one are needed, and none before."""
        ...

    def check(self) -> None:
        """See to it that windows come. Raises `OSError` if none will."""
        ...

    def close(self) -> None: ...


class WindowRows:
    """Writes the rows of a stream at given positions: a pure function. It waits for windows that are not there yet."""

    def __init__(
        self, directory: Path, window_rows: int, seed: int, producer: WindowProducer | None, shards: Shards
    ) -> None:
        self._directory, self.window_rows, self._seed, self.producer = directory, window_rows, seed, producer
        self._shards, self._slot = shards, Path()
        self._opened = functools.lru_cache(maxsize=2)(self._open)
        self.closed = False
        self.waited_s = 0.0
        """Seconds spent waiting for windows."""

    def train_on(self, window: int) -> None:
        """Tell the producer which window is trained on. The first call finds it, together with the other ranks."""
        if self._slot != Path():
            if self.producer is not None:
                self.producer.train_on(window)
            return
        number = torch.zeros(1, dtype=torch.int64)
        with together(self._shards, patient=True):
            if self.producer is not None:
                number[0] = self.producer.open(window)
        self._slot = layout.slot_path(self._directory, int(self._shards.sum_(number, "all", "scalars")))

    def __call__(self, start: int, end: int, out: Tensor) -> None:
        filled = 0
        while start < end:
            window, first = divmod(start, self.window_rows)
            last = min(self.window_rows, first + end - start)
            begins, units = self._opened(window)
            rows = layout.shuffled_rows(first, last, int(begins[-1]), self._seed, window)
            part = out[filled : filled + last - first]
            unit_of = np.searchsorted(begins, rows, side="right") - 1
            for unit in np.unique(unit_of):
                here = np.flatnonzero(unit_of == unit)
                part[torch.from_numpy(here)] = units[unit][torch.from_numpy(rows[here] - begins[unit])]
            start, filled = start + last - first, filled + last - first

    def _open(self, window: int) -> tuple[Int[np.ndarray, " units_plus_1"], list[Tensor]]:
        path = layout.window_path(self._slot, window)
        self._wait_for(path)
        counts = layout.rows_of_units(path)
        units = []
        for unit in range(len(counts)):
            with safe_open(layout.unit_file(path, unit), framework="pt") as file:
                units.append(file.get_tensor("x"))
        return np.concatenate([[0], np.cumsum(counts)]), units

    def _wait_for(self, path: Path) -> None:
        begun = time.monotonic()
        while not layout.is_whole(path):
            if self.closed:
                raise OSError("the stream was closed")
            failed = self._slot / layout.FAILED
            if failed.is_file():
                raise UserError(failed.read_text(encoding="utf-8"))
            if self.producer is not None:
                self.producer.check()
            time.sleep(POLL_S)
        self.waited_s += time.monotonic() - begun


class WindowStream(Stream):
    """A `Stream` that tells the producer, on the rank that has it, which window is trained on."""

    def __init__(
        self,
        rows: WindowRows,
        d_model: int,
        dtype: torch.dtype,
        batch_tokens: int,
        device: torch.device,
        dp_rank: int,
        dp: int,
    ) -> None:
        super().__init__(rows, d_model, dtype, batch_tokens, device, dp_rank, dp)
        self._window_rows = rows

    def batches(self, start_step: int) -> Generator[Float[Tensor, "rows d"], None, None]:
        self._train_on(start_step)
        self._window_rows.closed = False
        ahead = super().batches(start_step)
        try:
            for step, batch in enumerate(ahead, start_step):
                # every rank has its rows of all earlier batches by now, so their windows are not needed any more
                self._train_on(step)
                yield batch
        finally:
            # first, because the thread that reads ahead may wait for a window that nobody needs now
            self._window_rows.closed = True
            ahead.close()

    def batch(self, step: int) -> Float[Tensor, "rows d"]:
        self._train_on(step)
        return super().batch(step)

    def close(self) -> None:
        self._window_rows.closed = True
        super().close()
        if self._window_rows.producer is not None:
            self._window_rows.producer.close()

    def _train_on(self, step: int) -> None:
        self._window_rows.train_on(step * self._batch_tokens // self._window_rows.window_rows)
