"""Evaluations on Slurm: an array with one run per element.

The same command again submits only runs that miss a result and have no such job. An element that its time limit or a
preemption stops keeps the metrics that are complete, and is requeued for the others.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from harness.config import ClusterConfig
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.places.slurm import client
from harness.places.slurm.queue import arrays_root
from harness.places.slurm.script import IGNORE_EARLY, header, python_of, quoted, srun_of
from harness.places.slurm.submit import array_directory, lead_s, submit_script
from harness.process.claim import claim
from harness.record.provenance import command_line
from harness.schema import FILE_NAME, TEXT, fields, list_of, read_json
from harness.terminal import say

TABLE = "evaluations.json"
_TABLE = fields({"runs": list_of(FILE_NAME), "options": list_of(TEXT)})


def submit_evaluations(runs: Sequence[Path], options: Sequence[str], cluster: ClusterConfig) -> int:
    """Submit an array per sweep for runs that have no job with the same options yet; say what was done.

    `options`: those of `harness.evaluate`. Returns the number of elements. Raises `UserError` when Slurm refuses.
    """
    submitted = 0
    try:
        for sweep_dir in dict.fromkeys(run.parent for run in runs):
            arrays_root(sweep_dir).mkdir(exist_ok=True)
            with claim(arrays_root(sweep_dir) / "submit.lock", wait=True):
                own = [run.name for run in runs if run.parent == sweep_dir]
                queued = _queued(sweep_dir, options)
                todo = [run for run in own if run not in queued]
                say(f"{sweep_dir}: {len(own)} runs to evaluate, {len(own) - len(todo)} have a job already")
                size = client.max_array_size()
                for start in range(0, len(todo), size):
                    submitted += _submit(sweep_dir, todo[start : start + size], options, cluster)
    except client.SlurmError as refused:
        raise UserError(f"Slurm refused: {refused}; what a job asks for is set by cluster.*=…") from refused
    return submitted


def _queued(sweep_dir: Path, options: Sequence[str]) -> set[str]:
    """Runs that a queued or running element evaluates with these options."""
    tables = {path.parent.name: path for path in arrays_root(sweep_dir).glob(f"*/{TABLE}")}
    found = set()
    for element in client.elements(list(tables)):
        advice = f"cancel its jobs with scancel and remove {tables[element.name].parent}"
        table = read_json(tables[element.name], _TABLE, advice)
        if table["options"] == list(options) and element.index < len(table["runs"]):
            found.add(table["runs"][element.index])
    return found


def _submit(sweep_dir: Path, runs: Sequence[str], options: Sequence[str], cluster: ClusterConfig) -> int:
    if not runs:
        return 0
    directory = array_directory(sweep_dir, "evaluate")
    write_json_atomic(directory / TABLE, {"runs": list(runs), "options": list(options)})
    # they train nothing, and are cancelled with the sweep
    write_json_atomic(directory / "runs.json", [[] for _ in runs])
    about = f"{len(runs)} runs of {sweep_dir} are evaluated; {command_line()}"
    job_id = submit_script(
        directory, len(runs), lambda: _script(directory.resolve(), sweep_dir, runs, options, cluster, about)
    )
    say(f"job {job_id}: {len(runs)} evaluations ({directory / 'job.sh'})")
    return len(runs)


def _script(
    directory: Path, sweep_dir: Path, runs: Sequence[str], options: Sequence[str], cluster: ClusterConfig, about: str
) -> str:
    python = python_of(cluster)
    places = [str(sweep_dir.resolve() / run) for run in runs]
    lines = [
        *header(directory, cluster, 1, len(runs), lead_s(cluster, 0), cluster.time, about),
        f"RUNS=({quoted(places)})",
        f"{quoted(srun_of(cluster))} {IGNORE_EARLY} \\",
        f'    {python} -m harness.evaluate "${{RUNS[$SLURM_ARRAY_TASK_ID]}}" {quoted(list(options))}',
        "",
        "# done, or requeue this element alone if it was stopped",
        f'exec {python} -m harness.places.slurm evaluated {shlex.quote(str(directory))} "$SLURM_ARRAY_TASK_ID" $?',
    ]
    return "\n".join(lines) + "\n"
