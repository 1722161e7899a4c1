"""The state of one SAE in training: weights, optimiser, dead counters, and the sums between two log lines."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harness import budget
from harness.activations.source import ActivationSource
from harness.activations.whole_contexts import ContextBatch, WholeContexts
from harness.config import Config
from harness.errors import UserError
from harness.parallel import Shards
from harness.process.gpus import peak_flops
from harness.process.runtime import Runtime
from harness.saes import (
    DeadLatents,
    Normalizer,
    Params,
    Sae,
    Stats,
    encoded_with_all,
    find_dead,
    initial_params,
    make_normalizer,
    match_norm,
    resolve_sae,
    step,
)
from harness.saes.mutual import Peers
from harness.saes.start_from import params_from
from harness.training import end_to_end
from harness.training.graph import StepGraph, can_repeat
from harness.training.means import SUMS, further_sums, summed
from harness.training.optimizer import Optimizer
from harness.training.schedule import k_at, lr_at
from harness.training.signum import OPTIMIZERS
from harness.training.sparsity import Sparsity

MASTER = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
INIT_ROWS = 4096
"""Rows of the sample that set the initial scale of the encoder."""


@dataclass
class TrainState:
    """Everything that a training step changes."""

    config: Config
    sae: Sae
    normalizer: Normalizer
    optimizer: Optimizer
    last: int
    """Steps that the budget buys."""
    silent: Tensor
    """Global tokens since each local latent last fired, int64."""
    fire_counts: Tensor
    """Tokens on which each local latent has fired since the start, int64."""
    dead: Tensor
    """The local latents that AuxK uses until the next refresh, bool."""
    sums: Tensor
    """Sums over the steps since the last log line, float64, in the order of `means.summed`."""
    bad_step: Tensor
    """Completed steps when the loss first was not finite; −1 while it is finite. int64."""
    number: Tensor
    """`done`, on the device, int64."""
    n_dead: Tensor
    """Dead latents on all shards that AuxK works on, on the device, int64."""
    sparsity: Sparsity | None = None
    """The coefficient of the penalty; None for architectures without one."""
    lm_flops: float = 0.0
    """Closed-form FLOPs per token of what the objective asks of the language model."""
    peak_flops: float | None = None
    """FLOP/s that one rank's GPU reaches at most; None if unknown."""
    done: int = 0
    summed_steps: int = 0
    wall_s: float = 0.0
    """Seconds of all attempts up to `clock`."""
    clock: float = 0.0
    eval_s: float = 0.0
    """The part of `wall_s` that went into evaluations."""
    flops_executed: float = 0.0
    _mark: tuple[int, float, float] = (0, 0.0, 0.0)
    """(completed steps, seconds of pure training, executed FLOPs) at the last log line or start, for rates."""
    _dead_latents: DeadLatents | None = None
    _graph: StepGraph | None = None
    _lists: dict[tuple[int, ...], DeadLatents] = field(default_factory=dict)
    """By their offsets, the lists that recorded graphs read."""
    _sent: dict[str, float] = field(default_factory=dict)
    """Bytes that this rank sent for this SAE since the last log line, by kind."""

    @property
    def params(self) -> Params:
        return self.optimizer.params

    @property
    def tokens(self) -> int:
        return self.done * self.config.train.batch_tokens

    def elapsed(self) -> float:
        """Seconds of training, evaluation included, over all attempts."""
        now = time.monotonic()
        self.wall_s, self.clock = self.wall_s + now - self.clock, now
        return self.wall_s

    def trained_s(self) -> float:
        """Seconds of training, evaluations excluded, over all attempts."""
        return self.elapsed() - self.eval_s

    def train_step(self, batch: Float[Tensor, "tokens d"] | ContextBatch, runtime: Runtime) -> None:
        """One step on this replica's rows of the batch. It synchronises with the host only when AuxK is refreshed."""
        self.begin_step(runtime)
        graph = self._step_graph(batch, runtime) if isinstance(batch, Tensor) else None
        self.optimizer.set_rates(lr_at(self.config, self.done, self.last), self.done + 1)
        if graph is not None and isinstance(batch, Tensor):
            dead = self._dead_latents
            graph(batch, () if dead is None else dead.row_offsets)
        else:
            self._compute(batch, runtime)
        self.end_step(runtime)

    def begin_step(self, runtime: Runtime) -> None:
        """What comes before the gradients of a step. `train_step` is all parts of it in turn."""
        if self.done % self.config.sae.aux_refresh_steps == 0:
            self.dead.copy_(self.silent >= self.config.sae.dead_after_tokens)
            self._list_dead(runtime)
        self.number.fill_(self.done)

    def _list_dead(self, runtime: Runtime) -> None:
        """The lists for AuxK from `dead`; waits for the device."""
        found = find_dead(self.sae, self.dead, runtime.shards, runtime.ops)
        if found is not None and found.barred is not None and self._can_record(runtime):
            found = self._lists.setdefault(found.row_offsets, found).renewed(found)
        self._dead_latents = found
        self.n_dead.fill_(0 if found is None else found.total)

    def end_step(self, runtime: Runtime) -> None:
        """What comes after the update."""
        self._count_flops(runtime)
        self.collect_sent(runtime.shards)
        self.summed_steps += 1
        self.done += 1

    def _compute(self, batch: Float[Tensor, "tokens d"] | ContextBatch, runtime: Runtime) -> None:
        """The part of a step that runs on the device."""
        stats = self.gradients(batch, runtime)
        self.update(stats, self.is_well(stats), runtime)

    def gradients(
        self, batch: Float[Tensor, "tokens d"] | ContextBatch, runtime: Runtime, peers: Peers | None = None
    ) -> Stats:
        """The gradients at the present weights, into the optimiser's."""
        sae = replace(self.sae, k=k_at(self.config, self.done, self.last))
        rows = batch.rows if isinstance(batch, ContextBatch) else batch
        x, objective = self.normalizer(rows, self.params["W_dec"].dtype), None
        if isinstance(batch, ContextBatch):
            weights = end_to_end.WEIGHTS[self.config.train.objective]
            objective = end_to_end.EndToEnd(weights, batch, self.normalizer, x)
        return step(
            sae,
            self.params,
            self.optimizer.compute,
            x,
            runtime,
            self._dead_latents,
            self.optimizer.grads,
            sparsity=0.0 if self.sparsity is None else self.sparsity.value(self.done).to(x.dtype),
            peers=peers,
            done=self.done,
            objective=objective,
        )

    def is_well(self, stats: Stats) -> Bool[Tensor, ""]:
        """Whether the loss is finite, and was so in all steps before."""
        return stats.loss.isfinite() & (self.bad_step < 0)

    def update(self, stats: Stats, well: Bool[Tensor, ""], runtime: Runtime) -> None:
        """The update by the gradients that are there, where `well` is true, and what is counted."""
        lr = lr_at(self.config, self.done, self.last)
        sparsity = None if self.sparsity is None else self.sparsity.value(self.done).to(stats.l0.dtype)
        if self.sparsity is not None:
            self.sparsity.observe(stats.l0, self.done, lr)
        well, norm = self.optimizer.apply(lr, self.done + 1, well, runtime)
        self.bad_step.copy_(torch.where(well | (self.bad_step >= 0), self.bad_step, self.number))
        self.silent.add_(self.config.train.batch_tokens).masked_fill_(stats.fired > 0, 0)
        self.fire_counts.add_(stats.fired)
        self.sums += summed(self.config, stats, norm, sparsity, self.n_dead).to(self.sums.dtype)

    def _can_record(self, runtime: Runtime) -> bool:
        """Whether steps may be CUDA graphs."""
        return runtime.shards.size == 1 and self.dead.is_cuda and can_repeat(self.config, runtime.ops)

    def _step_graph(self, raw: Float[Tensor, "tokens d"], runtime: Runtime) -> StepGraph | None:
        """The step as a CUDA graph if requested and possible, else None: in one process, and with dead latents only in
        lists that stay where they are."""
        dead = self._dead_latents
        if not self._can_record(runtime) or (dead is not None and dead.barred is None):
            return None
        if self._graph is None:
            self._graph = StepGraph(lambda batch: self._compute(batch, runtime), raw)
            self.optimizer.rates = torch.empty(2, device=raw.device)
        return self._graph if self._graph.fits(raw) else None

    def collect_sent(self, shards: Shards) -> None:
        """Count the bytes sent since the last call as this member's: several members send over one mesh."""
        for kind, sent in shards.take_sent().items():
            self._sent[kind] = self._sent.get(kind, 0.0) + sent

    def _count_flops(self, runtime: Runtime) -> None:
        train, n_dead = self.config.train, 0 if self._dead_latents is None else self._dead_latents.total
        ops, dtype = runtime.ops, self.optimizer.compute["W_enc"].dtype
        executed = budget.flops_executed_per_token(
            self.config.sae,
            self.sae.d_model,
            train.batch_tokens,
            n_dead,
            ops.dense_rows_per_k(train.precision),
            train.optimizer,
            train.peers,
            encodes_dead=not encoded_with_all(self.sae, dtype, runtime.shards, ops),
        )
        self.flops_executed += (sum(executed.values()) + self.lm_flops) * train.batch_tokens

    def flops(self, auxk: bool = True) -> float:
        """Closed-form FLOPs so far, with or without the nominal AuxK."""
        train = self.config.train
        parts = budget.flops_per_token(
            self.config.sae, self.sae.d_model, train.batch_tokens, train.optimizer, train.peers
        )
        own = sum(flops for part, flops in parts.items() if auxk or part != "auxk")
        return self.tokens * (own + self.lm_flops)

    def position(self) -> dict[str, Any]:
        """The axes on every line of the record."""
        return {
            "step": self.done,
            "tokens": self.tokens,
            "flops": self.flops(),
            "flops_executed": self.flops_executed,
            "wall_s": self.elapsed(),
        }

    def dead_frac(self, shards: Shards) -> float | None:
        """Share of latents that were silent over the last `dead_window_tokens`; None while the run is shorter."""
        window = self.config.train.dead_window_tokens
        if self.tokens < window:
            return None
        return float(shards.sum_((self.silent >= window).sum(), "shard", "scalars")) / self.sae.n_latents

    def log_line(self, shards: Shards) -> dict[str, Any]:
        """Means over the steps since the last log line; the sums begin anew. Waits for the device."""
        means = dict(zip(SUMS, (self.sums[: len(SUMS)] / self.summed_steps).tolist(), strict=True))
        further = self.sums[len(SUMS) :] / self.summed_steps
        share = further[: self.sae.n_experts]
        line = self.position()
        before, self._mark = self._mark, (self.done, self.trained_s(), self.flops_executed)
        steps, seconds, flops = (now - then for now, then in zip(self._mark, before, strict=True))
        seconds = max(seconds, 1e-9)
        line |= means | dict(zip(further_sums(self.config), further[self.sae.n_experts :].tolist(), strict=True))
        line |= {
            "dead_frac": self.dead_frac(shards),
            "lr": lr_at(self.config, self.done - 1, self.last),
            "tokens_per_s": steps * self.config.train.batch_tokens / seconds,
        }
        if self.peak_flops is not None:
            line["mfu"] = flops / seconds / (self.peak_flops * shards.size)
        if self.sae.routed:
            line |= {
                "expert_load_max": float(share.max()) * self.sae.n_experts,
                "expert_load_min": float(share.min()) * self.sae.n_experts,
                # E·Σ f², the published measure of collapse: 1 when balanced
                "imbalance": float(share.square().sum()) * self.sae.n_experts,
            }
        if not self.sae.learns_routing:
            del line["balance"], line["router_entropy"]
        if not self.config.train.clip_norm:
            del line["grad_norm"]
        line |= {f"bytes_sent_{kind}": sent / max(1, steps) for kind, sent in self._sent.items()}
        self._sent = {}
        self.sums.zero_()
        self.summed_steps = 0
        return line

    def diverged_at(self) -> int | None:
        """Completed steps when the loss first was not finite, or None. Waits for the device."""
        step = int(self.bad_step)
        return None if step < 0 else step

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the trajectory or the record depends on."""
        steering = {} if self.sparsity is None else {"sparsity": self.sparsity.state}
        return (
            self.optimizer.state()
            | steering
            | {
                "silent": self.silent,
                "fire_counts": self.fire_counts,
                "dead": self.dead,
                "sums": self.sums,
                "bad_step": self.bad_step,
            }
        )

    def state_bytes(self) -> int:
        """Bytes of this rank's part of a checkpoint."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def scalars(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "summed_steps": self.summed_steps,
            "wall_s": self.elapsed(),
            "eval_s": self.eval_s,
            "flops_executed": self.flops_executed,
            "heldout_gap": 0.0 if self.sparsity is None else float(self.sparsity.gap),
        }

    def views(self, shards: Shards) -> dict[str, Tensor]:
        """`tensors` as a checkpoint of this mesh sees them."""
        return {name: shards.global_view(tensor, self.is_cut(name)) for name, tensor in self.tensors().items()}

    def is_cut(self, name: str) -> bool:
        """Whether a tensor (`W_enc`, `adam_mean.W_enc`, a counter) holds only the latents of this rank."""
        return name in ("silent", "fire_counts", "dead") or self.sae.layout().get(name.split(".")[-1]) == "latent_rows"

    def restore(self, scalars: dict[str, Any], runtime: Runtime) -> None:
        """Go on from a checkpoint; its tensors have been read into `views` already."""
        self.done, self.summed_steps = scalars["done"], scalars["summed_steps"]
        self.wall_s, self.eval_s = scalars["wall_s"], scalars["eval_s"]
        self.flops_executed = scalars["flops_executed"]
        if self.sparsity is not None:
            self.sparsity.gap.fill_(scalars.get("heldout_gap", 0.0))  # earlier versions did not have it
        self._mark = (self.done, self.wall_s - self.eval_s, self.flops_executed)
        self.optimizer.refresh_copies()
        self._list_dead(runtime)


def make_state(config: Config, source: ActivationSource, runtime: Runtime) -> TrainState:
    """The state at step 0: normalisation and V from the store, initial weights from `train.seed`."""
    device, shards = runtime.device, runtime.shards
    train = config.train
    layernorm = config.sae.normalize == "layernorm"
    raw, statistics = source.statistics(False), source.statistics(layernorm)
    if not statistics.variance > 0:
        raise UserError(
            f"the training rows do not vary (their variance is {statistics.variance:g} with "
            f"sae.normalize={config.sae.normalize}), so there is nothing to learn; choose other activations"
        )
    normalizer = make_normalizer(config.sae.normalize, source.d_model, raw.mean_sq_norm)
    unit = normalizer.scale**2
    sae = resolve_sae(
        config.sae, source.d_model, statistics.variance / unit, raw.variance, statistics.mean_sq_norm / unit
    )
    dtype = MASTER[train.precision]
    sample = normalizer(source.sample(), torch.float64)
    params = initial_params(sae, sample, train.seed, shards, device, dtype, config.sae.init == "tied")
    if train.init_from:
        params = params_from(train.init_from, train.init_hash, sae, normalizer, params, shards)
    elif config.sae.match_init_norm:
        match_norm(sae, params, sample[:INIT_ROWS].to(device, dtype), runtime)
    rows, penalised = params["W_enc"].shape[0], bool(sae.traits.penalty)
    return TrainState(
        config=config,
        sae=sae,
        normalizer=normalizer,
        optimizer=OPTIMIZERS[train.optimizer](sae, params, train, COMPUTE[train.precision]),
        last=budget.total_steps(config, source.d_model),
        silent=torch.zeros(rows, dtype=torch.int64, device=device),
        fire_counts=torch.zeros(rows, dtype=torch.int64, device=device),
        dead=torch.zeros(rows, dtype=torch.bool, device=device),
        sums=torch.zeros(len(SUMS) + sae.n_experts + len(further_sums(config)), dtype=torch.float64, device=device),
        bad_step=torch.tensor(-1, device=device),
        number=torch.tensor(0, device=device),
        n_dead=torch.tensor(0, device=device),
        clock=time.monotonic(),
        lm_flops=source.flops_per_row if isinstance(source, WholeContexts) else 0.0,
        sparsity=Sparsity(config, math.sqrt(statistics.mean_sq_norm / unit) / sae.variance, device)
        if penalised
        else None,
        peak_flops=peak_flops(torch.cuda.get_device_name(device), train.precision) if device.type == "cuda" else None,
    )
