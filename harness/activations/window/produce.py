"""`python -m harness.activations.window.produce SLOT`: compute windows for a training that reads them from SLOT.

The training starts it and writes the number of the window that it trains on, a line each time, to its standard input.
That window and the next one are computed, earlier ones are deleted. When the input ends, so does this process: nothing
that a killed training started goes on.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from harness.activations.lm.contexts import Special, open_contexts, remove_contexts, special_tokens
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_model, load_tokenizer
from harness.activations.lm.rows import RowSettings, row_norms, unit_rows
from harness.activations.store.identity import recipe
from harness.activations.store.manifest import read_manifest
from harness.activations.window import layout
from harness.activations.window.text import TextWindows
from harness.config import ActivationsConfig, SyntheticConfig
from harness.errors import FAILED, UserError
from harness.files import write_json_atomic, write_tensors_atomic, write_text_atomic
from harness.process.device import pick_device
from harness.process.signals import StopFlag
from harness.schema import OBJECT, TEXT, fields, read_json

UNIT_TOKENS = 32_768
"""Tokens that are computed between two writes."""

_REQUEST = fields({"activations": OBJECT, "store": TEXT})


class Trainer:
    """What the training has said last."""

    def __init__(self) -> None:
        self.window = -1
        self.outlives = threading.Lock()
        """Held while something is written that outlives the training."""
        self._has_spoken = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            with self._has_spoken:
                self.window = int(line)
                self._has_spoken.notify()
        with self.outlives:
            os._exit(0)  # in the middle of a forward too

    def other_than(self, window: int) -> int:
        """The window that is trained on, once it is another one."""
        with self._has_spoken:
            self._has_spoken.wait_for(lambda: self.window not in (-1, window))
            return self.window


class Producer:
    """The language model, the text, and the windows that they give."""

    def __init__(self, slot: Path, outlives: threading.Lock) -> None:
        self._outlives = outlives
        request = read_json(slot / layout.REQUEST, _REQUEST, "launch the run again")
        settings = request["activations"]
        cfg = ActivationsConfig(**{**settings, "synthetic": SyntheticConfig(**settings["synthetic"])})
        manifest = read_manifest(Path(request["store"]))
        about, location = manifest["description"], locate(cfg)
        self._slot, self._cfg, self._share = slot, cfg, about["heldout_share"]
        self._places_file = slot.parent / layout.TEXT
        self._hooked = load_model(cfg, location, about["precision"], pick_device("auto"))
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

    def make(self, window: int) -> None:
        """Compute a window unless it is there. Windows are counted on when the text begins again."""
        path = layout.window_path(self._slot, window)
        if layout.is_whole(path):
            return
        partial = path.with_suffix(".partial")
        for torn in (path, partial):
            shutil.rmtree(torn, ignore_errors=True)
        partial.mkdir()
        self._cut(window, partial)
        contexts = open_contexts(partial, "train")
        per_unit = max(1, UNIT_TOKENS // self._cfg.context)
        rows = []
        for unit, first in enumerate(range(0, contexts.count, per_unit)):
            numbers = np.arange(first, min(first + per_unit, contexts.count))
            (values,) = unit_rows(self._settings, self._hooked, contexts, numbers, StopFlag(), lambda computed: None)
            if self._largest_norm is not None:
                values = values[torch.from_numpy(row_norms(values) <= self._largest_norm)]
            write_tensors_atomic(layout.unit_file(partial, unit), {"x": values}, durable=False)
            rows.append(len(values))
        if not sum(rows):
            raise UserError(f"window {window} has no rows; raise activations.window_tokens or outlier_factor")
        remove_contexts(partial)
        write_json_atomic(partial / layout.WINDOW, {"rows": rows})
        partial.rename(path)

    def keep_only(self, windows: range) -> None:
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


def produce(slot: Path) -> None:
    """Compute what the training asks for, until it closes the standard input of this process."""
    trainer = Trainer()
    producer = Producer(slot, trainer.outlives)
    done = -1
    while True:
        at = trainer.other_than(done)
        producer.keep_only(range(at, at + 2))
        producer.make(at)
        if trainer.window == at:
            producer.make(at + 1)
            done = at


def main() -> int:
    slot = Path(sys.argv[1])
    try:
        produce(slot)
    except (UserError, OSError) as error:
        write_text_atomic(slot / layout.FAILED, str(error))
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
