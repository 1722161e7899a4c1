"""A member of a job: one run while it trains, and what goes into its record between two steps."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from harness.activations.source import ActivationSource
from harness.activations.stream import Batches
from harness.activations.synthetic import best_cosines, close_latents, recovered
from harness.config import Config
from harness.parallel import Shards
from harness.process.runtime import Runtime
from harness.progress import Progress
from harness.record.metrics import MetricsFile, NullMetrics
from harness.record.run import Run
from harness.saes import Params
from harness.schema import TEXT, fields, list_of, number, optional, whole
from harness.training.evaluate import Evaluation, heldout_errors, training_l0
from harness.training.schedule import evaluation_steps, gain, half_of, has_converged
from harness.training.state import TrainState

_SCALARS = fields(
    {
        "done": whole(),
        "summed_steps": whole(),
        "wall_s": number(0),
        "eval_s": number(0),
        "flops_executed": number(0),
        "heldout_gap?": number(),
    }
)
COUNTERS = fields(
    {
        "scalars": _SCALARS,
        "evaluations": list_of(list_of(optional(number()))),
        "error_sums?": list_of(list_of(list_of(optional(number())))),
        "metrics": whole(),
        "ops": TEXT,
    }
)
"""What `Member.counters` returns, read from a checkpoint."""


@dataclass
class Member:
    run: Run
    source: ActivationSource
    state: TrainState
    metrics: MetricsFile | NullMetrics
    progress: Progress
    together: int = 1
    """Runs of its job, which share a stream."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """Completed steps → fvu of the first `eval_rows` held-out rows: the curve that decides on convergence."""
    error_sums: dict[int, list[float]] = field(default_factory=dict)
    """Completed steps → `HeldOutErrors.error_sums` of those rows, over the last doubling of tokens."""
    status: str = ""
    """Empty while it trains, then `done` or `diverged`."""
    diverged_at: int | None = None
    """Completed steps when the loss or the held-out error first was not finite."""
    final: Evaluation | None = None
    final_sums: dict[str, np.ndarray] | None = None
    """`HeldOutErrors.by_document` of the final evaluation."""
    converged: bool = False

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def ended(self) -> bool:
        return bool(self.status)

    @functools.cached_property
    def evaluation_steps(self) -> frozenset[int]:
        """Worked out once, because every step asks."""
        return evaluation_steps(self.config, self.state.last)

    def open_stream(self, runtime: Runtime) -> Batches:
        shards, seed = runtime.shards, self.config.stream.seed
        batch_tokens = self.config.train.batch_tokens
        return self.source.stream(seed, batch_tokens, runtime.device, shards.dp_rank, shards.dp)

    def between_steps(self, runtime: Runtime) -> None:
        """Log, evaluate and end, if due at this step. Nothing is done twice at one step."""
        state = self.state
        at_end = state.done >= state.last
        evaluation_due = at_end or state.done in self.evaluation_steps
        # it ended before a save, and its peers had not yet
        recorded = at_end and state.done in self.evaluations
        if state.summed_steps and (evaluation_due or state.done % self.config.train.log_every_steps == 0):
            self._record(state.log_line(runtime.shards))
            self.diverged_at = state.diverged_at()
            if self.diverged_at is not None:
                self.status = "diverged"
                return
        if not evaluation_due:
            return
        evaluation = None
        if not at_end and state.done not in self.evaluations:
            evaluation = self._evaluate(runtime, whole=False)
            if evaluation is None:
                return
        if at_end or self._reached_convergence():
            evaluation = self._evaluate(runtime, whole=True)
            if evaluation is None:
                return
            if not math.isfinite(evaluation.fvu):
                # no batch was affected, but a held-out row was
                self.final_sums = None
                self.status, self.diverged_at = "diverged", state.done
                return
            self.final = evaluation
            self.converged = has_converged(self.config, self.evaluations, state.done)
            self.status = "done"
        if evaluation is not None and not recorded:
            line = asdict(evaluation)
            line["eval_rows"] = line.pop("rows")
            if evaluation.fvu_raw is None:
                del line["fvu_raw"]
            self._record(state.position() | line | self.gain() | self.recovery(runtime.shards))

    def _reached_convergence(self) -> bool:
        until = self.config.train.until
        return until == "convergence" and has_converged(self.config, self.evaluations, self.state.done)

    def _evaluate(self, runtime: Runtime, whole: bool) -> Evaluation | None:
        """Held-out error of the first `eval_rows` rows, or of all rows with `whole`; None if stopped.

        The error of the first rows goes into `evaluations` in both cases.
        """
        state, begun = self.state, time.monotonic()
        few = self.config.train.eval_rows
        rows = max(few, self.source.heldout_rows) if whole else few
        errors = heldout_errors(state.sae, self.weights(), self.source, state.normalizer, rows, runtime)
        if errors is not None and not whole and state.sparsity is not None and self.config.sae.target_l0:
            on_training = training_l0(state.sae, state.params, self.source, state.normalizer, runtime)
            state.sparsity.aim(errors.evaluation(few).l0, on_training)
        state.eval_s += time.monotonic() - begun
        state.collect_sent(runtime.shards)
        if errors is None:
            return None
        self.evaluations[state.done] = errors.evaluation(few).fvu
        self.error_sums[state.done] = errors.error_sums(few)
        self.error_sums = {step: sums for step, sums in self.error_sums.items() if step >= state.done / 2 - 1}
        if whole:
            self.final_sums = errors.by_document()
        return errors.evaluation(rows)

    def gain(self) -> dict[str, float]:
        """How much the error of the first `eval_rows` rows fell over the last doubling of tokens, with its paired
        standard error: what the decision on convergence rests on. Empty if no evaluation was at half the tokens."""
        done = self.state.done
        half = half_of(self.config, self.error_sums, done)
        if half is None:
            return {}
        return dict(zip(("gain", "gain_se"), gain(self.error_sums[done], self.error_sums[half]), strict=True))

    def weights(self) -> Params:
        """The weights to evaluate and save: the moving average if there is one."""
        return self.state.optimizer.averaged(self.state.done)

    def recovery(self, shards: Shards) -> dict[str, float]:
        """How much of a known dictionary the decoder has recovered; empty without one."""
        truth = self.source.dictionary
        if truth is None:
            return {}
        # the best latent of each shard
        best, close = torch.zeros(shards.shard, len(truth)), torch.tensor(0)
        if shards.dp_rank == 0:
            decoder = self.weights()["W_dec"].float().cpu()
            best[shards.shard_rank] = best_cosines(decoder, truth)
            close += close_latents(decoder, truth) if truth.dim() == 3 else 0
        found = recovered(shards.sum_(best, "all", "evaluation").amax(dim=0))
        if truth.dim() == 3:
            spheres = max(1.0, found["recovered"] * len(truth))
            found["latents_per_recovered"] = float(shards.sum_(close, "all", "evaluation")) / spheres
        return found

    def _record(self, line: dict[str, Any]) -> None:
        self.metrics.append(line)
        self.progress.update(line["tokens"], line)

    def counters(self, ops_name: str) -> dict[str, Any]:
        """What a checkpoint holds in addition to the tensors."""
        evaluations = list(self.evaluations.items())
        return {
            "scalars": self.state.scalars(),
            "evaluations": evaluations,
            "error_sums": [[[step], sums] for step, sums in self.error_sums.items()],
            "metrics": self.metrics.position(),
            "ops": ops_name,
        }

    def restore(self, counters: dict[str, Any], runtime: Runtime) -> None:
        """Go on from a checkpoint; its tensors have been read into the state already."""
        self.state.restore(counters["scalars"], runtime)
        self.evaluations = {step: math.nan if fvu is None else fvu for step, fvu in counters["evaluations"]}
        self.error_sums = {
            int(step): [math.nan if entry is None else entry for entry in sums]
            for (step,), sums in counters.get("error_sums", [])
        }
