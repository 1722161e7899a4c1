"""The job script for clusters that are not at hand: GPUs, several nodes, containers, staging."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from harness.config import ClusterConfig, MeshConfig
from harness.errors import UserError
from harness.places.slurm.script import job_script
from harness.places.slurm.submit import lead_s

GPUS = {
    "name": "slurm",
    "partition": "gpu",
    "account": "interp",
    "qos": "long",
    "constraint": "nvlink",
    "time": "1-12:00:00",
    "tasks_per_node": 4,
    "gpu_type": "a100",
    "gpu_bind": "closest",
    "mem": "200G",
    "max_running": 6,
    "setup": ["module load cuda/12.4", "export WANDB_MODE=offline"],
    "container": ["apptainer", "exec", "--nv", "our image.sif"],
    "python": "/opt/venv/bin/python",
    "flags": ["--exclude=n7"],
    "srun_flags": ["--mpi=none"],
    "network_interface": "ib0",
    "stage_dir": "$TMPDIR/stores",
}


def script(cluster: dict, shard: int = 8, harvest: bool = False) -> str:
    directory, mesh = Path("/shared/runs/s/_slurm/s-cells-0"), MeshConfig(dp=1, shard=shard)
    return job_script(directory, ClusterConfig(**cluster), mesh, 40, 90, harvest=harvest, about="for a test")


def test_a_job_of_eight_gpus_on_two_nodes() -> None:
    text = script(GPUS)
    flags = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert flags >= {
        *("--array=0-39%6", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=4"),
        *("--gpus-per-node=a100:4", "--mem=200G", "--partition=gpu", "--account=interp", "--qos=long"),
        *("--constraint=nvlink", "--time=1-12:00:00", "--signal=USR1@90", "--requeue", "--exclude=n7"),
    }
    assert "srun --kill-on-bad-exit=1 --gpu-bind=closest --mpi=none bash -c" in text
    assert "apptainer exec --nv 'our image.sif' /opt/venv/bin/python -m harness.train" in text
    assert "export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0" in text
    assert text.index("module load cuda/12.4") < text.index("harness.places.slurm begin")
    assert 'harness.activations.store.stage "$STORE" "$TMPDIR/stores"' in text


@pytest.mark.parametrize("harvest", [False, True])
@pytest.mark.parametrize("cluster", [GPUS, {"name": "slurm", "gpus_per_task": 0, "requeue": False}])
def test_bash_understands_it(cluster: dict, harvest: bool) -> None:
    text = script(cluster, harvest=harvest)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert ("--gpus" in text) == (cluster is GPUS)
    assert ("#SBATCH --no-requeue" in text) == (cluster is not GPUS)
    assert ("-m harness.harvest" in text) == harvest
    assert "activations.stage" not in text or not harvest


def test_the_signal_leaves_time_for_two_saves_but_not_the_whole_limit() -> None:
    assert lead_s(ClusterConfig(name="slurm", time="4:00:00"), 5e9) == 160
    assert lead_s(ClusterConfig(name="slurm", time="4:00:00", lead_s=300), 5e9) == 300
    assert lead_s(ClusterConfig(name="slurm", time="1"), 5e9) == 30


def test_a_line_break_in_the_comment_is_no_command(tmp_path: Path) -> None:
    cluster = ClusterConfig(name="slurm")
    text = job_script(tmp_path, cluster, MeshConfig(), 1, 90, harvest=False, about="x\ntouch planted\r\u2028y")
    assert "# x?touch planted??y\n" in text
    assert not [line for line in text.splitlines() if line.startswith("touch")]


@pytest.mark.parametrize("name", ["50%j", "%", "%%A", "it's", 'a "b"', "ü #1", "$HOME;&|", "(x)"])
def test_the_path_of_the_output_reaches_slurm_as_it_is(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name / "s-cells-0"
    text = job_script(directory, ClusterConfig(name="slurm"), MeshConfig(), 1, 90, harvest=False, about="for a test")
    (line,) = (line for line in text.splitlines() if "--output" in line)
    (flag,) = shlex.split(line.removeprefix("#SBATCH "))
    assert flag == f"--output={str(directory).replace('%', '%%')}/log/%A_%a.out"


@pytest.mark.parametrize(
    ("directory", "changes"),
    [
        ("/x/a\\b", {}),
        ("/x/a\nb", {}),
        ("/x/a\x1bb", {}),
        ("/x", {"flags": ["--exclude=n1\ntouch planted"]}),
        ("/x", {"partition": "a\rb"}),
        ("/x", {"account": "a\u2028b"}),
    ],
)
def test_what_slurm_would_read_in_another_way_is_refused(directory: str, changes: dict) -> None:
    with pytest.raises((UserError, ValueError)):  # the schema refuses some with a `ValueError`
        cluster = ClusterConfig(**{"name": "slurm", **changes})
        job_script(Path(directory), cluster, MeshConfig(), 1, 90, harvest=False, about="for a test")
