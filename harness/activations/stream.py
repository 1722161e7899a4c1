"""Batches of a store: batch t is a pure function of (store, stream seed, t), read from memory-mapped shards."""

from __future__ import annotations

import bisect
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.activations.shuffle import permutation

BLOCK_ROWS = 16_384
"""A permuted epoch permutes blocks of this many rows, then the rows in each block: one sequential read per block."""
MAPPED_SHARDS = 64
"""Shards of a split that stay mapped: far fewer than a process may open files, enough for the blocks in use."""
PREFETCHED = 4
"""Batches that are prepared ahead."""


class Rows:
    """The rows of all shards as one long tensor, which is never in memory as a whole.

    A shard is mapped when a row of it is read; the last `MAPPED_SHARDS` stay mapped.
    """

    def __init__(self, sizes: Sequence[int], load: Callable[[int], Tensor], d_model: int, dtype: torch.dtype) -> None:
        """`sizes`: rows of each shard. `load(i)` maps shard i."""
        self._shard = functools.lru_cache(MAPPED_SHARDS)(load)
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self.total = self._starts[-1]
        self.d_model, self.dtype = d_model, dtype

    def slices(self, start: int, end: int) -> Iterator[Tensor]:
        """Rows `start` … `end`−1 as views of their shards, in order."""
        shard = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            stop = min(end, self._starts[shard + 1])
            yield self._shard(shard)[start - self._starts[shard] : stop - self._starts[shard]]
            start, shard = stop, shard + 1

    def read(self, start: int, end: int) -> Tensor:
        """Rows `start` … `end`−1 as one tensor: a view where they are in one shard, so that they are read from the disk
        when they are used; else a copy."""
        parts = self.slices(start, end)
        first = next(parts)
        if len(first) == end - start:
            return first
        rows, filled = torch.empty(end - start, self.d_model, dtype=self.dtype), 0
        for part in self.slices(start, end):
            rows[filled : filled + len(part)] = part
            filled += len(part)
        return rows


class Order:
    """The row of the store at each position of the endless stream.

    Position p belongs to epoch p // total. An epoch permutes the blocks of the store, and the rows in each block, by
    (seed, epoch, block). The store is shuffled already, so the first epoch of seed 0 is the store in its own order.
    """

    def __init__(self, total: int, seed: int) -> None:
        self._total, self._seed = total, seed
        self._blocks = functools.lru_cache(maxsize=2)(self._make_blocks)

    def _make_blocks(self, epoch: int) -> tuple[Int[np.ndarray, " blocks"], Int[np.ndarray, " blocks_plus_1"]]:
        """The blocks of an epoch in order, and the position in the epoch where each begins (and the last ends)."""
        count = -(-self._total // BLOCK_ROWS)
        order = permutation(count, "blocks", self._seed, epoch)
        sizes = np.minimum(BLOCK_ROWS, self._total - order * BLOCK_ROWS)
        return order, np.concatenate([[0], np.cumsum(sizes)])

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int | None, int, int]]:
        """Cut positions `start` … `end`−1 into pieces (epoch, block, first, last), each within one block of one epoch.

        `first` and `last` count the permuted rows of the block, `last` excluded. An epoch in the store's own order is
        not cut into blocks: its piece is (epoch, None, first row, last row) of the store.
        """
        while start < end:
            epoch, at = divmod(start, self._total)
            until = min(end - start + at, self._total)
            if epoch == 0 and self._seed == 0:
                yield epoch, None, at, until
            else:
                order, begins = self._blocks(epoch)
                number = int(np.searchsorted(begins, at, side="right")) - 1
                until = min(until, int(begins[number + 1]))
                yield epoch, int(order[number]), at - int(begins[number]), until - int(begins[number])
            start += until - at

    def within(self, epoch: int, block: int) -> Int[np.ndarray, " rows"]:
        """Order of the rows of a block in a permuted epoch."""
        rows = min(BLOCK_ROWS, self._total - block * BLOCK_ROWS)
        return permutation(rows, "rows", self._seed, epoch, block)


class StoreBatches:
    """Writes the rows of a stream at given positions: a pure function. The last permuted blocks are cached."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self._rows, self._order = rows, Order(rows.total, seed)
        self._permuted = functools.lru_cache(maxsize=2)(self._permute_block)

    def _permute_block(self, epoch: int, block: int) -> Tensor:
        start = block * BLOCK_ROWS
        rows = self._rows.read(start, min(start + BLOCK_ROWS, self._rows.total))
        return rows.index_select(0, torch.from_numpy(self._order.within(epoch, block)))

    def __call__(self, start: int, end: int, out: Tensor) -> None:
        filled = 0
        for epoch, block, first, last in self._order.pieces(start, end):
            in_order = block is None
            pieces = self._rows.slices(first, last) if in_order else [self._permuted(epoch, block)[first:last]]
            for rows in pieces:
                out[filled : filled + len(rows)] = rows
                filled += len(rows)


@runtime_checkable
class Batches(Protocol):
    """What a source gives to train on: rows, or whole contexts with rows."""

    def batch(self, step: int) -> Any: ...

    def batches(self, start_step: int) -> Iterator[Any]: ...

    def __enter__(self) -> Batches: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Stream:
    """The share of one replica in the batches of a stream.

    `fill(start, end, out)` writes the rows at stream positions `start` … `end`−1 into `out`. It is a pure function and
    is called from one thread at a time. `close`, or leaving the `with` block, stops the background threads.
    """

    def __init__(
        self,
        fill: Callable[[int, int, Tensor], None],
        d_model: int,
        dtype: torch.dtype,
        batch_tokens: int,
        device: torch.device,
        dp_rank: int,
        dp: int,
    ) -> None:
        if batch_tokens % dp:
            raise ValueError(f"train.batch_tokens={batch_tokens} is not divisible by mesh.dp={dp}; choose a multiple")
        self._fill, self._device = fill, device
        self._batch_tokens, self._rank, self._rows = batch_tokens, dp_rank, batch_tokens // dp
        self._shape, self._dtype = (self._rows, d_model), dtype
        self._pinned = device.type == "cuda"
        self._lock = threading.Lock()
        self._prefetchers: list[_Prefetcher] = []

    def batch(self, step: int) -> Float[Tensor, "rows d"]:
        """Rows r·B/dp … (r+1)·B/dp − 1 of batch `step` for replica r, in the storage dtype, on the device."""
        return self._to_device(self._host_batch(step))

    def batches(self, start_step: int) -> Generator[Float[Tensor, "rows d"], None, None]:
        """`batch(start_step)`, `batch(start_step + 1)`, … without end; a background thread prepares them ahead."""
        prefetcher = _Prefetcher(self._host_batch, start_step)
        self._prefetchers.append(prefetcher)
        try:
            yield from copied_ahead(prefetcher.each(), self._device) if self._pinned else prefetcher.each()
        finally:
            prefetcher.close()

    def close(self) -> None:
        """Stop the background threads; `batches` iterators end."""
        for prefetcher in self._prefetchers:
            prefetcher.close()
        self._prefetchers.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _host_batch(self, step: int) -> Tensor:
        start = step * self._batch_tokens + self._rank * self._rows
        out = torch.empty(self._shape, dtype=self._dtype, pin_memory=self._pinned)
        with self._lock:
            self._fill(start, start + self._rows, out)
        return out

    def _to_device(self, rows: Tensor) -> Tensor:
        # torch does not reuse a pinned buffer before the copy from it is done
        return rows.to(self._device, non_blocking=True) if self._pinned else rows


def copied_ahead(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on the GPU `device`; each is copied from pinned memory while the one before is in use."""
    copying = torch.cuda.Stream(device)

    def copy() -> tuple[Tensor, torch.cuda.Event] | None:
        rows = next(batches, None)
        if rows is None:
            return None
        copied = torch.cuda.Event()
        with torch.cuda.stream(copying):
            rows = rows.to(device, non_blocking=True)
            copied.record(copying)
        return rows, copied

    ahead = copy()
    while ahead is not None:
        (rows, copied), ahead = ahead, copy()
        using = torch.cuda.current_stream(device)
        using.wait_event(copied)
        rows.record_stream(using)  # its memory is reused only after what `using` has queued by then
        yield rows


class _Prefetcher:
    """A thread that keeps a few batches ready. `next` raises an error that happened in it."""

    def __init__(self, make: Callable[[int], Tensor], start_step: int) -> None:
        self._make = make
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=PREFETCHED)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="stream", daemon=True)
        self._thread.start()

    def next(self) -> Tensor | None:
        while not self._end.is_set():
            try:
                item = self._ready.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        return None

    def each(self) -> Iterator[Tensor]:
        """All batches until `close`."""
        while (rows := self.next()) is not None:
            yield rows

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _work(self, step: int) -> None:
        while not self._end.is_set():
            try:
                made: Any = self._make(step)
            except Exception as error:  # `next` raises it in the reader's thread
                made = error
            while not self._end.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, Exception):
                return
            step += 1
