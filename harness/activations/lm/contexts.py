"""From documents to contexts: which token ids the language model sees, and which of their positions become rows.

The contexts are written to disk, so that a resumed harvest needs neither the text nor the hub again.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from harness.activations.lm.documents import Document, documents
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import open_own
from harness.process.signals import Interrupted, StopFlag

SPLITS = ("train", "heldout")
HELDOUT_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Possible shares of held-out documents, which are chosen by the hash of their content. The smallest that gives enough
rows is taken. A document held out at one share is held out at every larger one."""
HELDOUT_DOCUMENTS = (384, 128, 32, 8)
"""Smallest numbers of held-out documents that are tried, the largest first: each document gives at most that part of
the held-out rows. The standard error of fvu falls with the number of documents, so many documents matter more than a
small held-out share. If no number and share give enough rows, a document may give any number."""
_TOKENIZE_CHARACTERS = 1 << 20
"""Characters given to the tokenizer at once: enough to keep a parallel one busy."""
_REMEMBERED_TOKENS = 1 << 24
"""Tokens kept in memory for a text that is read again."""
_TABLES = ("offsets", "rows", "document")
"""Files of a split beside its `ids`, see `Contexts`."""


class Special(NamedTuple):
    """Token ids that the tokenizer puts around every context, and ids that never become rows."""

    prefix: list[int]
    suffix: list[int]
    dropped: list[int]


def special_tokens(tokenizer: Any, text: str = "") -> Special:
    """The special tokens of any tokenizer, read off the encoding of a word. None is put around contexts of
    `text=tokens`, which are the ids as they come.

    Dropped are all tokens that the tokenizer calls special, markers of a chat included. The id for unknown words stands
    for content, so it is dropped only if it is also another special token. Raises `UserError` for a tokenizer that
    encodes the word differently with special tokens.
    """
    probe = "word"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if not bare or not starts:
        raise UserError("the tokenizer encodes text differently with and without special tokens; it is not supported")
    prefix, suffix = full[: starts[0]], full[starts[0] + len(bare) :]
    around = [*prefix, *suffix]
    if text == "tokens":
        prefix, suffix = [], []
    names = ("bos", "eos", "cls", "sep", "pad", "mask")
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    others = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return Special(prefix, suffix, sorted({*around, *others, *(token for token in named if token is not None)}))


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts of a split, in the order of their documents."""

    ids: Int[np.ndarray, " tokens"]
    """Token ids of all contexts, one after the other, special tokens included; memory-mapped."""
    offsets: Int[np.ndarray, " contexts_plus_1"]
    """Where each context begins in `ids`."""
    rows: Int[np.ndarray, " contexts_plus_1"]
    """Where the rows of each context begin among the rows of the split."""
    document: Int[np.ndarray, " contexts"]
    """The document each context comes from, numbered in reading order."""

    @property
    def count(self) -> int:
        return len(self.document)

    @property
    def total_rows(self) -> int:
        return int(self.rows[-1])


def kept_positions(
    ids: Int[np.ndarray, " length"], dropped: Iterable[int], drop_first: bool
) -> Bool[np.ndarray, " length"]:
    """Which positions of a context become rows: not those of `dropped` ids, and with `drop_first` not position 0."""
    kept = ~np.isin(ids, list(dropped))
    if drop_first:
        kept[:1] = False
    return kept


class Cut(NamedTuple):
    """What `cut_contexts` read and how it divided it."""

    heldout_share: float
    documents: int
    """Documents that gave rows, in both splits."""
    text_exhausted: bool
    """Whether the text ended before both splits had all their rows."""
    largest_id: int
    """Largest token id."""


def cut_contexts(
    cfg: ActivationsConfig, tokenizer: Any, special: Special, revision: str, directory: Path, stop: StopFlag
) -> Cut:
    """Read documents until both splits have their rows or the text ends; write the contexts to `directory`.

    Training rows never come from a held-out document. Raises `UserError` when a split would be empty, `Interrupted`
    when `stop` is set.
    """
    wanted = {"train": round(cfg.stored_tokens), "heldout": round(cfg.heldout_tokens)}
    if cfg.context <= len(special.prefix) + len(special.suffix):
        raise UserError(f"activations.context={cfg.context} has no room beside the special tokens; raise it")
    needed = wanted["heldout"] / (round(cfg.tokens) + wanted["heldout"])
    shares = [share for share in HELDOUT_SHARES if share >= needed] or [HELDOUT_SHARES[-1]]
    encode = Encoder(tokenizer)

    def cut(splits: tuple[str, ...], share: float, fewest: int) -> dict[str, Writer]:
        most = {"train": wanted["train"], "heldout": max(1, wanted["heldout"] // fewest)}
        writers = {split: Writer(directory, split, wanted[split], most[split]) for split in splits}
        _read(documents(cfg, revision), encode, special, cfg, share, writers, stop)
        return writers

    # A text that ends before there are enough held-out rows is read again: until a division gives them, and then
    # for its training rows. A long text is read once.
    attempts = itertools.product((*HELDOUT_DOCUMENTS, 1), shares)
    fewest, share = next(attempts)
    writers = cut(SPLITS, share, fewest)
    while not writers["heldout"].full and (attempt := next(attempts, None)):
        fewest, share = attempt
        writers |= cut(("heldout",), share, fewest)
    if share != shares[0]:
        writers |= cut(("train",), share, fewest)
    used = sum(writer.documents for writer in writers.values())
    for split, name in (("heldout", "held-out"), ("train", "training")):
        if not writers[split].total_rows:
            raise UserError(
                f"activations.text={cfg.text}: the text is too small, {used} documents leave no {name} rows "
                f"({writers['train'].total_rows:,} training and {writers['heldout'].total_rows:,} held-out rows were "
                f"found, {wanted['train']:,} and {wanted['heldout']:,} are wanted); give more or longer text"
            )
    exhausted = any(not writer.full for writer in writers.values())
    return Cut(share, used, exhausted, max(writer.largest_id for writer in writers.values()))


def _read(
    read: Iterable[Document],
    encode: Encoder,
    special: Special,
    cfg: ActivationsConfig,
    share: float,
    writers: dict[str, Writer],
    stop: StopFlag,
) -> None:
    """Cut documents into contexts until every writer is full or the text ends."""
    try:
        for batch in batched(_needed(read, writers, share)):
            if stop.requested:
                raise Interrupted
            encoded = encode([document for _, _, document in batch])
            for (number, split, _), ids in zip(batch, encoded, strict=True):
                writers[split].begin_document(number)
                for context, kept in pieces(ids, special, cfg):
                    if not writers[split].add(context, kept):
                        break
    finally:
        for writer in writers.values():
            writer.close()


def pieces(
    ids: Int[np.ndarray, " tokens"], special: Special, cfg: ActivationsConfig
) -> Iterator[tuple[Int[np.ndarray, " length"], int]]:
    """The contexts of a document, and how many positions of each become rows."""
    size = cfg.context - len(special.prefix) - len(special.suffix)
    for start in range(0, len(ids), size):
        context = np.array([*special.prefix, *ids[start : start + size], *special.suffix], np.int32)
        yield context, int(kept_positions(context, special.dropped, cfg.drop_first_position).sum())


def is_heldout(document: Document, share: float) -> bool:
    """Whether a document is among the held-out ones, which its content decides."""
    return int.from_bytes(document.digest[:8], "big") < share * 2**64


class Encoder:
    """Tokenizes documents, and remembers the first ones for when a small text is read again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._remembered: dict[bytes, Int[np.ndarray, " tokens"]] = {}
        self._room = _REMEMBERED_TOKENS

    def __call__(self, batch: list[Document]) -> list[Int[np.ndarray, " tokens"]]:
        unknown = [each for each in batch if each.ids is None and each.digest not in self._remembered]
        new: dict[bytes, Int[np.ndarray, " tokens"]] = {}
        if unknown:
            texts = [document.text for document in unknown]
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            new = {d.digest: np.array(ids, np.int32) for d, ids in zip(unknown, encoded, strict=True)}
        known = {document.digest: document.ids for document in batch if document.ids is not None} | new
        encoded_batch = [known[d.digest] if d.digest in known else self._remembered[d.digest] for d in batch]
        if self._room > 0:
            self._remembered |= new
            self._room -= sum(map(len, new.values()))
        return encoded_batch


def _needed(read: Iterable[Document], writers: dict[str, Writer], share: float) -> Iterator[tuple[int, str, Document]]:
    """Number, split and document, for documents of splits that are not full. Ends when all splits are full."""
    for number, document in enumerate(read):
        if all(writer.full for writer in writers.values()):
            return
        split = "heldout" if is_heldout(document, share) else "train"
        if split in writers and not writers[split].full:
            yield number, split, document


def batched(read: Iterable[tuple[int, str, Document]]) -> Iterator[list[tuple[int, str, Document]]]:
    """Batches of about `_TOKENIZE_CHARACTERS` characters."""
    batch: list[tuple[int, str, Document]] = []
    characters = 0
    for item in read:
        batch.append(item)
        characters += item[2].size
        if characters >= _TOKENIZE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Writer:
    """Writes the contexts of a split to disk until it has `wanted` rows, at most `most` of them from one document."""

    def __init__(self, directory: Path, split: str, wanted: int, most: int) -> None:
        self._directory, self._split, self._wanted, self._most = directory, split, wanted, most
        self._file = open_own(directory / f"{split}.ids", "wb")
        self._offsets, self._rows, self._document = [0], [0], []
        self._number = self._before = 0
        self.largest_id = 0

    @property
    def total_rows(self) -> int:
        return self._rows[-1]

    @property
    def full(self) -> bool:
        return self.total_rows >= self._wanted

    @property
    def documents(self) -> int:
        """Number of documents that gave rows."""
        return len(set(self._document))

    def begin_document(self, number: int) -> None:
        self._number, self._before = number, self.total_rows

    def add(self, context: Int[np.ndarray, " length"], rows: int) -> bool:
        """Take up to `rows` rows of a context. Return whether further contexts of this document may be added."""
        room = min(self._wanted, self._before + self._most) - self.total_rows
        rows = min(rows, room)
        if rows > 0:
            self._file.write(context.tobytes())
            self._offsets.append(self._offsets[-1] + len(context))
            self._rows.append(self._rows[-1] + rows)
            self._document.append(self._number)
            self.largest_id = max(self.largest_id, int(context.max()))
        return rows < room

    def close(self) -> None:
        self._file.close()
        for name, values in zip(_TABLES, (self._offsets, self._rows, self._document), strict=True):
            with open_own(self._directory / f"{self._split}.{name}", "wb") as file:
                file.write(np.array(values, np.int64).tobytes())


def open_contexts(directory: Path, split: str) -> Contexts:
    """The contexts that `cut_contexts` wrote."""
    tables = (np.fromfile(directory / f"{split}.{name}", np.int64) for name in _TABLES)
    return Contexts(np.memmap(directory / f"{split}.ids", np.int32, "r"), *tables)


def link_contexts(directory: Path, other: Path) -> None:
    """Give `other` the contexts of `directory`, without a copy on the disk where there are hard links."""
    remove_contexts(other)
    for split in SPLITS:
        for name in ("ids", *_TABLES):
            file = f"{split}.{name}"
            try:
                os.link(directory / file, other / file)
            except OSError:
                shutil.copyfile(directory / file, other / file)


def remove_contexts(directory: Path) -> None:
    """Remove the files that `cut_contexts` wrote, if they exist."""
    for split in SPLITS:
        for name in ("ids", *_TABLES):
            (directory / f"{split}.{name}").unlink(missing_ok=True)
