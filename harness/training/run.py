"""From a frozen configuration to a result: resume or begin, train, and leave a complete run directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import budget
from harness.activations.source import ActivationSource
from harness.config import Config, to_container
from harness.files import write_json_atomic, write_tensors_atomic
from harness.mirror.tracker import NullTracker, open_tracker
from harness.ops import Ops, choose_ops
from harness.parallel import Shards, Solo
from harness.process.memory import peak_bytes, reset_peak
from harness.process.signals import StopFlag
from harness.record.checkpoint import Checkpoint, find_checkpoint, load_tensors, remove_checkpoints, save_checkpoint
from harness.record.metrics import MetricsFile, NullMetrics, cut_back
from harness.record.notes import add_note, read_notes
from harness.record.provenance import now
from harness.terminal import Progress
from harness.training.cell import Cell
from harness.training.evaluate import pca_fvu
from harness.training.loop import train
from harness.training.member import make_member

log = logging.getLogger(__name__)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is the GPU when there is one; of several that of the rank on its node, or without a rank the one that this
    process uses already. Raises `ValueError` for a `cuda` that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU here; leave it at auto, or check the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    return torch.device(
        name, torch.cuda.current_device() if local_rank is None else local_rank % torch.cuda.device_count()
    )


class Start(NamedTuple):
    """A run that is to be trained or gone on with."""

    run_dir: Path
    """Named by its run_id, holds the frozen configuration."""
    config: Config
    attempt: int
    """Which start of it this is, from 1."""


def run_cells(
    starts: Sequence[Start],
    checkpoints: Path,
    source: ActivationSource,
    stop: StopFlag,
    progress: Progress,
    shards: Shards | None = None,
) -> list[dict[str, Any]]:
    """Train runs that share stream, batch size and place together, and return their `result.json`s.

    Goes on from a good checkpoint under `checkpoints` if there is one; its parent's name says whose they are. Called by
    every rank of `shards` (default: one process); rank 0 writes. Raises `Interrupted` after saving when `stop` is set;
    whatever else goes wrong is raised as it is and leaves no result in runs that have not ended.
    """
    first = starts[0].config
    if first.train.threads:
        torch.set_num_threads(first.train.threads)
    shards = shards or Solo()
    device = pick_device(first.train.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reset_peak()
    owner = checkpoints.parent.name
    found = find_checkpoint(checkpoints, owner, shards)
    if found is not None:
        for line in found.refused:
            log.warning(line)
            for start in starts:
                add_note(start.run_dir, line)
        log.info("goes on at step %d", found.step)
    ops = _kernels(starts, found, device)
    results: dict[str, dict[str, Any]] = {}
    begun = now()
    with ExitStack() as stack:
        cells = [
            stack.enter_context(_opened(start, source, progress, shards, device, ops, found, len(starts)))
            for start in starts
        ]
        if found is not None and found.directory is not None:
            _restore(cells, found, shards)
        label = cells[0].run_id if len(cells) == 1 else f"{len(cells)} runs ({owner})"
        most = max(cells, key=lambda cell: cell.member.last).member
        progress.start(label, most.last * first.train.batch_tokens, most.tokens)

        def save(active: Sequence[Cell]) -> None:
            _save(active, checkpoints, owner, shards)

        def finish(cell: Cell) -> None:
            attempt = next(start.attempt for start in starts if start.run_dir == cell.run_dir)
            results[cell.run_id] = _finish(cell, shards, begun, attempt)

        try:
            train(cells, shards, ops, stop, save, finish)
        finally:
            progress.finish("")
    if shards.rank == 0 and not first.train.keep_checkpoints:
        remove_checkpoints(checkpoints)
    return [results[start.run_dir.name] for start in starts]


def _kernels(starts: Sequence[Start], found: Checkpoint | None, device: torch.device) -> Ops:
    """The kernels that are asked for; with `auto` those of the checkpoint, so that the run ends with the same bits."""
    asked = starts[0].config.ops
    if found is None or found.directory is None:
        return choose_ops(asked, device)
    pinned = found.extra[starts[0].run_dir.name]["ops"]
    if asked in ("auto", pinned):
        try:
            return choose_ops(pinned, device)
        except ValueError as problem:
            raise ValueError(
                f"the checkpoint was made with ops={pinned}, which does not run here ({problem}); go on where it does, "
                f"or with ops=reference (equal to rounding, not to the bit)"
            ) from None
    log.warning("goes on with ops=%s, begun with ops=%s: equal to rounding, not to the bit", asked, pinned)
    return choose_ops(asked, device)


@contextmanager
def _opened(
    start: Start,
    source: ActivationSource,
    progress: Progress,
    shards: Shards,
    device: torch.device,
    ops: Ops,
    found: Checkpoint | None,
    together: int,
) -> Iterator[Cell]:
    """The cell at step 0, with its record cut back to the checkpoint, so that no step appears twice in it."""
    run_id, config = start.run_dir.name, start.config
    member = make_member(config, source, device, shards, ops)
    metrics, tracker = NullMetrics(), NullTracker()
    with ExitStack() as stack:
        if shards.rank == 0:
            written = found.extra[run_id]["metrics"] if found is not None and found.directory is not None else 0
            cut_back(start.run_dir / "metrics.jsonl", written)
            tracker = open_tracker(config, run_id, start.run_dir, resumed=found is not None)
            metrics = stack.enter_context(MetricsFile(start.run_dir / "metrics.jsonl"))
        cell = Cell(run_id, start.run_dir, config, source, member, metrics, tracker, progress, ops, together)
        try:
            yield cell
        finally:
            if not cell.ended:
                tracker.finish({"status": "interrupted"}, 1)


def _save(active: Sequence[Cell], checkpoints: Path, owner: str, shards: Shards) -> None:
    """One checkpoint of all cells that train: their tensors and counters stand or fall together."""
    for cell in active:
        cell.metrics.sync()
    views = {f"{cell.run_id}/{name}": view for cell in active for name, view in cell.member.views(shards).items()}
    extra = {cell.run_id: cell.counters() for cell in active}
    save_checkpoint(checkpoints, active[0].member.done, views, extra, owner, shards)


def _restore(cells: Sequence[Cell], found: Checkpoint, shards: Shards) -> None:
    assert found.directory is not None
    views = {f"{cell.run_id}/{name}": view for cell in cells for name, view in cell.member.views(shards).items()}
    load_tensors(found.directory, views, shards)
    for cell in cells:
        cell.restore(found.extra[cell.run_id], shards)


def _finish(cell: Cell, shards: Shards, started: str, attempt: int) -> dict[str, Any]:
    """Weights, then the result: a run directory that is complete."""
    _save_weights(cell, shards)
    summary = _summary(cell, shards)
    cell.tracker.finish(summary, 0 if summary["status"] == "done" else 1)
    result = _result(cell, summary, started, attempt)
    if shards.rank == 0:
        cell.metrics.sync()
        write_json_atomic(cell.run_dir / "result.json", result)
    return result


def _save_weights(cell: Cell, shards: Shards) -> None:
    """`sae/`: the final weights with their counters, whole, and all that is needed to use them."""
    member, folder = cell.member, cell.run_dir / "sae"
    counters = {"tokens_since_fired": member.silent, "fire_counts": member.fire_counts}
    tensors = {name: shards.gather(value) if member.is_cut(name) else value for name, value in cell.weights().items()}
    tensors |= {name: shards.gather(value) for name, value in counters.items()}
    if shards.rank != 0:
        return
    folder.mkdir(exist_ok=True)
    write_tensors_atomic(folder / "sae.safetensors", tensors)
    write_json_atomic(
        folder / "config.json",
        {
            "format": 1,
            "run_id": cell.run_id,
            "sae": to_container(cell.config)["sae"],
            "d_model": member.sae.d_model,
            "aux_k": member.sae.aux_k,
            "balance_weight": member.sae.balance_weight,
            "normalizer": {"rule": member.normalizer.rule, "scale": member.normalizer.scale},
            "variance": member.sae.variance,
            "weights": "exponential moving average" if member.optimizer.average else "last step",
            "tokens": member.tokens,
            "activations": cell.source.description,
            "store_id": cell.source.id,
        },
    )


def _summary(cell: Cell, shards: Shards) -> dict[str, Any]:
    """The outcome in numbers, for `result.json` and the tracker's summary."""
    member, final = cell.member, cell.final
    tokens = member.tokens
    summary: dict[str, Any] = {
        "status": cell.status,
        "tokens": tokens,
        "unique_tokens": tokens if cell.source.train_rows is None else min(tokens, cell.source.train_rows),
        "steps": member.done,
        "flops": member.flops(),
        "flops_executed": member.flops_executed,
        "params": budget.params(cell.config.sae, member.sae.d_model),
        "fvu": None,
        "fvu_se": None,
        "mse": None,
        "l0": None,
        "dead_frac": member.dead_frac(shards),
        "wall_s": member.elapsed(),
        "tokens_per_s": tokens / max(member.trained_s(), 1e-9),
        "converged": cell.converged,
    }
    if final is not None:
        summary |= {"fvu": final.fvu, "fvu_se": final.fvu_se, "mse": final.mse, "l0": final.l0}
        if final.fvu_raw is not None:
            summary["fvu_raw"] = final.fvu_raw
        summary |= cell.recovery(shards)
    return summary


def _result(cell: Cell, summary: dict[str, Any], started: str, attempt: int) -> dict[str, Any]:
    config, sae = cell.config, cell.config.sae
    result = {
        "run_id": cell.run_id,
        "sae": sae.architecture,
        "n_latents": sae.n_latents,
        "k": sae.k,
        "n_experts": sae.n_experts,
        "d_model": cell.member.sae.d_model,
        "seed": config.train.seed,
        **summary,
        "store_id": cell.source.id,
        "pca_fvu": {str(sae.k): pca_fvu(cell.source, cell.member.normalizer, sae.k)},
        "ops": cell.ops.NAME,
        "peak_memory_bytes": _peak_memory(cell.member.params["W_dec"].device),
        "attempts": attempt,
        "notes": read_notes(cell.run_dir),
        "trained_together": cell.together,
        "started": started,
        "finished": now(),
        "config": to_container(config),
    }
    if cell.status == "diverged":
        result["diverged_at_step"] = cell.diverged_at
    return result


def _peak_memory(device: torch.device) -> int:
    """Peak bytes since the runs began: of the device's allocator on a GPU, of the whole process elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
