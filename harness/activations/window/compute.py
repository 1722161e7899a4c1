"""The language model, the text, and the windows that they give: beside the training, or on ranks of their own."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors import safe_open

from harness.activations.lm.contexts import Contexts, Special, open_contexts, remove_contexts, special_tokens
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_model, load_tokenizer
from harness.activations.lm.rows import RowSettings, row_norms, unit_rows
from harness.activations.store.identity import recipe
from harness.activations.store.manifest import read_manifest
from harness.activations.window import layout
from harness.activations.window.text import TextWindows
from harness.config import ActivationsConfig, SyntheticConfig
from harness.errors import UserError
from harness.files import write_json_atomic, write_tensors_atomic
from harness.process.signals import Interrupted, StopFlag
from harness.schema import OBJECT, TEXT, fields, read_json

UNIT_TOKENS = 32_768
"""Tokens that are computed between two writes."""
POLL_S = 0.05
"""Between two looks for what another rank writes."""

_REQUEST = fields({"activations": OBJECT, "store": TEXT})


class Readers:
    """The trainings that read the windows of one slot, and the window that each trains on."""

    def __init__(self, left: Callable[[], None]) -> None:
        """`left` is called when the last one has left."""
        self._at: dict[object, int] = {}
        self._all_left = False
        self._left, self._changed = left, threading.Condition()

    @property
    def first(self) -> int | None:
        """The earliest window that is trained on; None without a reader."""
        return min(self._at.values(), default=None)

    def admit(self, reader: object, window: int) -> bool:
        """Let a training read from here if the windows that are kept are those that it needs."""
        with self._changed:
            fits = self.first is None or self.first <= window <= self.first + 1
            if fits:
                self._at[reader] = window
                self._changed.notify()
        return fits

    def train_on(self, reader: object, window: int) -> None:
        with self._changed:
            self._at[reader] = window
            self._changed.notify()

    def leave(self, reader: object) -> None:
        with self._changed:
            if self._at.pop(reader, None) is not None and not self._at:
                self._left()
                self._all_left = True
                self._changed.notify()

    def wait_for_other_than(self, window: int) -> int:
        """The earliest window that is trained on, once it is another one. Raises `Interrupted` when all have left."""
        with self._changed:
            self._changed.wait_for(lambda: self._all_left or self.first not in (None, window))
            if self.first is None:
                raise Interrupted
            return self.first


class Producer:
    """Computes windows into a slot, alone or as one of several `parts`. Part 0 cuts the text and completes windows;
    unit u is computed by part u mod `parts`."""

    def __init__(
        self,
        slot: Path,
        device: torch.device,
        stop: StopFlag,
        *,
        part: int = 0,
        parts: int = 1,
        outlives: threading.Lock | None = None,
    ) -> None:
        """`stop` ends what is being computed with `Interrupted`. `outlives` is held while something is written that
        outlives the training."""
        request = read_json(slot / layout.REQUEST, _REQUEST, "launch the run again")
        settings = request["activations"]
        cfg = ActivationsConfig(**{**settings, "synthetic": SyntheticConfig(**settings["synthetic"])})
        manifest = read_manifest(Path(request["store"]))
        about, location = manifest["description"], locate(cfg)
        self._slot, self._cfg, self._share = slot, cfg, about["heldout_share"]
        self._stop, self._part, self._parts = stop, part, parts
        self._outlives = outlives or threading.Lock()
        self._places_file = slot.parent / layout.TEXT
        self._hooked = load_model(cfg, location, about["precision"], device)
        self._tokenizer = load_tokenizer(location)
        self._special: Special = special_tokens(self._tokenizer, cfg.text)
        self._revision: str = recipe(cfg)["text"].get("commit", "")
        self._settings = RowSettings(
            manifest["d_model"], cfg.dtype, about["lm_batch"], about["dropped_ids"], cfg.drop_first_position
        )
        outliers = about.get("outliers")
        self._largest_norm = None if outliers is None else outliers["factor"] * outliers["median_norm"]
        self._places = layout.read_places(self._places_file)
        self._most = max(1, round(cfg.tokens) // round(cfg.window_tokens))
        self._text: tuple[int, TextWindows] | None = None
        """The text, and the number of the window of the text that it gives next."""

    def serve(self, readers: Readers) -> NoReturn:
        """Compute what is trained on and the window after it, and delete those before. Ends with `Interrupted`, when
        `stop` is set or all readers have left."""
        done = -1
        while True:
            at = readers.wait_for_other_than(done)
            if self._part == 0:
                self._keep_only(range(at, at + 2))
            self.make(at)
            if readers.first == at:
                self.make(at + 1)
                done = at

    def make(self, window: int) -> None:
        """Compute this part of a window unless the window is there. Windows are counted on when the text begins again.

        Raises `Interrupted`.
        """
        path = layout.window_path(self._slot, window)
        if layout.is_whole(path):
            return
        partial = path.with_suffix(".partial")
        if self._part == 0:
            for torn in (path, partial):
                shutil.rmtree(torn, ignore_errors=True)
            partial.mkdir()
            self._cut(window, partial)
            layout.cut_file(partial).touch()
        self._wait_for(lambda: layout.cut_file(partial).is_file() or layout.is_whole(path))
        if layout.is_whole(path):
            return
        contexts = open_contexts(partial, "train")
        per_unit = max(1, UNIT_TOKENS // self._cfg.context)
        units = -(-contexts.count // per_unit)
        for unit in range(self._part, units, self._parts):
            first = unit * per_unit
            self._compute(contexts, np.arange(first, min(first + per_unit, contexts.count)), partial, unit)
        if self._part == 0:
            self._complete(partial, units, window)

    def _compute(self, contexts: Contexts, numbers: np.ndarray, partial: Path, unit: int) -> None:
        (values,) = unit_rows(self._settings, self._hooked, contexts, numbers, self._stop, lambda computed: None)
        if self._largest_norm is not None:
            values = values[torch.from_numpy(row_norms(values) <= self._largest_norm)]
        write_tensors_atomic(layout.unit_file(partial, unit), {"x": values}, durable=False)

    def _complete(self, partial: Path, units: int, window: int) -> None:
        """Turn the units of all parts into a whole window."""
        files = [layout.unit_file(partial, unit) for unit in range(units)]
        self._wait_for(lambda: all(file.is_file() for file in files))
        rows = []
        for file in files:
            with safe_open(file, framework="pt") as unit:
                rows.append(unit.get_slice("x").get_shape()[0])
        if not sum(rows):
            raise UserError(f"window {window} has no rows; raise activations.window_tokens or outlier_factor")
        remove_contexts(partial)
        write_json_atomic(partial / layout.WINDOW, {"rows": rows})
        partial.rename(partial.with_suffix(""))

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self._stop.requested:
                raise Interrupted
            time.sleep(POLL_S)

    def _keep_only(self, windows: range) -> None:
        """Delete all other windows."""
        kept = {layout.window_path(self._slot, window).name for window in windows}
        for path in self._slot.glob("window-*"):
            if path.with_suffix("").name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _cut(self, window: int, directory: Path) -> None:
        """Write the contexts of a window to `directory`."""
        while True:
            wanted = window % min(self._most, self._places.windows or self._most)
            if self._text is None or self._text[0] > wanted:
                known = min(wanted, len(self._places.starts) - 1)
                self._text = known, self._text_from(self._places.starts[known])
            number, text = self._text
            full = text.cut(directory)
            if not full and number > 0:
                # the rest of the text is less than a window, and is left out
                self._places = self._places._replace(windows=number)
                self._text = None
            elif full or wanted == 0:
                self._text = number + 1, text
                if full and len(self._places.starts) == number + 1:
                    self._places = self._places._replace(starts=(*self._places.starts, text.place))
                if not full:
                    self._places = self._places._replace(windows=1)
            with self._outlives:
                write_json_atomic(self._places_file, self._places._asdict())
            if number == wanted and (full or number == 0):
                return

    def _text_from(self, start: tuple[int, int]) -> TextWindows:
        return TextWindows(self._cfg, self._tokenizer, self._special, self._revision, self._share, start)
