"""Judge finished SAEs by metrics: what is missing, in which order, what is kept when it is stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.activations.store.paths import store_name
from harness.errors import Unavailable, UserError
from harness.process.signals import Interrupted, StopFlag
from harness.progress import Progress
from harness.quality.metric import Metric, Outcome, Subject
from harness.quality.registry import METRICS
from harness.quality.shared import Shared
from harness.quality.subjects import require_fit
from harness.record.quality import read_quality, write_quality

TOKENS = 16384
"""Of held-out text and of held-out rows, unless told otherwise."""


@dataclass
class Judged:
    """What became of a request."""

    done: int = 0
    present: int = 0
    """Results that existed already."""
    problems: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    """Metrics that need what is not here, if it is no problem that they do."""
    stopped: bool = False


def chosen_metrics(names: Sequence[str]) -> list[Metric]:
    """Raises `UserError` for an unknown name."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics {name} is not known; choose from: {', '.join(METRICS)}")
    return [METRICS[name] for name in dict.fromkeys(names)]


def judge(
    subjects: Sequence[Subject],
    metrics: Sequence[Metric],
    tokens: int,
    *,
    force: bool,
    stop: StopFlag,
    progress: Progress,
    by: str = "embedding",
    possible: bool = False,
) -> Judged:
    """Evaluate what is missing; `by` judges explanations, `possible` leaves out metrics that need what is not here. A
    problem of one metric or one SAE does not keep the others from being judged."""
    judged = Judged()
    for group in _by_activations(subjects):
        shared = Shared(group[0].activations, group[0].out, tokens, stop, progress, by)
        group = [subject for subject in group if _fits(subject, shared, judged)]
        for metric in metrics:
            about = {subject.directory: _about(metric, subject, tokens, by) for subject in group}
            missing = [subject for subject in group if force or not _is_there(subject, about[subject.directory])]
            judged.present += len(group) - len(missing)
            if not missing:
                continue
            try:
                for subject, outcome in metric.run(missing, shared):
                    _write(subject, about[subject.directory], outcome)
                    judged.done += 1
                    progress.note(f"{subject.name}  {_summary(metric.name, outcome)}")
                progress.finish("")
            except Interrupted:
                progress.finish("")
                judged.stopped = True
                return judged
            except UserError as problem:
                progress.finish("")
                told = judged.left_out if possible and isinstance(problem, Unavailable) else judged.problems
                told.append(f"{metric.name}: {problem}")
    return judged


def unfinished(subjects: Sequence[Subject], metrics: Sequence[Metric], tokens: int, by: str) -> list[Subject]:
    """Those that miss a result of one of the metrics."""
    return [
        subject
        for subject in subjects
        if not all(_is_there(subject, _about(metric, subject, tokens, by)) for metric in metrics)
    ]


def _fits(subject: Subject, shared: Shared, judged: Judged) -> bool:
    """Whether a foreign SAE belongs to the activations; ours do."""
    if not subject.foreign:
        return True
    try:
        require_fit(subject.load(), subject.name, shared.rows)
    except UserError as problem:
        judged.problems.append(str(problem))
        return False
    return True


def _by_activations(subjects: Iterable[Subject]) -> list[list[Subject]]:
    """Subjects that are judged on the same activations, together."""
    groups: dict[tuple[str, str], list[Subject]] = {}
    for subject in subjects:
        groups.setdefault((str(subject.out), store_name(subject.activations)), []).append(subject)
    return list(groups.values())


def _about(metric: Metric, subject: Subject, tokens: int, by: str) -> dict[str, Any]:
    settings = {"tokens": tokens, "store": store_name(subject.activations), **metric.settings(by)}
    return {"metric": metric.name, "version": metric.version, "settings": settings, "weights": subject.weights}


def _is_there(subject: Subject, about: dict[str, Any]) -> bool:
    """Whether the same evaluation of the same weights is recorded. A damaged file is evaluated again."""
    try:
        found = read_quality(subject.directory, about["metric"])
    except UserError:
        return False
    return found is not None and all(found[key] == value for key, value in about.items())


def _write(subject: Subject, about: dict[str, Any], outcome: Outcome) -> None:
    about = {**about, "tokens": outcome.tokens}
    columns = outcome.per_latent, outcome.per_document
    write_quality(subject.directory, about, outcome.values, *columns, outcome.curves, outcome.tables)


def _summary(metric: str, outcome: Outcome) -> str:
    """The first values of an outcome."""
    parts = [
        f"{name} {value.value:.4g}" + (f" ± {value.se:.2g}" if value.se is not None else "")
        for name, value in list(outcome.values.items())[:4]
    ]
    return f"{metric}: {', '.join(parts)}"
