"""What a scratch cluster is made of: its nodes, its partitions, what a test may set."""

from __future__ import annotations

import os
import pwd
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")


@dataclass(frozen=True)
class Settings:
    """What a test may want different from the default cluster."""

    cpus: int = 4
    """Declared CPUs per node; the machine may have fewer."""
    memory_mb: int = 16000
    """Declared memory per node: a job that asks for more is refused when it is submitted."""
    max_array_size: int = 1001
    """Slurm's MaxArraySize: indices run from 0 to one less."""
    requeue_delay_s: int = 10
    """Lifetime of a job credential (Slurm's default is 120 s). A requeued job starts one second later than that."""
    grace_s: int = 20
    """GraceTime of the partition low: from the signal of a preemption to the end."""
    kill_wait_s: int = 5
    """From SIGTERM to SIGKILL."""


def slurm_conf(directory: Path, settings: Settings) -> str:
    """The text of slurm.conf for a cluster that keeps everything in `directory`, on ports that are free now."""
    host, user = socket.gethostname(), pwd.getpwuid(os.getuid()).pw_name
    control, *slurmd = _free_ports(1 + len(NODES))
    memory_per_cpu = settings.memory_mb // settings.cpus
    size = f"CPUs={settings.cpus} RealMemory={settings.memory_mb} Feature=scratch"
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size}"
        for name, port in zip(NODES, slurmd, strict=True)
    )
    all_nodes = f"Nodes={','.join(NODES)} DefMemPerCPU={memory_per_cpu}"
    return f"""\
ClusterName=scratch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job must wait
AuthInfo=socket={directory}/munge.sock,cred_expire={settings.requeue_delay_s}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/jobcomp.txt

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
# a node may declare more than the machine has
SlurmdParameters=config_overrides
# a node that was set down stays down, one that was lost comes back when its slurmd does
ReturnToService=1

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
EnforcePartLimits=ALL
MaxArraySize={settings.max_array_size}
MaxJobCount=20000
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait={settings.kill_wait_s}
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmctldTimeout=60
SlurmdTimeout=60

{nodes}
PartitionName=low {all_nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace_s}
PartitionName=high {all_nodes} PriorityTier=10 PreemptMode=OFF
PartitionName=short {all_nodes} PriorityTier=1 PreemptMode=OFF MaxTime=5
PartitionName=closed {all_nodes} PriorityTier=1 PreemptMode=OFF AllowAccounts=staff
"""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
