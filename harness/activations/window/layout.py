"""The files of windows, and which row of which window each position of the stream is.

<store>.windows/text.json            where each window begins in the text; outlives a run
<store>.windows/slots.lock           held while a training looks for a slot or leaves one
<store>.windows/<slot>.lock          held by the process that computes, or by the training that has ranks for it
<store>.windows/<slot>/              of the trainings that share a producer
    request.json                     what the producer is to compute
    address                          where further trainings of its machine reach it
    window-000012/                   a whole window: unit files and window.json
    window-000013.partial/           one that is being computed; `cut` says that its text is there
    failed.txt                       why the producer ended
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from harness.activations.shuffle import permute
from harness.schema import fields, list_of, optional, read_json, whole

REQUEST = "request.json"
FAILED = "failed.txt"
WINDOW = "window.json"
"""In a whole window: the rows of each unit. It is written last."""
TEXT = "text.json"
ADDRESS = "address"
MOST_SLOTS = 64
"""Groups of trainings that share windows, of one store at the same time."""

_WINDOW = fields({"rows": list_of(whole())})
_TEXT = fields({"starts": list_of(list_of(whole())), "windows": optional(whole(1))})


def window_path(slot: Path, window: int) -> Path:
    return slot / f"window-{window:06d}"


def is_whole(path: Path) -> bool:
    return (path / WINDOW).is_file()


def slot_path(directory: Path, slot: int) -> Path:
    return directory / str(slot)


def slot_lock(directory: Path, slot: int) -> Path:
    return directory / f"{slot}.lock"


def slots_lock(directory: Path) -> Path:
    return directory / "slots.lock"


def cut_file(partial: Path) -> Path:
    """In a window that is being computed: its text is there."""
    return partial / "cut"


def unit_file(window: Path, unit: int) -> Path:
    return window / f"unit-{unit:05d}.safetensors"


def rows_of_units(window: Path) -> list[int]:
    """Rows of the unit files of a whole window."""
    return read_json(window / WINDOW, _WINDOW, f"delete {window.parent}: its windows are computed again")["rows"]


def shuffled_rows(first: int, last: int, present: int, seed: int, window: int) -> Int[np.ndarray, " positions"]:
    """The rows at positions `first` … `last`−1 of a window that has `present` rows.

    The order is a permutation computed from (`seed`, `window`). A window from which outliers were dropped has fewer
    rows than positions: its last positions repeat its first rows, so that every window is equally long.
    """
    return permute(np.arange(first, last) % present, present, "window", seed, window)


class TextPlaces(NamedTuple):
    """Where the windows begin in the text. It saves a resumed run from tokenizing what lies before."""

    starts: tuple[tuple[int, int], ...] = ((0, 0),)
    """Of windows 0, 1, …: documents before it, and contexts of the next document before it."""
    windows: int | None = None
    """Windows of the whole text, once its end has been seen."""


def read_places(path: Path) -> TextPlaces:
    """What `text.json` says; without it the beginning of the text is what is known."""
    try:
        found = read_json(path, _TEXT, f"delete {path}: the text is read from its beginning")
    except FileNotFoundError:
        return TextPlaces()
    return TextPlaces(tuple((documents, contexts) for documents, contexts in found["starts"]), found["windows"])
