"""What would not fit, and what `--dry-run` says."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.cost import speed
from harness.cost.estimate import Estimates, estimate
from harness.cost.jobs import make_jobs
from harness.cost.limits import disk, longer_than_the_limit, memory_limit, time_limit, would_not_fit
from harness.cost.table import plan_text
from harness.cost.windows import window_lines
from harness.record.job import job_of
from harness.record.run import Run
from harness.terminal import duration
from tests.cost.planned import a_config, a_run
from tests.tiny import Launch


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("5:30", 330), ("04:00:00", 14400), ("1-0", 86400), ("2-03:04:05", 183845), ("1-02:30", 95400),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_limit(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("64G", 64 * 2**30), ("512M", 2**29), ("4000", 4000 * 2**20), ("1T", 2**40)]
)
def test_memory_sizes_as_slurm_reads_them(text: str, size: int) -> None:
    assert memory_limit(text) == size


@pytest.fixture(autouse=True)
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_speed", lambda *_: speed.Speed(1e-3, 2e-3, 5e-4))
    monkeypatch.setattr(speed, "measure_start", lambda *_: 0.25)
    monkeypatch.setattr(speed, "measure_draw", lambda *_: 0.0)


def plan(runs: Sequence[Run]) -> tuple[list, Estimates]:
    return [job_of([run]) for run in runs], estimate(runs)


def problems(runs: Sequence[Run]) -> list[str]:
    jobs, known = plan(runs)
    return would_not_fit(jobs, known, disk(runs, jobs, known))


def test_memory_of_a_gpu(tmp_path: Path) -> None:
    gpu = {"name": "slurm", "gpu_type": "a100"}
    wide = a_config(sae__n_latents=1 << 20, sae__k=32, train__precision="bf16", train__device="auto", cluster=gpu)
    line, *_ = problems([a_run(tmp_path, wide, "wide", d_model=4096)])  # its disk may be too small as well
    assert line.startswith("memory: wide needs 1") and "a100 has 40GB" in line
    assert "mesh.shard=8 would suffice" in line
    narrow = a_config(sae__n_latents=1 << 14, sae__k=32, train__precision="bf16", train__device="auto", cluster=gpu)
    assert problems([a_run(tmp_path, narrow, d_model=4096)]) == []


def test_memory_of_a_node(tmp_path: Path) -> None:
    cluster = {"name": "slurm", "gpus_per_task": 0, "mem": "1G"}
    assert problems([a_run(tmp_path, a_config(cluster=cluster))]) == []
    (line,) = problems([a_run(tmp_path, a_config(cluster=cluster, mesh={"dp": 4}))])
    assert "its share of cluster.mem=1G" in line


def test_memory_of_the_node_of_a_gpu(tmp_path: Path) -> None:
    """A checkpoint of a large SAE is put together on the host, a matrix at a time."""
    gpu = {"name": "slurm", "gpu_type": "h200", "mem": "16G"}
    large = {"sae__n_latents": 1 << 21, "sae__k": 32, "train__precision": "bf16", "train__device": "auto"}
    line, *_ = problems([a_run(tmp_path, a_config(cluster=gpu, **large), "large", d_model=768)])
    assert line.startswith("memory of the node: large needs more than 19.8GB per rank") and "cluster.mem=16G" in line
    gpu["mem"] = "24G"
    assert not any(
        line.startswith("memory of")
        for line in problems([a_run(tmp_path, a_config(cluster=gpu, **large), d_model=768)])
    )
    both = a_config(cluster=gpu, mesh={"shard": 2}, **large)
    assert not any(line.startswith("memory of") for line in problems([a_run(tmp_path, both, d_model=768)])), (
        "half a matrix each"
    )


def test_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**8))
    (line,) = problems([a_run(tmp_path, a_config())])
    assert "this machine has 100MB" in line


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(
        activations__kind="lm", activations__model="m", activations__tokens=1e6, activations__dtype="bf16"
    )
    run = a_run(tmp_path, config, d_model=512)
    jobs, known = plan([run])
    needed = disk([run], jobs, known)
    assert needed.stores == pytest.approx((1e6 + 1500) * (1024 + 8)) and needed.stores_there == 0
    assert needed.checkpoints == 2 * known.of(run).checkpoint_bytes
    place = Path(config.out) / "_activations" / run.store.id
    monkeypatch.chdir(tmp_path)
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    there = disk([run], jobs, known)
    assert there.stores == 0 and there.stores_there == needed.stores
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    (line,) = would_not_fit(jobs, known, needed)
    assert line.startswith("disk: 2.1") and "1MB are free" in line and "out=" in line


def test_several_jobs_at_a_time_hold_several_checkpoints(tmp_path: Path) -> None:
    cluster = {"name": "slurm", "gpus_per_task": 0}
    runs = [a_run(tmp_path, a_config(cluster=cluster | {"max_running": 2}), str(i)) for i in range(3)]
    jobs, known = plan(runs)
    assert disk(runs, jobs, known).checkpoints == 4 * known.of(runs[0]).checkpoint_bytes
    runs = [a_run(tmp_path, a_config(cluster=cluster), str(i)) for i in range(3)]
    assert disk(runs, *plan(runs)).checkpoints == 6 * known.of(runs[0]).checkpoint_bytes


def test_a_cell_longer_than_the_time_limit_goes_on_in_the_next(tmp_path: Path) -> None:
    cluster = {"name": "slurm", "gpu_type": "h200", "time": "01:00:00"}
    long = a_config(sae__n_latents=1 << 15, train__batch_tokens=1024, train__tokens=1e10, cluster=cluster)
    run = a_run(tmp_path, long, "long", d_model=768)
    jobs, known = plan([run])
    (line,) = longer_than_the_limit(jobs, known)
    allocations = -(-(known.seconds_of(run) or 0) // 3600)
    assert f"long in {allocations:.0f} (" in line and "cluster.time=01:00:00" in line
    assert longer_than_the_limit(*plan([a_run(tmp_path, a_config(cluster=cluster))])) == []


def test_the_plan_as_text(tmp_path: Path) -> None:
    cluster = {"name": "slurm", "gpu_type": "h200", "max_running": 2}
    runs = [a_run(tmp_path, a_config(cluster=cluster, mesh={"shard": 2}), str(i)) for i in range(4)]
    known = estimate(runs)
    text = plan_text(runs, [job_of(runs[:3]), job_of(runs[3:])], known)
    assert "4 cells: 4 pending" in text
    assert "in 2 jobs (1 pack of 3 cells)" in text and "device-hours" in text and "with 2 at a time" in text
    assert "data sheet of h200, unmeasured" in text
    assert "sent/step" in text and "checkpoints at a time" in text
    assert [line.split()[-2] for line in text.splitlines()[1:5]] == ["1", "1", "1", "2"]
    done = [a_run(tmp_path, a_config(), status="done")]
    assert plan_text(done, [], estimate(done)).endswith("1 cells: 1 done\nnothing to do")


def test_ten_thousand_cells_are_cut_to_a_page(tmp_path: Path) -> None:
    cluster = {"name": "slurm", "gpu_type": "h200"}
    config = a_config(cluster=cluster)
    runs = [a_run(tmp_path, config, str(i)) for i in range(1000)]
    lines = plan_text(runs, [job_of([run]) for run in runs], estimate(runs)).splitlines()
    assert len(lines) < 210 and any(line == "… and 800 more" for line in lines)


def test_a_dry_run_shows_time_and_disk(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("sae.n_latents=32,64", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "to do:" in shown and "within a factor of" in shown and "one after the other" in shown and "disk:" in shown


def test_windows_in_the_plan(tmp_path: Path) -> None:
    """GPT-2 small up to block 8: two windows on the disk of a job, and the FLOPs of the language model."""
    window = {
        "activations__kind": "lm",
        "activations__model": "m",
        "activations__tokens": 1e9,
        "activations__dtype": "bf16",
        "activations__layer": 8,
        "activations__keep": "window",
        "activations__window_tokens": 1e6,
        "train__tokens": 1e9,
    }
    cluster = {"name": "slurm", "gpu_type": "h200", "pack": 1}
    on_gpu = a_config(cluster=cluster, train__device="auto", **window)
    runs = [a_run(tmp_path, on_gpu, str(i), d_model=768) for i in range(2)]
    jobs, known = plan(runs)
    needed = disk(runs, jobs, known)
    assert needed.windows == 2 * 2 * 1e6 * 1536
    assert needed.stores == pytest.approx((131072 + 1500) * (1536 + 8))
    flops = 9 * (24 * 768**2 + 4 * 64 * 768) * 1e9
    (line,) = window_lines(jobs, known)
    assert f"{flops:.1e} FLOPs" in line and "two of them 3.07GB" in line
    assert f"{duration(flops / 0.5 / 989e12)} to {duration(flops / 0.1 / 989e12)}" in line
    assert line in plan_text(runs, jobs, known)
    local = a_config(**window)
    (line,) = window_lines(*plan([a_run(tmp_path, local, d_model=768)]))
    assert "known once it has run" in line
    several = [a_run(tmp_path, a_config(**window), str(i), d_model=768) for i in range(3)]
    # the language model computes a window once for all
    assert [len(job.runs) for job in make_jobs(several, lambda run: 1.0, lambda job: True)] == [3]
    assert window_lines(*plan([a_run(tmp_path, a_config())])) == []
