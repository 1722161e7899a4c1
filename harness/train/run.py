"""From a frozen configuration to a result: resume or begin, train, and leave a complete run directory."""

from __future__ import annotations

import logging
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from harness import budget
from harness.activations import ActivationSource
from harness.config import Config, to_container
from harness.ops import choose_ops
from harness.parallel import Shards, Solo
from harness.record.checkpoint import Checkpoint, find_checkpoint, remove_checkpoints
from harness.record.files import write_json_atomic, write_tensors_atomic
from harness.record.metrics import MetricsFile, NullMetrics, cut_after
from harness.record.progress import Progress
from harness.record.provenance import now
from harness.record.signals import StopFlag
from harness.record.tracker import NullTracker, open_tracker
from harness.train.cell import Cell
from harness.train.evaluate import pca_fvu
from harness.train.loop import train
from harness.train.member import make_member

log = logging.getLogger(__name__)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is the GPU when there is one, of several that of the rank on its node. Raises `ValueError` for a `cuda`
    that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU here; leave it at auto, or check the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, local_rank % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def run_cell(
    run_dir: Path,
    config: Config,
    source: ActivationSource,
    stop: StopFlag,
    progress: Progress,
    attempt: int = 1,
    shards: Shards | None = None,
) -> dict[str, Any]:
    """Train the cell that `run_dir` (named by its run_id) was frozen for, and return its `result.json`.

    Goes on from a checkpoint if there is a good one. Called by every rank of `shards` (default: one process); rank 0
    writes. Raises `Interrupted` after saving when `stop` is set; whatever else goes wrong is raised as it is and
    leaves no result.
    """
    run_id, started = run_dir.name, now()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    shards = shards or Solo()
    device = pick_device(config.train.device)
    ops = choose_ops(config.ops, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = _find_checkpoint(run_dir, run_id, shards)
    member = make_member(config, source, device, shards, ops)
    writer = shards.rank == 0
    with ExitStack() as stack:
        tracker = open_tracker(config, run_id, run_dir, resumed=found is not None) if writer else NullTracker()
        metrics = stack.enter_context(MetricsFile(run_dir / "metrics.jsonl")) if writer else NullMetrics()
        cell = Cell(run_id, run_dir, config, source, member, metrics, tracker, progress, ops)
        if found is not None and found.directory is not None:
            cell.restore(found.directory, found.extra, shards)
        progress.start(run_id, member.last * config.train.batch_tokens, member.tokens)
        summary: dict[str, Any] = {"status": "interrupted"}
        try:
            train([cell], shards, ops, stop)
            _save_weights(cell, shards)
            summary = _summary(cell, shards)
        finally:
            progress.finish("")
            tracker.finish(summary, 0 if summary["status"] == "done" else 1)
    result = _result(cell, summary, started, attempt)
    if writer:
        write_json_atomic(run_dir / "result.json", result)
        if not config.train.keep_checkpoints:
            remove_checkpoints(run_dir / "checkpoints")
    return result


def _find_checkpoint(run_dir: Path, run_id: str, shards: Shards) -> Checkpoint | None:
    """The checkpoint to go on from; the record is cut back to it, so that no step appears twice."""
    found = find_checkpoint(run_dir / "checkpoints", run_id, shards)
    if shards.rank == 0:
        cut_after(run_dir / "metrics.jsonl", -1 if found is None else found.step)
    if found is not None:
        for line in found.refused:
            log.warning(line)
        log.info("goes on at step %d", found.step)
    return found


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
        "started": started,
        "finished": now(),
        "config": to_container(config),
    }
    if cell.status == "diverged":
        result["diverged_at_step"] = cell.diverged_at
    return result


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the device's allocator on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
