"""Open a source. A missing store is harvested first, by one process (or its ranks) while others wait."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from harness.activations.lm.model import HookedModel
from harness.activations.source import ActivationSource
from harness.activations.store.assemble import TornUnits, assemble, remove_scratch
from harness.activations.store.harvest import OnRows, Plan, describe, forward_units, prepare, read_plan, rows_done
from harness.activations.store.identity import store_id
from harness.activations.store.paths import MANIFEST, is_complete, store_name, store_path
from harness.activations.store.read import open_store
from harness.activations.store.values import note_on_norms
from harness.activations.synthetic import Synthetic
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.parallel import Shards, Solo
from harness.process.claim import Owner, claim
from harness.process.memory import return_freed
from harness.process.signals import StopFlag
from harness.process.together import together
from harness.progress import Progress, own_progress


def open_source(
    cfg: ActivationsConfig, out: Path, *, progress: bool, stop: StopFlag, shards: Shards | None = None
) -> ActivationSource:
    """The rows that `cfg` describes. A missing store is harvested into `store_root(cfg, out)` first.

    An interrupted harvest is continued. If another process is harvesting the same store, this one waits for it. All
    ranks of `shards` (default: one process) call this and harvest together. Raises `UserError` for what the user can
    cause (unknown model, unreadable text, full disk, damaged shard), `Interrupted` when `stop` is set.
    """
    if cfg.kind == "synthetic":
        _require_id(cfg)
        return Synthetic(cfg, store_name(cfg))
    directory = store_path(cfg, out)
    shards, shown = shards or Solo(), own_progress() if progress else Progress(io.StringIO())
    complete = torch.tensor(int(shards.rank == 0 and is_complete(directory)))
    made = bool(shards.sum_(complete, "all", "scalars"))
    if not made:
        if (local_id := store_id(cfg)) != directory.name:
            raise UserError(
                f"there is no store {directory}, and the model and text of this machine would give another one "
                f"({local_id}); harvest it where the sweep was launched, or copy it here"
            )
        try:
            _harvest_once(cfg, directory, shown, stop, shards)
        except (OSError, SafetensorError) as error:
            if (explanation := _explain(error, directory.parent)) is not None:
                raise explanation from error
            raise
        return_freed()
    # the values of a store that was made just now have been checked
    return open_store(directory, cfg, shards, out, shown, check_values=made)


def _require_id(cfg: ActivationsConfig) -> None:
    """Raises `UserError` if a frozen id is not that of the settings, which are all that decides synthetic rows."""
    if cfg.store and cfg.store != store_id(cfg):
        raise UserError(
            f"the settings under activations give the rows {store_id(cfg)}, but the run was named after {cfg.store}; "
            "the configuration was edited or is of an earlier version: launch the cell anew"
        )


def _harvest_once(cfg: ActivationsConfig, directory: Path, progress: Progress, stop: StopFlag, shards: Shards) -> None:
    """Harvest the store unless it exists by now. Rank 0 holds the claim, plans and assembles; all ranks share the
    forwards. The ranks meet after each part, so that if one raises, all raise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial, writer, missing = directory.with_suffix(".partial"), shards.rank == 0, False
    prepared: tuple[Plan, HookedModel] | None = None

    def on_wait(owner: Owner | None) -> None:
        progress.note(f"waiting: {owner or 'another process'} is harvesting the same activations")

    with ExitStack() as stack:
        with together(shards, patient=True):
            if writer:
                stack.enter_context(claim(directory.with_suffix(".lock"), wait=True, stop=stop, on_wait=on_wait))
                missing = _is_missing(directory, partial)
                if missing:
                    with _nothing_left_of_a_refusal(partial, loading=True):
                        prepared = _begin(cfg, partial, progress, stop)
        missing = bool(shards.sum_(torch.tensor(int(missing)), "all", "scalars"))
        if missing:
            with together(shards, patient=True):
                plan, hooked = prepared or prepare(cfg, partial, stop)
            try:
                with together(shards), _nothing_left_of_a_refusal(partial if writer else None):
                    forward_units(plan, hooked, partial, stop, _show_progress(plan, partial, progress), shards)
                with _nothing_left_of_a_refusal(partial if writer else None):
                    _assemble(cfg, plan, hooked, partial, progress, stop, shards)
            except BaseException:
                progress.finish("")
                raise
        with together(shards, patient=True):
            if writer and not directory.exists():
                remove_scratch(partial)
                partial.rename(directory)


@contextmanager
def _nothing_left_of_a_refusal(partial: Path | None, *, loading: bool = False) -> Iterator[None]:
    """Remove a half-made store that no later attempt can finish: one without a plan, or whose rows are refused.

    One that was stopped stays, and so does one whose model cannot be loaded (`loading`) this time. None as `partial`:
    another rank does it.
    """
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, UserError) and not loading
        if partial is not None and (refused or read_plan(partial) is None):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_missing(directory: Path, partial: Path) -> bool:
    """Whether something is left to compute. Raises `UserError` if `directory` exists but is no store."""
    if is_complete(directory):
        return False
    if directory.exists():
        raise UserError(f"{directory} has no {MANIFEST}, so it is no store; delete it to harvest it again")
    partial.mkdir(exist_ok=True)
    return not is_complete(partial)


def _begin(cfg: ActivationsConfig, partial: Path, progress: Progress, stop: StopFlag) -> tuple[Plan, HookedModel]:
    progress.note(f"harvesting {cfg.model}, {cfg.hook} of layer {cfg.layer}, over {cfg.text} text")
    plan, hooked = prepare(cfg, partial, stop)
    wanted = {"train": round(cfg.tokens), "heldout": round(cfg.heldout_tokens)}
    for split, rows in plan.rows.items():
        if rows < wanted[split]:
            progress.note(f"the text ends after {rows:,} of {wanted[split]:,} {split} rows; harvesting these")
    return plan, hooked


def _show_progress(plan: Plan, partial: Path, progress: Progress) -> OnRows:
    """Start a progress bar at the rows that exist already; the result moves it."""
    done = rows_done(plan, partial)
    progress.start("harvest", sum(plan.rows.values()), done)

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        progress.update(done, {})

    return on_rows


def _assemble(
    cfg: ActivationsConfig,
    plan: Plan,
    hooked: HookedModel,
    partial: Path,
    progress: Progress,
    stop: StopFlag,
    shards: Shards,
) -> None:
    """Turn the units in `partial` into a complete store; damaged units are computed again. Called by all ranks."""
    while True:
        progress.start("assemble", sum(plan.rows.values()), 0)
        try:
            norms = assemble(
                plan,
                partial,
                cfg.shard_rows,
                describe(cfg, plan),
                stop,
                shards,
                lambda rows: progress.update(rows, {}),
            )
        except TornUnits as torn:
            progress.finish(f"computing units again that a crash damaged: {torn}")
            with together(shards):
                forward_units(plan, hooked, partial, stop, _show_progress(plan, partial, progress), shards)
            continue
        rows = plan.rows
        progress.finish(f"harvested {rows['train']:,} training and {rows['heldout']:,} held-out rows")
        if norms and (note := note_on_norms(norms)) is not None:
            progress.note(note)
        return


def _explain(error: OSError | SafetensorError, root: Path) -> UserError | None:
    """One line for a full disk or a directory that cannot be written; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors gives the operating system's error only as text
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        free = shutil.disk_usage(root).free
        return UserError(f"the disk of {root} is full ({free / 1e6:.0f} MB free); free some or set activations.dir")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"cannot write activations to {root}: {os.strerror(number)}; set activations.dir or out")
    return None
