"""One cell of a grid while it trains: a member, its run directory, and what goes into the record between steps."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.activations.source import ActivationSource
from harness.activations.stream import Stream
from harness.activations.synthetic import recovered
from harness.config import Config
from harness.mirror.tracker import Tracker
from harness.ops import Ops
from harness.parallel import Shards
from harness.process.signals import StopFlag
from harness.record.metrics import MetricsFile, NullMetrics
from harness.saes import Params
from harness.terminal import Progress
from harness.training.evaluate import Evaluation, evaluate
from harness.training.member import Member
from harness.training.schedule import evaluation_steps, has_converged


@dataclass
class Cell:
    run_id: str
    run_dir: Path
    config: Config
    source: ActivationSource
    member: Member
    metrics: MetricsFile | NullMetrics
    tracker: Tracker
    progress: Progress
    ops: Ops
    together: int = 1
    """Runs of its job: several share a stream."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """fvu of the first `eval_rows` held-out rows by completed steps: the curve that decides on convergence."""
    status: str = ""
    """Empty while it trains, then `done` or `diverged`."""
    diverged_at: int | None = None
    """Completed steps when something was not finite any more."""
    final: Evaluation | None = None
    converged: bool = False

    @property
    def ended(self) -> bool:
        return bool(self.status)

    @functools.cached_property
    def evaluation_steps(self) -> frozenset[int]:
        """Asked at every step, so worked out once."""
        return evaluation_steps(self.config, self.member.last)

    def open_stream(self, shards: Shards) -> Stream:
        device = self.member.params["W_dec"].device
        train = self.config.train
        return self.source.stream(self.config.stream.seed, train.batch_tokens, device, shards.dp_rank, shards.dp)

    def between_steps(self, shards: Shards, stop: StopFlag) -> None:
        """Log, evaluate and end, whatever is due at this step; what was done at this step is not done again."""
        member = self.member
        at_end = member.done >= member.last
        evaluation_due = at_end or member.done in self.evaluation_steps
        if member.summed_steps and (evaluation_due or member.done % self.config.train.log_every_steps == 0):
            self._record(member.log_line(shards))
            self.diverged_at = member.diverged_at()
            if self.diverged_at is not None:
                self.status = "diverged"
                return
        if not evaluation_due:
            return
        evaluation = None
        if not at_end and member.done not in self.evaluations:
            evaluation = self._evaluate(shards, stop, whole=False)
            if evaluation is None:
                return
        if at_end or self._reached_convergence():
            evaluation = self._evaluate(shards, stop, whole=True)
            if evaluation is None:
                return
            if not math.isfinite(evaluation.fvu):
                # the batches never saw it, a held-out row did
                self.status, self.diverged_at = "diverged", member.done
                return
            self.final = evaluation
            self.converged = has_converged(self.config, self.evaluations, member.done)
            self.status = "done"
        if evaluation is not None:
            line = asdict(evaluation)
            line["eval_rows"] = line.pop("rows")
            if evaluation.fvu_raw is None:
                del line["fvu_raw"]
            self._record(member.position() | line | self.recovery(shards))

    def _reached_convergence(self) -> bool:
        until = self.config.train.until
        return until == "convergence" and has_converged(self.config, self.evaluations, self.member.done)

    def _evaluate(self, shards: Shards, stop: StopFlag, whole: bool) -> Evaluation | None:
        """Held-out error of the first `eval_rows` rows, which goes into `evaluations`, or with `whole` of all rows;
        None if stopped."""
        member, begun = self.member, time.monotonic()
        limits = (self.config.train.eval_rows, self.source.heldout_rows) if whole else (self.config.train.eval_rows,)
        result = evaluate(member.sae, self.weights(), self.source, member.normalizer, limits, shards, self.ops, stop)
        member.eval_s += time.monotonic() - begun
        member.collect_sent(shards)
        if result is None:
            return None
        self.evaluations[member.done] = result[0].fvu
        return result[-1]

    def weights(self) -> Params:
        """The weights that count: the moving average if there is one."""
        return self.member.optimizer.averaged(self.member.done)

    def recovery(self, shards: Shards) -> dict[str, float]:
        """How much of a known dictionary the decoder has found; nothing where there is none."""
        truth = self.source.dictionary
        return {} if truth is None else recovered(shards.gather(self.weights()["W_dec"]).float().cpu(), truth)

    def _record(self, line: dict[str, Any]) -> None:
        self.metrics.append(line)
        self.tracker.log(line)
        self.progress.update(line["tokens"], line)

    def counters(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors."""
        evaluations = list(self.evaluations.items())
        return {
            "scalars": self.member.scalars(),
            "evaluations": evaluations,
            "metrics": self.metrics.position(),
            "ops": self.ops.NAME,
        }

    def restore(self, counters: dict[str, Any], shards: Shards) -> None:
        """Go on from a checkpoint whose tensors have been read into the member."""
        self.member.restore(counters["scalars"], shards)
        self.evaluations = dict(counters["evaluations"])
