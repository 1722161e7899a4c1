"""Opening a source: the store is harvested first if it does not exist, by one process while others wait."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from harness.activations.assemble import TornUnits, assemble, remove_scratch
from harness.activations.harvest import describe, forward_units, prepare, rows_done
from harness.activations.identity import store_id, store_root
from harness.activations.source import ActivationSource
from harness.activations.store import Store, is_complete
from harness.activations.synthetic import Synthetic
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.parallel import Shards, Solo
from harness.record.claim import Owner, claim
from harness.record.progress import Progress
from harness.record.signals import StopFlag


def open_source(
    cfg: ActivationsConfig, out: Path, *, progress: bool, stop: StopFlag, shards: Shards | None = None
) -> ActivationSource:
    """The rows that `cfg` describes; a missing store is harvested into `store_root(cfg, out)` first.

    A harvest that was interrupted goes on; one that another process is making is waited for. All ranks of `shards`
    (default: one process) call it and harvest together. Raises `UserError` for what the user can cause (unknown model,
    unreadable text, no room, a damaged shard), `Interrupted` on request.
    """
    if cfg.kind == "synthetic":
        return Synthetic(cfg, store_id(cfg))
    root = store_root(cfg, out)
    directory = root / store_id(cfg)
    shards = shards or Solo()
    there = torch.tensor(int(shards.rank == 0 and is_complete(directory)))
    if not int(shards.sum_(there, "all", "scalars")):
        try:
            _harvest_once(cfg, directory, Progress() if progress else Progress(io.StringIO()), stop, shards)
        except (OSError, SafetensorError) as error:
            if (explained := _explained(error, root)) is not None:
                raise explained from error
            raise
    return Store(directory)


def _harvest_once(cfg: ActivationsConfig, directory: Path, progress: Progress, stop: StopFlag, shards: Shards) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_suffix(".partial")
    if shards.rank != 0:
        _help(cfg, directory, partial, stop, shards)
        return

    def on_wait(owner: Owner | None) -> None:
        progress.note(f"waiting: {owner or 'another process'} is harvesting the same activations")

    with claim(directory.with_suffix(".lock"), wait=True, stop=stop, on_wait=on_wait):
        if is_complete(directory):
            shards.sum_(torch.tensor(1), "all", "scalars")  # nothing to do: the other ranks need not help
            shards.barrier()
            return
        if directory.exists():
            raise UserError(f"{directory} has no manifest.json, so it is no store; delete it to harvest it again")
        partial.mkdir(exist_ok=True)
        if is_complete(partial):
            shards.sum_(torch.tensor(1), "all", "scalars")
        else:
            harvest(cfg, partial, progress, stop, shards)
        remove_scratch(partial)
        partial.rename(directory)
        shards.barrier()


def _help(cfg: ActivationsConfig, directory: Path, partial: Path, stop: StopFlag, shards: Shards) -> None:
    """What a rank other than 0 does: its share of the units, once rank 0 has made the plan."""
    if not int(shards.sum_(torch.tensor(0), "all", "scalars")):
        plan, hooked = prepare(cfg, partial, stop)
        forward_units(plan, hooked, partial, stop, lambda rows: None, shards.rank, shards.size)
        shards.barrier()
    shards.barrier()


def harvest(cfg: ActivationsConfig, partial: Path, progress: Progress, stop: StopFlag, shards: Shards) -> None:
    """Bring the unfinished store in `partial` to its end: afterwards its manifest exists. For rank 0."""
    progress.note(f"harvesting {cfg.model}, {cfg.hook} of layer {cfg.layer}, over {cfg.text} text")
    plan, hooked = prepare(cfg, partial, stop)
    wanted = {"train": round(cfg.tokens), "heldout": round(cfg.heldout_tokens)}
    for split, rows in plan.rows.items():
        if rows < wanted[split]:
            progress.note(f"the text ends after {rows:,} of {wanted[split]:,} {split} rows; going on with these")
    shards.sum_(torch.tensor(0), "all", "scalars")
    first = True
    while True:
        done = rows_done(plan, partial)
        progress.start("harvest", sum(plan.rows.values()), done)

        def on_rows(rows: int) -> None:
            nonlocal done
            done += rows
            progress.update(done, {})

        try:
            # units that a crash has torn are few: made again by this rank alone
            forward_units(plan, hooked, partial, stop, on_rows, 0, shards.size if first else 1)
            if first:
                shards.barrier()
            first = False
            assemble(plan, partial, cfg.shard_rows, describe(cfg, plan), stop)
        except TornUnits as torn:
            progress.finish(f"units damaged by a crash are made again: {torn}")
            continue
        except BaseException:
            progress.finish("")
            raise
        rows = plan.rows
        progress.finish(f"harvested {rows['train']:,} training and {rows['heldout']:,} held-out rows")
        return


def _explained(error: OSError | SafetensorError, root: Path) -> UserError | None:
    """The one line for a full disk or a place that cannot be written."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors reports the operating system's error as text only.
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        free = shutil.disk_usage(root).free
        return UserError(f"the disk of {root} is full ({free / 1e6:.0f} MB free); free some or set activations.dir")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"cannot write activations to {root}: {os.strerror(number)}; set activations.dir or out")
    return None
