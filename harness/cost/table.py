"""The plan as text: a row per run, then jobs, time, disk, and what would not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.cost.estimate import Estimate, Estimates
from harness.cost.limits import Disk, disk, longer_than_the_limit, would_not_fit
from harness.cost.outliers import outlier_lines
from harness.cost.repeats import repeats, repeats_line
from harness.cost.windows import window_lines
from harness.record.job import Job
from harness.record.result import unfinished
from harness.record.run import Run
from harness.terminal import duration, si, table

ROWS = 200
"""Runs in the table."""

PARTS = {"encoder": "enc", "selection": "sel", "decode": "dec", "gradients": "grad", "auxk": "aux", "router": "rt"}
"""Part of the FLOPs -> its name in the heading of the shares; the optimiser comes last."""

SHARES = f"% {'/'.join(PARTS.values())}/opt"

OPTIONAL = (SHARES, "% mfr", "checkpoint", "sent/step", "params", "tokens", "FLOPs")
"""Columns that a narrow terminal does without, from the first on."""


def plan_text(runs: Sequence[Run], jobs: Sequence[Job], estimates: Estimates) -> str:
    """The plan as text for standard output.

    `runs`: all runs of the request, cheap ones first. `jobs`: the jobs that will train the unfinished ones.
    """
    job_number = {run.run_dir: number for number, job in enumerate(jobs, start=1) for run in job.runs}
    columns = _columns(runs, jobs, estimates, job_number)
    rows = [[form(run, estimates.of(run)) for form in columns.values()] for run in runs[:ROWS]]
    lines = [table(list(columns), rows, left=("state",), optional=OPTIONAL)]
    if len(runs) > ROWS:
        lines.append(f"… and {len(runs) - ROWS} more")
    counts = Counter(run.status for run in runs)
    lines.append(f"{len(runs)} cells: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    lines += repeats_line(map(repeats, runs))
    if any(estimates.of(run).flops for run in runs):
        lines += _summary(runs, jobs, estimates)
    return "\n".join(lines)


def _columns(
    runs: Sequence[Run], jobs: Sequence[Job], estimates: Estimates, job_number: Mapping[Path, int]
) -> dict[str, Callable[[Run, Estimate], str]]:
    """Heading -> the text of a run in that column."""
    columns: dict[str, Callable[[Run, Estimate], str]] = {
        "run": lambda run, _: run.run_id,
        "params": lambda _, cost: _si(cost.params),
        "tokens": lambda _, cost: _si(cost.tokens),
        "FLOPs": lambda _, cost: f"{sum(cost.flops.values()):.2e}" if cost.flops else "?",
        SHARES: lambda _, cost: _shares(cost.flops),
        "memory": lambda _, cost: _si(cost.memory_bytes, "B"),
    }
    if any(run.config.train.peers for run in runs):
        columns["% mfr"] = lambda _, cost: _share(cost.flops, "mutual")
    if any(run.config.mesh.ranks > 1 for run in runs):
        columns["sent/step"] = lambda _, cost: _si(cost.sent_bytes if cost.params else None, "B")
    columns["checkpoint"] = lambda _, cost: _si(cost.checkpoint_bytes or None, "B")
    columns["time"] = lambda _, cost: "?" if cost.seconds is None else duration(cost.seconds)
    if any(len(job.runs) > 1 for job in jobs):
        columns["job"] = lambda run, _: str(job_number.get(run.run_dir, "-"))
    columns["state"] = lambda run, _: run.status
    return columns


def _si(value: float | None, unit: str = "") -> str:
    return "?" if value is None else f"{si(value)}{unit}"


def _shares(flops: dict[str, float]) -> str:
    total = sum(flops.values())
    return "/".join(f"{100 * flops[part] / total:.0f}" for part in (*PARTS, "optimizer")) if total else "?"


def _share(flops: dict[str, float], part: str) -> str:
    total = sum(flops.values())
    return f"{100 * flops.get(part, 0.0) / total:.0f}" if total else "?"


def _summary(runs: Sequence[Run], jobs: Sequence[Job], estimates: Estimates) -> list[str]:
    to_do = unfinished(runs)
    if not to_do:
        return ["nothing to do"]
    flops = sum(sum(estimates.of(run).flops.values()) for run in to_do)
    packs = [len(job.runs) for job in jobs if len(job.runs) > 1]
    lines = [f"to do: {flops:.2e} FLOPs in {_count(len(jobs), 'job')}{_packing(packs)}{_time(jobs, estimates)}"]
    calibration = estimates.calibration
    if calibration.source:
        took = f" in {calibration.seconds:.1f} s" if calibration.seconds else ""
        lines.append(f"times: {calibration.source}{took}; harvesting not included")
    if calibration.problem:
        lines.append(f"times: {calibration.problem}")
    needed = disk(runs, jobs, estimates)
    lines.append(f"disk: {_disk(needed)}")
    if host := max(estimates.of(run).host_bytes for run in to_do):
        lines.append(f"memory of the node: more than {si(host)}B per rank, beside what CUDA and mapped rows take")
    lines += window_lines(jobs, estimates)
    lines += outlier_lines(to_do)
    lines += longer_than_the_limit(jobs, estimates)
    lines += [f"would not fit: {line}" for line in would_not_fit(jobs, estimates, needed)]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _packing(packs: Sequence[int]) -> str:
    if not packs:
        return ""
    cells = str(packs[0]) if min(packs) == max(packs) else f"{min(packs)} to {max(packs)}"
    return f" ({_count(len(packs), 'pack')} of {cells} cells)"


def _time(jobs: Sequence[Job], estimates: Estimates) -> str:
    """Device-hours, and the time from start to end."""
    timed = [(job, seconds) for job in jobs if (seconds := estimates.job_seconds(job)) is not None]
    if not timed:
        return ""
    hours = sum(seconds * job.config.mesh.ranks for job, seconds in timed) / 3600
    total, longest = sum(seconds for _, seconds in timed), max(seconds for _, seconds in timed)
    cluster = jobs[0].config.cluster
    if cluster.name == "local":
        words = f"{duration(total)} one after the other"
    elif cluster.max_running:
        words = f"at least {duration(max(longest, total / cluster.max_running))} with {cluster.max_running} at a time"
    else:
        words = f"the longest takes {duration(longest)}"
    unknown = f"; {_count(len(jobs) - len(timed), 'job')} of unknown length" if len(timed) < len(jobs) else ""
    return f": {si(hours)} device-hours, {words}{unknown}"


def _disk(needed: Disk) -> str:
    there = f" ({si(needed.stores_there)}B exist already)" if needed.stores_there else ""
    windows = f", at most {si(needed.windows)}B of windows at a time" if needed.windows else ""
    return (
        f"{si(needed.stores)}B of activations to harvest{there}{windows}, "
        f"{si(needed.results)}B of weights and records, at most {si(needed.checkpoints)}B of checkpoints at a time"
    )
