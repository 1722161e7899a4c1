"""One attempt at a job: its claims, its log, and the record of how it ended."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import INTERRUPTED, UserError
from harness.files import open_own, remove_left_behind, write_json_atomic
from harness.process.claim import claim
from harness.process.signals import Interrupted
from harness.record import names
from harness.record.provenance import collect, command_line, now
from harness.record.rundir import attempts, claim_path
from harness.schema import FLAG, TEXT, fields, optional, read_json, whole
from harness.terminal import say

_ENDED = fields({"outcome": TEXT, "reason": TEXT, "step": optional(whole()), "requeued": FLAG})

END_TIME = "HARNESS_END_TIME"
"""Environment variable of the ranks: when their job will be killed, in seconds since 1970."""


class Attempt(NamedTuple):
    log: Path
    """The log; that of a pack lies in the pack's directory."""
    numbers: dict[Path, int]
    """Run directory → number of this attempt."""


@contextmanager
def claimed(run_dirs: Sequence[Path]) -> Iterator[None]:
    """Hold the claims of all runs of a job. Raises `Claimed` when a live process holds one of them."""
    with ExitStack() as stack:
        for run_dir in run_dirs:
            stack.enter_context(claim(claim_path(run_dir), on_lost=_leave))
            remove_left_behind(run_dir)
        yield


def _leave(path: Path) -> None:
    """Exit: another process took this one for dead (it was suspended, or lost its disk) and trains the run now."""
    say(f"error: {path} was taken over by another process; leaving the run to it")
    os._exit(INTERRUPTED)


@contextmanager
def attempt_log(run_dir: Path, header: str) -> Iterator[Path]:
    """Open a new `attempts/<n>/log.txt`. It receives all logging, and the traceback if the block raises."""
    path = run_dir / names.ATTEMPTS / str(attempts(run_dir) + 1) / names.LOG
    path.parent.mkdir(parents=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    log = logging.getLogger("harness.attempt")
    try:
        log.info(header)
        yield path
    except Interrupted:
        log.info("stopped; the next start goes on from what is saved")
        raise
    except BaseException:
        log.info("the run ended with an exception\n%s", traceback.format_exc())
        raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def attempt(home: Path, run_dirs: Sequence[Path]) -> Iterator[Attempt]:
    """Begin a new attempt at the job in `home` and log it until the block ends. The caller holds the claims."""
    with attempt_log(home, f"{', '.join(path.name for path in run_dirs)}: {command_line()}") as log:
        numbers = {}
        for run_dir in run_dirs:
            if run_dir == home:
                numbers[run_dir] = attempts(home)
                continue
            numbers[run_dir] = attempts(run_dir) + 1
            folder = run_dir / names.ATTEMPTS / str(numbers[run_dir])
            folder.mkdir(parents=True)
            with open_own(folder / names.LOG, "w", encoding="utf-8") as file:
                file.write(f"trained together with others, logged in {log}\n")
        yield Attempt(log, numbers)


def write_provenance(run_dirs: Sequence[Path], *, store_id: str, ops: str, mesh: dict[str, int]) -> dict[str, Any]:
    """Write `provenance.json` of every run; called by the process that trains, or that starts the ranks."""
    provenance = collect(store_id=store_id, ops=ops, mesh=mesh)
    for run_dir in run_dirs:
        write_json_atomic(run_dir / names.PROVENANCE, provenance)
    return provenance


def write_ended(attempt_dirs: Sequence[Path], *, outcome: str, reason: str, step: int | None, requeued: bool) -> None:
    """Write `ended.json` of attempts that stopped: why, at which saved step, and whether they are queued again."""
    ended = {"outcome": outcome, "reason": reason, "step": step, "requeued": requeued, "time": now()}
    for directory in attempt_dirs:
        write_json_atomic(directory / names.ENDED, ended)


def read_ended(attempt_dir: Path) -> dict[str, Any] | None:
    """How an attempt that was stopped ended: `outcome`, `reason`, `step`, `requeued`, `time`. None when it was killed
    before it could write that, or when that is damaged."""
    try:
        return read_json(attempt_dir / names.ENDED, _ENDED, "")
    except (FileNotFoundError, UserError):
        return None


def attempt_dirs(numbers: dict[Path, int]) -> list[Path]:
    return [run_dir / names.ATTEMPTS / str(number) for run_dir, number in numbers.items()]
