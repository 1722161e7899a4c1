"""Ranks of their own that compute windows (`mesh.lm`), as the training and as they themselves see it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from harness.activations.window import layout
from harness.activations.window.compute import Producer, Readers
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import write_json_atomic, write_text_atomic
from harness.parallel.notices import Notices
from harness.process.claim import Claimed, claim
from harness.process.signals import Interrupted, StopFlag

POLL_S = 0.1
LEAVE_S = 60.0
"""How long the first rank waits until the others have left a slot, before it deletes it all the same."""


class _Notice(NamedTuple):
    """What the first rank says: windows are needed in a slot, none are for now, or the training has ended."""

    number: int
    """Of the slots that it has opened."""
    slot: str
    """Empty: it is closed."""
    window: int
    ended: bool = False


class LmRanks:
    """Tells the ranks which windows are needed. If one of them dies, whoever started the ranks ends all."""

    def __init__(self, directory: Path, cfg: ActivationsConfig, store: Path, notices: Notices) -> None:
        """`directory`: where the windows of the store lie."""
        self._directory, self._notices, self._held = directory, notices, ExitStack()
        self._request = {"activations": dataclasses.asdict(cfg), "store": str(store.absolute())}
        self._last = _Notice(0, "", -1)

    def open(self, window: int) -> int:
        """Begin to read at `window`; returns the number of the slot. That of a killed training is taken over."""
        self._directory.mkdir(exist_ok=True)
        with claim(layout.slots_lock(self._directory), wait=True):
            number = self._free_slot()
        slot = layout.slot_path(self._directory, number)
        slot.mkdir(exist_ok=True)
        for torn in slot.glob("*.partial"):  # its text would be taken for that of now
            shutil.rmtree(torn, ignore_errors=True)
        (slot / layout.FAILED).unlink(missing_ok=True)
        write_json_atomic(slot / layout.REQUEST, self._request)
        self._say(_Notice(self._notices.count("opened", 1), str(slot.absolute()), window))
        return number

    def train_on(self, window: int) -> None:
        """Tell that `window` and the next one are needed, and none before."""
        if window != self._last.window:
            self._say(self._last._replace(window=window))

    def check(self) -> None:
        """Nothing: a rank that fails says so in the slot, and one that dies ends the training."""

    def close(self) -> None:
        if self._last.slot:
            slot = Path(self._last.slot)
            self._say(self._last._replace(slot=""))
            end = time.monotonic() + LEAVE_S
            while self._notices.count(_left(self._last)) < self._notices.listeners and time.monotonic() < end:
                time.sleep(POLL_S)
            shutil.rmtree(slot, ignore_errors=True)
        self._held.close()

    def _free_slot(self) -> int:
        for number in range(layout.MOST_SLOTS):
            with suppress(Claimed):
                self._held.enter_context(claim(layout.slot_lock(self._directory, number)))
                return number
        raise UserError(f"{layout.MOST_SLOTS} trainings read windows in {self._directory}; wait for one")

    def _say(self, notice: _Notice) -> None:
        self._last = notice
        self._notices.post(json.dumps(notice))


def tell_end(notices: Notices) -> None:
    """Let the ranks end. The first rank calls this when it has nothing left to train."""
    notices.post(json.dumps(_Notice(0, "", -1, ended=True)))


def compute_windows(notices: Notices, part: int, device: torch.device) -> None:
    """Compute windows for one training after the other, as rank `part` of those that do, until the first rank ends."""
    seen = 0
    while (notice := _read(notices)) is not None and not notice.ended:
        if notice.number == seen:
            time.sleep(POLL_S)
            continue
        seen = notice.number
        if notice.slot:
            _compute_in(notice, notices, part, device)
        notices.count(_left(notice), 1)


def _compute_in(notice: _Notice, notices: Notices, part: int, device: torch.device) -> None:
    """Compute the windows of a slot until it is closed."""
    slot, stop = Path(notice.slot), StopFlag()
    readers, training = Readers(stop.request), object()
    readers.admit(training, notice.window)

    def follow() -> None:
        while (now := _read(notices)) is not None and (now.number, now.slot) == (notice.number, notice.slot):
            readers.train_on(training, now.window)
            time.sleep(POLL_S)
        readers.leave(training)

    follower = threading.Thread(target=follow, name="training", daemon=True)
    follower.start()
    try:
        Producer(slot, device, stop, part=part, parts=notices.listeners).serve(readers)
    except Interrupted:
        pass
    except (UserError, OSError) as error:
        if not stop.requested:
            write_text_atomic(slot / layout.FAILED, str(error))
    follower.join()


def _left(notice: _Notice) -> str:
    """Under this name the ranks that have left a slot are counted."""
    return f"left {notice.number}"


def _read(notices: Notices) -> _Notice | None:
    """The last notice; None when the first rank has gone."""
    while (text := notices.latest()) == "":
        time.sleep(POLL_S)
    return None if text is None else _Notice(*json.loads(text))
