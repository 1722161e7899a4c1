"""The end of a member: its weights, its held-out sums, then its result. After that its run directory is complete."""

from __future__ import annotations

from typing import Any

import torch

from harness import budget
from harness.config import to_container
from harness.files import sha256_of, write_json_atomic
from harness.parallel import Shards
from harness.process.memory import peak_bytes
from harness.process.runtime import Runtime
from harness.record import names
from harness.record.heldout import write_heldout
from harness.record.result import write_result
from harness.saes.weights import write_weights
from harness.training.evaluate import pca_fvu
from harness.training.member import Member


def finish(member: Member, runtime: Runtime, started: str) -> None:
    """Write the weights and the result; called by all ranks, the first one writes. `started`: ISO 8601."""
    shards, state, run = runtime.shards, member.state, member.run
    weights = _save_weights(member, shards)
    summary = _summary(member, shards)
    if shards.rank != 0:
        return
    # of penalised architectures the L0 that was reached
    k = run.config.sae.k or max(1, round(member.final.l0 if member.final else run.config.sae.active))
    sums = member.final_sums
    outcome = {
        "d_model": state.sae.d_model,
        **summary,
        "store_id": member.source.id,
        "weights": weights,
        "heldout_sha256": None if sums is None else write_heldout(run.run_dir, sums),
        "pca_fvu": {str(k): pca_fvu(member.source, state.normalizer, k)},
        "ops": runtime.ops.NAME,
        "peak_memory_bytes": _peak_memory(runtime.device),
        "trained_together": member.together,
    }
    if member.status == "diverged":
        outcome["diverged_at_step"] = member.diverged_at
    member.metrics.sync()
    write_result(run, outcome, started)


def _save_weights(member: Member, shards: Shards) -> dict[str, str]:
    """`sae/`: the final weights with their counters, and all that is needed to use them.

    Returns the sha256 of each file, on the first rank.
    """
    state, folder = member.state, member.run.run_dir / names.SAE
    counters = {"tokens_since_fired": state.silent, "fire_counts": state.fire_counts}
    tensors = {**member.weights(), **counters}
    written = write_weights(folder, tensors, {*counters, *filter(state.is_cut, tensors)}, shards)
    if shards.rank != 0:
        return {}
    write_json_atomic(
        folder / names.WEIGHTS_CONFIG,
        {
            "format": 1,
            "run_id": member.run.run_id,
            "sae": to_container(member.config)["sae"],
            "d_model": state.sae.d_model,
            "aux_k": state.sae.aux_k,
            "balance_weight": state.sae.balance_weight,
            "normalizer": {"rule": state.normalizer.rule, "scale": state.normalizer.scale},
            "variance": state.sae.variance,
            "weights": state.optimizer.saved,
            "tokens": state.tokens,
            "activations": member.source.description,
            "store_id": member.source.id,
        },
    )
    return {**written, names.WEIGHTS_CONFIG: sha256_of(folder / names.WEIGHTS_CONFIG)}


def _summary(member: Member, shards: Shards) -> dict[str, Any]:
    """The outcome in numbers, for `result.json`."""
    state, final = member.state, member.final
    tokens, rows = state.tokens, member.source.train_rows
    summary: dict[str, Any] = {
        "status": member.status,
        "tokens": tokens,
        "unique_tokens": tokens if rows is None else min(tokens, rows),
        "steps": state.done,
        "flops": state.flops(),
        "flops_core": state.flops(auxk=False),
        "flops_executed": state.flops_executed,
        "params": budget.params(member.config.sae, state.sae.d_model),
        "fvu": None,
        "fvu_se": None,
        "mse": None,
        "l0": None,
        "dead_frac": state.dead_frac(shards),
        "wall_s": state.elapsed(),
        "tokens_per_s": tokens / max(state.trained_s(), 1e-9),
        "converged": member.converged,
    }
    if final is not None:
        summary |= {"fvu": final.fvu, "fvu_se": final.fvu_se, "mse": final.mse, "l0": final.l0}
        if final.fvu_raw is not None:
            summary["fvu_raw"] = final.fvu_raw
        summary |= member.gain() | member.recovery(shards)
    return summary


def _peak_memory(device: torch.device) -> int:
    """Peak bytes since the job began: of the device's allocator on a GPU, of the whole process elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
