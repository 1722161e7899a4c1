"""Open a source. A missing store is harvested first, by one process (or its ranks) while others wait."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from harness.activations.lm.model import HookedModel
from harness.activations.lm.rows import OnRows
from harness.activations.source import ActivationSource
from harness.activations.store.assemble import TornUnits, assemble, remove_scratch
from harness.activations.store.harvest import Plan, describe, forward_units, prepare, read_plan, rows_done
from harness.activations.store.identity import store_id
from harness.activations.store.paths import MANIFEST, is_complete, shares_forwards, store_name, store_path
from harness.activations.store.read import open_store
from harness.activations.store.values import note_on_norms, note_on_outliers
from harness.activations.synthetic import Synthetic
from harness.activations.window.source import Windows
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.parallel import Shards, Solo
from harness.parallel.notices import Notices
from harness.process.claim import Claimed, Owner, claim
from harness.process.memory import return_freed
from harness.process.signals import StopFlag
from harness.process.together import together
from harness.progress import Progress, own_progress


def open_source(
    cfg: ActivationsConfig,
    out: Path,
    *,
    progress: bool,
    stop: StopFlag,
    shards: Shards | None = None,
    others: Sequence[ActivationsConfig] = (),
    notices: Notices | None = None,
) -> ActivationSource:
    """The rows that `cfg` describes. A missing store is harvested into `store_root(cfg, out)` first.

    Those of `others` that differ from `cfg` only in layer and hook are harvested with it, in one pass of the model, and
    come out as if each had been harvested alone. An interrupted harvest is continued. If another process is harvesting
    the same store, this one waits for it. All ranks of `shards` (default: one process) call this and harvest together.
    `notices` reach the ranks that compute windows, if there are such.
    Raises `UserError` for what the user can cause (unknown model, unreadable text, full disk, damaged shard),
    `Interrupted` when `stop` is set.
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
            one_pass = [other for other in others if shares_forwards(cfg, other)]
            _harvest_once(cfg, directory, one_pass, shown, stop, shards)
        except (OSError, SafetensorError) as error:
            if (explanation := _explain(error, directory.parent)) is not None:
                raise explanation from error
            raise
        return_freed()
    # the values of a store that was made just now have been checked
    store = open_store(directory, cfg, shards, out, shown, check_values=made)
    computed_in = store.description.get("precision")
    if cfg.lm_precision not in ("auto", computed_in):
        shown.note(
            f"the activations in {directory} were computed in {computed_in}, not in activations.lm_precision="
            f"{cfg.lm_precision}: both have one name, so delete the directory to have the other"
        )
    return store if cfg.keep == "store" else Windows(store, cfg, directory.with_suffix(".windows"), shards, notices)


def _require_id(cfg: ActivationsConfig) -> None:
    """Raises `UserError` if a frozen id is not that of the settings, which are all that decides synthetic rows."""
    if cfg.store and cfg.store != store_id(cfg):
        raise UserError(
            f"the settings under activations give the rows {store_id(cfg)}, but the run was named after {cfg.store}; "
            "the configuration was edited or is of an earlier version: launch the cell anew"
        )


def _harvest_once(
    cfg: ActivationsConfig,
    directory: Path,
    one_pass: Sequence[ActivationsConfig],
    progress: Progress,
    stop: StopFlag,
    shards: Shards,
) -> None:
    """Harvest the store unless it exists by now, and with it those of `one_pass` that nobody has or makes. Rank 0 holds
    the claims and plans; all ranks share the forwards and the assembly. The ranks meet after each part, so that if one
    raises, all raise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial, writer, missing = directory.with_suffix(".partial"), shards.rank == 0, False
    prepared: tuple[Plan, HookedModel] | None = None
    taken = torch.zeros(len(one_pass), dtype=torch.int64)

    def on_wait(owner: Owner | None) -> None:
        progress.note(f"waiting: {owner or 'another process'} is harvesting the same activations")

    def with_it() -> list[tuple[ActivationsConfig, Path]]:
        return [
            (each, directory.with_name(f"{store_name(each)}.partial"))
            for each, mine in zip(one_pass, taken.tolist(), strict=True)
            if mine
        ]

    with ExitStack() as stack:
        with together(shards, patient=True):
            if writer:
                stack.enter_context(claim(directory.with_suffix(".lock"), wait=True, stop=stop, on_wait=on_wait))
                missing = _is_missing(directory, partial)
                if missing:
                    for number, each in enumerate(one_pass):
                        taken[number] = _takes_along(directory.with_name(store_name(each)), partial, stack)
                    with _nothing_left_of_a_refusal(partial, loading=True):
                        prepared = _begin(cfg, partial, with_it(), progress, stop)
        missing = bool(shards.sum_(torch.tensor(int(missing)), "all", "scalars"))
        taken = shards.sum_(taken, "all", "scalars")
        others = with_it()
        if missing:
            with together(shards, patient=True):
                plan, hooked = prepared or prepare(cfg, partial, stop, others)
                plans = [_read_again(folder) for _, folder in others]
            pairs = [(each, folder) for each, (_, folder) in zip(plans, others, strict=True)]

            def forward() -> None:
                with together(shards):
                    forward_units(plan, hooked, partial, stop, _show_progress(plan, partial, progress), shards, pairs)

            try:
                with _nothing_left_of_a_refusal(partial if writer else None):
                    forward()
                    _assemble(cfg, plan, partial, forward, progress, stop, shards)
                for (each, folder), its_plan in zip(others, plans, strict=True):
                    _assemble_other(each, its_plan, folder, forward, progress, stop, shards)
            except BaseException:
                progress.finish("")
                raise
        with together(shards, patient=True):
            if writer and not directory.exists():
                _into_place(partial)


def _into_place(partial: Path) -> None:
    remove_scratch(partial)
    partial.rename(partial.with_suffix(""))


def _takes_along(directory: Path, first: Path, stack: ExitStack) -> bool:
    """Whether another store is harvested with that of the half-made `first`: it is missing, nobody else makes it, and
    if it was begun, then with the same forwards."""
    partial = directory.with_suffix(".partial")
    if directory.exists():
        return False
    try:
        stack.enter_context(claim(directory.with_suffix(".lock")))
    except Claimed:
        return False
    if directory.exists() or is_complete(partial):
        return False
    partial.mkdir(exist_ok=True)
    begun, own = read_plan(partial), read_plan(first)
    return begun is None or (own is not None and (begun.precision, begun.lm_batch) == (own.precision, own.lm_batch))


def _read_again(partial: Path) -> Plan:
    plan = read_plan(partial)
    assert plan is not None
    return plan


def _assemble_other(
    cfg: ActivationsConfig,
    plan: Plan,
    partial: Path,
    forward_again: Callable[[], None],
    progress: Progress,
    stop: StopFlag,
    shards: Shards,
) -> None:
    """Finish a store that was taken along. Rows that cannot be trained on stop its own runs, not those of others.

    Called by all ranks.
    """
    writer = shards.rank == 0
    try:
        with _nothing_left_of_a_refusal(partial if writer else None):
            _assemble(cfg, plan, partial, forward_again, progress, stop, shards)
    except UserError as refused:  # on every rank, see `together`
        progress.finish(f"{cfg.hook} of layer {cfg.layer} is left out: {refused}")
        return
    with together(shards, patient=True):
        if writer:
            _into_place(partial)


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


def _begin(
    cfg: ActivationsConfig,
    partial: Path,
    others: Sequence[tuple[ActivationsConfig, Path]],
    progress: Progress,
    stop: StopFlag,
) -> tuple[Plan, HookedModel]:
    points = ", ".join(f"{each.hook} of layer {each.layer}" for each in (cfg, *(other for other, _ in others)))
    text = " and ".join(text.text for text, _ in cfg.texts)
    progress.note(f"harvesting {cfg.model}, {points}, over {text} text")
    plan, hooked = prepare(cfg, partial, stop, others)
    wanted = {"train": round(cfg.stored_tokens), "heldout": round(cfg.heldout_tokens)}
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
    partial: Path,
    forward_again: Callable[[], None],
    progress: Progress,
    stop: StopFlag,
    shards: Shards,
) -> None:
    """Turn the units in `partial` into a complete store; damaged units are computed again. Called by all ranks."""
    while True:
        progress.start("assemble", sum(plan.rows.values()), 0)
        try:
            made = assemble(
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
            forward_again()
            continue
        if made:
            rows, about = made["rows"], made["description"]
            counted = f"{rows['train']:,} training and {rows['heldout']:,} held-out rows"
            progress.finish(f"harvested {counted}, {cfg.hook} of layer {cfg.layer}")
            for note in (note_on_outliers(about), note_on_norms(about["norms"])):
                if note is not None:
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
