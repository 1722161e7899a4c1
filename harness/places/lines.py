"""What a person reads while a sweep trains: the plan, a line per cell, how it ended, and what to type next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.budget import learning_rate, learning_rate_rule
from harness.cell_names import cell_names
from harness.config import Config, to_container
from harness.process.claim import Owner
from harness.progress import Countdown, Progress
from harness.record.attempt import read_ended
from harness.record.causes import Cause, cause_of
from harness.record.job import Job
from harness.record.names import ATTEMPTS
from harness.record.result import read_result
from harness.record.run import Run
from harness.record.rundir import attempts, saved_step
from harness.terminal import counted, listed, python_command, rough_duration, say, shown_path

USELESS_FVU = 1.0
"""fvu of the mean predictor."""


class Lines:
    """The lines of one launch."""

    def __init__(
        self, jobs: Sequence[Job], ended: Sequence[Run], seconds: Callable[[Job], float | None], command: str
    ) -> None:
        """`ended`: runs that had ended before. `seconds`: the plan of a whole job. `command`: what to type to go on."""
        self._jobs, self._ended, self._command = jobs, ended, command
        to_do = [run for job in jobs for run in job.runs]
        runs = [*ended, *to_do]
        names = cell_names([to_container(run.config) for run in runs])
        self._names = dict(zip((run.run_dir for run in runs), names, strict=True))
        self._expected = {job.home: _left_s(job, seconds(job)) for job in jobs}
        self.countdown = Countdown(len(runs), len(ended), list(self._expected.values()))
        self.progress = Progress()
        self.progress.countdown = self.countdown
        self.progress.names = {job.home.name: self._several(job.runs) for job in jobs}
        self._done = sum(run.status == "done" for run in ended)
        self._failures: dict[Cause, list[tuple[str, Path]]] = {}
        self._diverged: list[tuple[str, Run]] = []
        self._useless: list[str] = []

    def name(self, run: Run) -> str:
        """What tells the run from the others of the launch; its run_id if it was not asked for."""
        return self._names.get(run.run_dir, run.run_id)

    def _several(self, runs: Sequence[Run]) -> str:
        return self.name(runs[0]) + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")

    def begin(self, harvest: bool) -> None:
        """What is to be done. `harvest`: whether activations are missing."""
        total, ended = self.countdown.total, len(self._ended)
        if ended:
            diverged = sum(run.status == "diverged" for run in self._ended)
            what = f"have ended, {diverged} of them diverged" if diverged else "already done"
            say(f"{'all' if ended == total else f'{ended} of'} {total} cells {what}")
        if not self._jobs:
            return
        for line in _begun(self._jobs):
            say(line)
        left_s = self.countdown.left_s()
        about = "" if left_s is None else f", about {rough_duration(left_s)}"
        first = " once the activations are harvested" if harvest else ""
        say(f"{total - ended} left to train{about}{first}" if ended else f"{counted(total, 'cell')}{about}{first}")

    def job_begins(self, job: Job) -> None:
        self.countdown.begin(len(job.runs), self._expected.get(job.home))

    def job_ends(self) -> None:
        self.countdown.end()

    def ended(self, run: Run, result: dict[str, Any], seconds: float) -> None:
        """A run has a result: `done` or `diverged`."""
        if result["status"] == "diverged":
            self._diverged.append((self.name(run), run))
        else:
            self._done += 1
        if (result.get("fvu") or 0.0) >= USELESS_FVU:
            self._useless.append(self.name(run))
        self._cell(run, outcome(run.config, result, seconds))

    def failed(self, run: Run, error: str, log: Path) -> None:
        cause = cause_of(error)
        self._failures.setdefault(cause, []).append((self.name(run), log))
        self._cell(run, f"FAILED: {cause.what} (log: {shown_path(log)})")

    def job_has_ended(self, job: Job) -> None:
        """All runs of a job have results."""
        for run in job.runs:
            if (result := read_result(run.run_dir)) is not None:
                self.ended(run, result, result.get("wall_s") or 0.0)

    def ended_elsewhere(self, statuses: dict[Path, str]) -> None:
        """Another process has ended runs of this launch."""
        self._done += sum(status == "done" for status in statuses.values())
        self.countdown.count(len(statuses))

    def _cell(self, run: Run, text: str) -> None:
        self.countdown.count(1)
        self.progress.finish(f"{self.countdown.words()} {self.name(run)}: {text}")

    def waiting(self, cells: int, owner: Owner | None) -> None:
        who = "another process" if owner is None else f"another process ({owner})"
        verb = "is" if cells == 1 else "are"
        say(f"{counted(cells, 'cell')} {verb} being trained by {who}; waiting for it, Ctrl-C ends only this launch")

    def stopped(self, reason: str, job: Job | None) -> None:
        """A stop was asked for, and what can be saved is. `job`: what was in training."""
        step = None if job is None else saved_step(job.home)
        saved = f"; {self._several(job.runs)} is saved at step {step:,}" if job is not None and step is not None else ""
        say(f"interrupted: {reason}{saved}; {self._so_far()}")
        say(f"to go on: {self._command}")

    def disk_full(self, place: Path) -> None:
        say(f"error: no space left on the disk of {shown_path(place)}; {self._so_far()}")
        say(f"free some space; to go on: {self._command}")

    def _so_far(self) -> str:
        return f"{self._done} of {self.countdown.total} cells done"

    def summary(self, statuses: dict[Path, str]) -> None:
        """All jobs have ended: the counts, and a line for each cause of a failure."""
        counts = Counter(statuses.values())
        unlucky = "".join(f", {counts[name]} {name}" for name in ("diverged", "failed") if counts[name])
        say(f"{counts['done']} of {len(statuses)} cells done{unlucky}")
        for cause, cells in self._failures.items():
            say(f"failed: {listed([name for name, _ in cells])}: {cause.what}; log: {shown_path(cells[0][1])}")
            again = f"try again: {self._command}"
            say(f"  {cause.advice}; then {again}" if cause.advice else f"  {again}")
        if self._diverged:
            names, run = [name for name, _ in self._diverged], self._diverged[0][1]
            train = run.config.train
            lower = min(train.lr / 3, learning_rate_rule(run.config.sae.n_latents, 1.0))
            change = f"train.lr={lower:.2g}" if train.lr else f"train.lr_factor={train.lr_factor / 2:g}"
            say(f"diverged: {listed(names)}: a smaller learning rate is another run:")
            say(f"  {python_command('harness.retry', run.sweep_dir, change)}")
        if self._useless:
            say(f"warning: worse than the mean predictor (fvu ≥ 1), of no use in a law: {listed(self._useless)}")


def _left_s(job: Job, seconds: float | None) -> float | None:
    """What is left of the planned seconds of a job that may go on from a checkpoint."""
    step, run = saved_step(job.home), job.runs[0]
    if seconds is None or step is None or not run.tokens:
        return seconds
    return seconds * max(0.0, 1 - step * run.config.train.batch_tokens / run.tokens)


def _begun(jobs: Sequence[Job]) -> list[str]:
    """Lines about jobs that were begun before: failed, stopped or killed."""
    lines = []
    if failed := sum(run.status == "failed" for job in jobs for run in job.runs):
        lines.append(f"{counted(failed, 'cell')} failed earlier and will be tried again")
    for what, stopped in (("stopped and saved", True), ("killed", False)):
        begun = [job for job in jobs if any(run.status == "interrupted" for run in job.runs) and _saved(job) is stopped]
        cells = sum(run.status == "interrupted" for job in begun for run in job.runs)
        if cells:
            steps = [step for job in begun if (step := saved_step(job.home)) is not None]
            where = f"from step {steps[0]:,}" if len(begun) == 1 and steps else "from what is saved"
            where = where if steps else "from the beginning"
            lines.append(f"{counted(cells, 'cell')} {'was' if cells == 1 else 'were'} {what}; training goes on {where}")
    return lines


def _saved(job: Job) -> bool:
    """Whether the newest attempt of a job that was interrupted could say so."""
    run_dir = next(run.run_dir for run in job.runs if run.status == "interrupted")
    return read_ended(run_dir / ATTEMPTS / str(attempts(run_dir))) is not None


def outcome(config: Config, result: dict[str, Any], seconds: float) -> str:
    """What came out of a cell: fvu ± standard error, dead share, speed, time."""
    time = rough_duration(seconds)
    if result["status"] == "diverged":
        step, rate = result.get("diverged_at_step"), learning_rate(config)
        return f"DIVERGED at step {step} (peak learning rate {rate:.3g}), {time}"
    parts = [_fvu(result)]
    if result.get("dead_frac") is not None:
        parts.append(f"dead {result['dead_frac']:.1%}")
    if result.get("tokens_per_s") is not None:
        parts.append(f"{result['tokens_per_s']:,.0f} tok/s")
    return ", ".join([*parts, time])


def _fvu(result: dict[str, Any]) -> str:
    fvu, error = result.get("fvu"), result.get("fvu_se")
    if fvu is None:
        return "fvu -"
    if fvu >= USELESS_FVU:
        return f"fvu {fvu:.3g}, worse than the mean predictor"
    return f"fvu {fvu:.4f}" + (f" ± {error:.4f}" if error is not None else "")
