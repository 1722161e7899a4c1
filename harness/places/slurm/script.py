"""The text of a job script. People can read it: it stays in the sweep directory, exactly as submitted."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.config import ClusterConfig, MeshConfig
from harness.errors import UserError

IGNORE_EARLY = """bash -c 'trap "" USR1; exec "$@"' --"""
"""A signal would end the rank while Python loads; later its own handler takes over."""


def quoted(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def resources(cluster: ClusterConfig, ranks: int) -> list[str]:
    """The `#SBATCH` flags for a job of `ranks` ranks."""
    per_node = min(cluster.tasks_per_node or ranks, ranks)
    flags = [
        f"--nodes={math.ceil(ranks / per_node)}",
        f"--ntasks={ranks}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={cluster.cpus_per_task}",
    ]
    if cluster.gpus_per_task:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        flags.append(f"--gpus-per-node={kind}{per_node}")
    for name in ("mem", "partition", "account", "qos", "constraint"):
        if value := getattr(cluster, name):
            flags.append(f"--{name}={value}")
    return flags


def python_of(cluster: ClusterConfig) -> str:
    """The Python of the jobs, as the shell reads it."""
    return quoted([*cluster.container, cluster.python or sys.executable])


def srun_of(cluster: ClusterConfig) -> list[str]:
    """`srun` and its flags."""
    return [
        "srun",
        "--kill-on-bad-exit=1",
        *([f"--gpu-bind={cluster.gpu_bind}"] if cluster.gpu_bind and cluster.gpus_per_task else []),
        *cluster.srun_flags,
    ]


def header(
    directory: Path, cluster: ClusterConfig, ranks: int, count: int, lead_s: int, limit: str, about: str
) -> list[str]:
    """The first lines of every script: flags for Slurm, where to be, what to ignore. `about` is a line for people.

    Raises `UserError` for flags and paths that Slurm would not read as they are meant.
    """
    throttle = f"%{cluster.max_running}" if cluster.max_running else ""
    flags = [
        f"--job-name={directory.name}",
        f"--array=0-{count - 1}{throttle}",
        f"--output={str(directory).replace('%', '%%')}/log/%A_%a.out",
        "--open-mode=append",
        f"--time={limit}",
        *resources(cluster, ranks),
        f"--signal=USR1@{lead_s}",
        "--requeue" if cluster.requeue else "--no-requeue",
        *cluster.flags,
    ]
    for flag in flags:
        if not flag.isprintable():
            raise UserError(
                f"{flag!r} has a line break or another control character, and Slurm reads flags line by line"
            )
    if "\\" in str(directory):
        raise UserError(
            f"{directory} has a backslash, after which Slurm reads paths in another way; choose another out="
        )
    return [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(flag)}" for flag in flags),
        # a line break would make a command of what follows it
        "# " + "".join(character if character.isprintable() else "?" for character in about),
        "",
        # jobs start in the directory of the command that submitted them
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        *cluster.setup,
        *_network(cluster),
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
        "trap : TERM USR1  # the last line runs however the ranks end",
        "",
    ]


def job_script(
    directory: Path, cluster: ClusterConfig, mesh: MeshConfig, count: int, lead_s: int, *, harvest: bool, about: str
) -> str:
    """The script of an array of `count` jobs whose tables lie in `directory`. Raises `UserError` as `header` does."""
    python = python_of(cluster)
    here = shlex.quote(str(directory))
    limit = cluster.harvest_time if harvest else cluster.time
    srun = srun_of(cluster)
    work = "harness.harvest" if harvest else "harness.train"
    lines = [
        *header(directory, cluster, mesh.ranks, count, lead_s, limit, about),
        "# freeze this element's runs; sets JOB (empty when nothing is left to do), STORE, where the ranks meet",
        f'settings=$({python} -m harness.places.slurm begin {here} "$SLURM_ARRAY_TASK_ID") || exit',
        'eval "$settings"',
        '[ -n "$JOB" ] || exit 0',
        "",
        *_staging(cluster, python, srun, harvest),
        f"{quoted(srun)} {IGNORE_EARLY} \\",
        f'    {python} -m {work} --saved-is-success "${{STAGED[@]}}" "$JOB"',
        "",
        "# done, or requeue this element alone, or give up after three failures at one step",
        f'exec {python} -m harness.places.slurm end {here} "$SLURM_ARRAY_TASK_ID" $?',
    ]
    return "\n".join(lines) + "\n"


def rehearsal_script(
    directory: Path, cluster: ClusterConfig, mesh: MeshConfig, count: int, stop_after: int, *, about: str
) -> str:
    """The script of one job that trains the `count` jobs whose tables lie in `directory` one after the other, each in
    two starts: the first stops after `stop_after` steps. Job i leaves its output in `directory/log/i.txt` and its exit
    code in `directory/exit-i`. Raises `UserError` as `header` does."""
    python, here = python_of(cluster), shlex.quote(str(directory))
    train = f"{quoted(srun_of(cluster))} {IGNORE_EARLY} {python} -m harness.train --saved-is-success"
    lines = [
        *header(directory, cluster, mesh.ranks, 1, 1, cluster.time, about),
        f"for ((i = 0; i < {count}; i++)); do",
        "    {",
        f'        settings=$({python} -m harness.places.slurm begin {here} "$i") && eval "$settings" &&',
        f'        {train} --stop-after {stop_after} "$JOB" &&',
        f'        {train} "$JOB"',
        f"    }} > {here}/log/$i.txt 2>&1",
        f"    echo $? > {here}/exit-$i",
        "done",
    ]
    return "\n".join(lines) + "\n"


def decision_script(directory: Path, cluster: ClusterConfig, command: Sequence[str], *, about: str) -> str:
    """The script of a job of one process that runs `python -m COMMAND`. Raises `UserError` as `header` does."""
    lines = [
        *header(directory, cluster, 1, 1, 1, cluster.harvest_time, about),
        f"exec {python_of(cluster)} -m {quoted(command)}",
    ]
    return "\n".join(lines) + "\n"


def _network(cluster: ClusterConfig) -> list[str]:
    name = shlex.quote(cluster.network_interface)
    return [f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}"] if cluster.network_interface else []


def _staging(cluster: ClusterConfig, python: str, srun: list[str], harvest: bool) -> list[str]:
    if not cluster.stage_dir or harvest:
        return ["STAGED=()"]
    # in double quotes: the directory may name a variable of the job
    directory = re.sub(r"^~(?=/|$)", "$HOME", cluster.stage_dir)
    target = '"' + directory.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`") + '"'
    once = quoted([*srun[:1], "--ntasks-per-node=1"])
    return [
        "# one copy of the store per node; without room for it the shared one is read",
        f"STAGED=(--store-dir {target})",
        f'{once} --ntasks="$SLURM_NNODES" {python} -m harness.activations.store.stage "$STORE" {target}',
    ]
