"""A real Slurm on one machine: munged, slurmctld and two slurmd (n1, n2), everything in one scratch directory.

    with running(tmp_path) as cluster:
        job = cluster.sbatch("--wrap", "srun hostname")
        cluster.wait(job, {"COMPLETED"})

`python -m dev.slurm.cluster up DIR` leaves one running for people, `down DIR` ends it. Neither systemd, cgroups nor
root are needed; only the packages slurm-wlm and munge. Knows nothing of the project.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dev.slurm import processes
from dev.slurm.settings import NODES, Settings, slurm_conf
from harness.terminal import Parser

T = TypeVar("T")

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")

COMMAND_TIMEOUT_S = 30.0
START_TIMEOUT_S = 40.0
FINISHED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})


class SlurmError(RuntimeError):
    """A Slurm command failed or a state was not reached; the text has what Slurm said."""

    def __init__(self, message: str, returncode: int = 1) -> None:
        super().__init__(message)
        self.returncode = returncode


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=path) is None]
    return f"no {', '.join(absent)} on this machine: apt-get install slurm-wlm munge" if absent else None


class Cluster:
    """A running cluster. Partitions: low (the default one, preempted by requeueing), high (preempts low),
    short (at most 5 minutes), closed (only for the account `staff`)."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory.resolve()
        self.settings = settings
        self.conf = self.directory / "slurm.conf"
        self._children: list[subprocess.Popen[bytes]] = []

    def env(self) -> dict[str, str]:
        """This process's environment, pointing Slurm's commands at this cluster and free of an enclosing job."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_"))}
        return inherited | {"SLURM_CONF": str(self.conf)}

    def command(self, *argv: str, timeout_s: float = COMMAND_TIMEOUT_S, cwd: Path | None = None) -> str:
        """Run a Slurm command, return its stdout. Raises `SlurmError` with its stderr when it fails or hangs."""
        try:
            done = subprocess.run(
                argv,
                env=self.env(),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{' '.join(argv)}: no answer after {timeout_s:g} s") from None
        if done.returncode:
            raise SlurmError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}", done.returncode)
        return done.stdout

    def sbatch(self, *args: str, cwd: Path | None = None) -> str:
        """Submit, return the job's id. Output goes to the cluster's directory unless `args` say otherwise."""
        output = ("--output", str(self.directory / "out-%A_%a.log"))
        return self.command("sbatch", "--parsable", *output, *args, cwd=cwd).strip()

    def squeue(self, *args: str) -> str:
        return self.command("squeue", "--noheader", *args)

    def scontrol(self, *args: str) -> str:
        return self.command("scontrol", *args)

    def scancel(self, *args: str) -> str:
        return self.command("scancel", *args)

    def jobs(self, job_id: str) -> list[dict[str, str]]:
        """What the controller knows of a job, one dict per array element; pending elements may share one."""
        text = self.scontrol("show", "job", "--oneliner", job_id)
        return [dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w:/]+=|\s*$)", line)) for line in text.splitlines() if line]

    def states(self, job_id: str) -> list[str]:
        return [job["JobState"] for job in self.jobs(job_id)]

    def wait(self, job_id: str, states: Collection[str] = FINISHED, timeout_s: float = 60.0) -> list[str]:
        """Wait until the job (every element of an array) is in one of `states`; return them."""

        def settled() -> list[str]:
            found = self.states(job_id)
            return found if set(found) <= set(states) else []

        return wait_for(
            settled,
            timeout_s,
            lambda: f"job {job_id} is {self.states(job_id)}, not {'/'.join(sorted(states))}\n{self.squeue()}",
        )

    def start_now(self, job_id: str) -> None:
        """Let a job that is being requeued start without the delay; without effect on one that runs already."""
        wait_for(
            lambda: "COMPLETING" not in self.states(job_id),
            self.settings.kill_wait_s + 60.0,
            lambda: f"job {job_id} does not end: {self.jobs(job_id)}",
        )
        for job in self.jobs(job_id):
            if job["JobState"] == "PENDING":
                self.scontrol("update", f"JobId={job['JobId']}", "StartTime=now")

    def restarts(self, job_id: str) -> int:
        """How often Slurm has requeued the job, summed over an array's elements."""
        return sum(int(job["Restarts"]) for job in self.jobs(job_id))

    def ranks(self, job_id: str) -> dict[int, int]:
        """Rank → process id of the running `srun` step of a job (`17`, or `17_3` for an element of an array)."""
        return processes.ranks(self.conf, job_id)

    def preempt(self, nodes: Sequence[str] = NODES, cpus: int | None = None, seconds: float = 1.0) -> str:
        """Submit a job of higher priority that needs `cpus` CPUs (default: all) of each of `nodes`; return its id.

        It starts as soon as what it displaces has ended, at the latest after the grace time, and lasts `seconds`.
        """
        return self.sbatch(
            *("--partition", "high", "--nodelist", ",".join(nodes), "--nodes", str(len(nodes)), "--mem", "0"),
            *("--ntasks-per-node", "1", "--cpus-per-task", str(cpus or self.settings.cpus), "--no-requeue"),
            *("--job-name", "preemptor", "--wrap", f"sleep {seconds}"),
        )

    def node_down(self, name: str, lost: bool = False) -> None:
        """Mark a node down, as an administrator does; its jobs are requeued.

        `lost`: end its slurmd and everything it runs with SIGKILL before, as a power cut does.
        """
        if lost:
            processes.end(self.directory, name, wait_s=-1.0)
        self.scontrol("update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def node_up(self, name: str) -> None:
        """Take a node back into service, starting its slurmd again if it is gone; returns when it accepts jobs."""
        if not processes.members(self.directory, name):
            self._start_slurmd(name)
        if "DOWN" in self.node_state(name):
            self.scontrol("update", f"NodeName={name}", "State=RESUME")
        self._wait_nodes((name,))

    def node_state(self, name: str) -> str:
        """For example `IDLE`, `MIXED`, `DOWN+NOT_RESPONDING`."""
        found = re.search(r"State=(\S+)", self.scontrol("show", "node", name))
        assert found is not None
        return found[1]

    def restart_controller(self, down_s: float = 0.0) -> None:
        """End slurmctld, wait `down_s`, start it again with the state it saved; returns when nodes accept jobs."""
        self.stop_controller()
        time.sleep(down_s)
        self.start_controller()

    def stop_controller(self) -> None:
        """End slurmctld only: jobs run on, every Slurm command fails after 9 s."""
        processes.end(self.directory, "slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld again with the state it saved; returns when the nodes that are not down accept jobs."""
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self._wait_controller()
        self._wait_nodes(
            [name for name in NODES if processes.members(self.directory, name) and "DOWN" not in self.node_state(name)]
        )

    def reset(self) -> None:
        """Cancel every job, bring every node back; for tests that share a cluster."""
        self.scancel("--user", str(os.getuid()))
        self.wait_for_empty_queue()
        for name in NODES:
            self.node_up(name)

    def wait_for_empty_queue(self) -> None:
        """Wait until every job has ended; a cancelled one that ran is COMPLETING for a while."""
        wait_for(
            lambda: not self.squeue(),
            self.settings.kill_wait_s + 30.0,
            lambda: f"jobs outlive their cancellation:\n{self.squeue()}",
        )

    def start(self) -> None:
        """Write the configuration and start the daemons; returns when both nodes accept jobs."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("state", "log", *NODES):
            (self.directory / name).mkdir(exist_ok=True)
        key = self.directory / "munge.key"
        key.unlink(missing_ok=True)
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.conf.write_text(slurm_conf(self.directory, self.settings))

        # --force: munged dislikes a socket in a directory that others cannot enter
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        paths = (f"--{option}={self.directory / name}" for option, name in files.items())
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *paths)
        wait_for(lambda: (self.directory / "munge.sock").exists(), START_TIMEOUT_S, lambda: self._log_tail("munged"))
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for name in NODES:
            self._start_slurmd(name)
        self._wait_controller()
        self._wait_nodes(NODES)

    def stop(self) -> None:
        """End every daemon and everything that runs under it. Safe to call twice, and on what is half started."""
        # first the controller, which would start other jobs in the place of those that end
        for role in ("slurmctld", *NODES, None):
            processes.end(self.directory, role)
        while self._children:
            self._children.pop().wait()

    def _start_slurmd(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.conf))

    def _start(self, role: str, *argv: str) -> None:
        environment = self.env() | processes.mark(self.directory, role)
        environment["PATH"] = f"{environment.get('PATH', '')}:/usr/sbin:/sbin"
        binary = shutil.which(argv[0], path=environment["PATH"])
        if binary is None:
            raise SlurmError(missing() or argv[0])
        with (self.directory / "log" / f"{role}.out").open("ab") as out:
            # a session of its own: Ctrl-C is for the tests, which then stop the cluster
            child = subprocess.Popen(
                [binary, *argv[1:]],
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)

    def _wait_controller(self) -> None:
        wait_for(
            lambda: "is UP" in self._try("scontrol", "ping"),
            START_TIMEOUT_S,
            lambda: self._log_tail("slurmctld"),
        )

    def _wait_nodes(self, names: Sequence[str]) -> None:
        def ready() -> bool:
            text = self._try(
                "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t", f"--nodes={','.join(names)}"
            )
            good = [line for line in text.splitlines() if line.split()[-1] in ("idle", "mix", "alloc")]
            return len(good) == len(names)

        wait_for(ready, START_TIMEOUT_S, lambda: "\n".join(map(self._log_tail, names)))

    def _try(self, *argv: str) -> str:
        """The output of a command that may fail while a daemon starts."""
        try:
            return self.command(*argv)
        except SlurmError:
            return ""

    def _log_tail(self, role: str) -> str:
        lines = (self.directory / "log" / f"{role}.out").read_text(errors="replace").splitlines()
        return f"{role} is not ready; the end of its log:\n" + "\n".join(lines[-15:])


@contextmanager
def running(directory: Path, settings: Settings | None = None) -> Iterator[Cluster]:
    """A cluster for the duration of the block, ended for certain: also when this process is killed."""
    if reason := missing():
        raise SlurmError(reason)
    cluster = Cluster(directory, settings or Settings())
    # its stdin closes with this process, whatever ends it
    guard = subprocess.Popen(
        [sys.executable, processes.__file__, str(cluster.directory)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        guard.communicate()


def wait_for(check: Callable[[], T], timeout_s: float, problem: Callable[[], str], poll_s: float = 0.1) -> T:
    """Poll until `check` gives something true; raise `SlurmError` with `problem()` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := check()):
        if time.monotonic() > end:
            raise SlurmError(f"{problem()}\n(after {timeout_s:g} s)")
        time.sleep(poll_s)
    return value


def main(argv: Sequence[str]) -> int:
    """`up DIR` and `down DIR`; the exit code."""
    parser = Parser(prog="python -m dev.slurm.cluster", description=__doc__)
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args(argv)
    cluster = Cluster(arguments.directory, Settings())
    if arguments.verb == "down":
        cluster.stop()
        return 0
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if not processes.members(cluster.directory):
        try:
            cluster.start()
        except BaseException:
            cluster.stop()
            raise
    print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
