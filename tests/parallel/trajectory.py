"""A few steps of a small SAE on any mesh, and everything about them that must not depend on the mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from harness.activations.source import ActivationSource
from harness.architectures import ARCHITECTURES
from harness.config import Config
from harness.ops import choose_ops
from harness.parallel import Shards
from harness.process.runtime import Runtime
from harness.training.evaluate import heldout_errors
from harness.training.mutual import take_step
from harness.training.state import TrainState, make_state
from tests.training.members import runtime, small_config, source_of

CPU = torch.device("cpu")

_COMMON: dict[str, Any] = {
    "sae__n_latents": 64,
    "train__clip_norm": 0.05,
    "train__ema": 0.9,
    "train__warmup_tokens": 64 * 20,
    "train__batch_tokens": 64,
}
_AUXK = {"sae__aux_alpha": 1 / 32, "sae__dead_after_tokens": 200, "sae__aux_k": 6}
_SWITCH = {"sae__architecture": "switch", "sae__n_experts": 4, "sae__balance_weight": 0.1}

_MUTUAL: dict[str, Any] = {"sae__aux_alpha": 0.0, "train__mfr_weight": 50.0, "train__mfr_seeds": [0, 1, 2]}
"""Weight 1.2 at step 10 of the ramp."""

_PENALISED: dict[str, Any] = {"sae__k": 0, "sae__aux_alpha": 0.0, "sae__target_l0": 6.0}
_SETTINGS: dict[str, dict[str, Any]] = {
    "jumprelu": {"sae__bandwidth": 0.05, "sae__threshold_init": 0.0},
    "jumprelu_tanh": {"sae__bandwidth": 0.1, "sae__threshold_init": 0.02},
}

CATALOGUE = {
    name: {
        "sae__architecture": name,
        **(_AUXK if not traits.penalty else _PENALISED),
        **_SETTINGS.get(name, {}),
    }
    for name, traits in ARCHITECTURES.items()
    if name not in ("topk", "switch")
}
"""All other architectures, with AuxK or with a steered penalty."""

CASES = {
    "topk": {"sae__aux_alpha": 0.0},
    "topk_auxk": _AUXK,
    "switch": {"sae__aux_alpha": 0.0, **_SWITCH},
    "switch_auxk": {**_AUXK, **_SWITCH},
    "switch_hash": {**_AUXK, **_SWITCH, "sae__routing": "hash"},
    "switch_random": {**_AUXK, **_SWITCH, "sae__routing": "random", "sae__consistency": 0.5},
    "topk_mutual": _MUTUAL,
    "switch_mutual": {**_SWITCH, **_MUTUAL},
    **CATALOGUE,
}


def case_config(name: str, dp: int = 1, shard: int = 1, precision: str = "fp64") -> Config:
    config = small_config(**_COMMON, **CASES[name], train__precision=precision)
    config.mesh.dp, config.mesh.shard = dp, shard
    return config


def with_peers(config: Config, source: ActivationSource, runtime: Runtime) -> list[TrainState]:
    """The SAE, and its peers if it has any."""
    seeds = config.train.mfr_seeds or [config.train.seed]
    trains = [replace(config.train, seed=seed) for seed in seeds]
    return [make_state(replace(config, train=train), source, runtime) for train in trains]


def trajectory(config: Config, shards: Shards, steps: int) -> dict[str, torch.Tensor]:
    """Losses, gradients of step 1, final weights and counters, held-out fvu: whole, on every rank."""
    source, ops = source_of(config), choose_ops("reference")
    group = with_peers(config, source, runtime(shards, ops))
    member = group[0]
    stream = source.stream(0, config.train.batch_tokens, CPU, shards.dp_rank, shards.dp)
    lines, tensors = [], {}
    for step in range(steps):
        take_step(group, stream.batch(step), runtime(shards, ops))
        if step == 0:
            tensors |= {f"gradient.{name}": whole(member, name, g, shards) for name, g in gradients(member).items()}
        lines.append(member.log_line(shards))
    tensors["mutual"] = torch.tensor([line.get("mutual", 0.0) for line in lines], dtype=torch.float64)
    tensors["loss"] = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
    tensors["n_dead"] = torch.tensor([line["n_dead"] for line in lines], dtype=torch.float64)
    tensors["grad_norm"] = torch.tensor([line["grad_norm"] for line in lines], dtype=torch.float64)
    tensors |= {name: whole(member, name, value, shards) for name, value in member.tensors().items()}
    params = member.optimizer.averaged(member.done)
    held = heldout_errors(member.sae, params, source, member.normalizer, 1500, runtime(shards, ops))
    assert held is not None
    found = held.evaluation(1500)
    tensors["fvu"] = torch.tensor([found.fvu, found.fvu_se, found.l0], dtype=torch.float64)
    tensors |= {f"heldout.{name}": torch.from_numpy(sums) for name, sums in held.by_document().items()}
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def gradients(member: TrainState) -> dict[str, torch.Tensor]:
    return {name: member.optimizer.grads[name].clone() for name in member.sae.layout()}


def whole(member: TrainState, name: str, value: torch.Tensor, shards: Shards) -> torch.Tensor:
    return shards.gather(value) if member.is_cut(name) else value
