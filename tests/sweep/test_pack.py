"""Which runs share a job, and that a pack stays what it was frozen as."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from harness.config import StreamConfig
from harness.cost.jobs import make_jobs
from harness.errors import UserError
from harness.record import metrics
from harness.record.job import Job, freeze_job, job_of, read_job
from harness.record.run import Run
from tests.cost.planned import a_config, a_run
from tests.tiny import Launch
from tests.training.ranks import same_weights

SLURM = {"name": "slurm"}


def grid(out: Path, cluster: dict, count: int = 5) -> list[Run]:
    return [a_run(out, a_config(cluster, train__seed=seed), name=f"r{seed}") for seed in range(count)]


def sizes(runs: list[Run], seconds: float | None = 60.0, most_in_memory: int = 99) -> list[int]:
    def fits(job: Job) -> bool:
        return len(job.runs) <= most_in_memory

    return [len(job.runs) for job in make_jobs(runs, lambda run: seconds, fits)]


def test_the_plan_packs_on_a_cluster_up_to_a_time(tmp_path: Path) -> None:
    assert sizes(grid(tmp_path, {})) == [1] * 5
    assert sizes(grid(tmp_path, SLURM)) == [5]
    assert sizes(grid(tmp_path, SLURM), seconds=1500) == [2, 2, 1]
    assert sizes(grid(tmp_path, SLURM), seconds=7200) == [1] * 5
    assert sizes(grid(tmp_path, SLURM), seconds=None) == [1] * 5
    assert sizes(grid(tmp_path, SLURM, 40)) == [16, 16, 8]
    assert sizes(grid(tmp_path, SLURM), most_in_memory=3) == [3, 2]


def test_by_hand_packing_is_forced_or_forbidden(tmp_path: Path) -> None:
    assert sizes(grid(tmp_path, {"pack": 3})) == [3, 2]
    assert sizes(grid(tmp_path, SLURM | {"pack": 4}), seconds=None, most_in_memory=1) == [4, 1]
    assert sizes(grid(tmp_path, SLURM | {"pack": 1})) == [1] * 5


def test_only_runs_that_see_the_same_batches_share_a_job(tmp_path: Path) -> None:
    runs = grid(tmp_path, SLURM, 2)
    other = dataclasses.replace(a_config(SLURM), stream=StreamConfig(seed=1))
    runs += [a_run(tmp_path, other, name="other stream")]
    runs += [a_run(tmp_path, a_config(SLURM, train__batch_tokens=128), name="other batch")]
    runs += [a_run(tmp_path, a_config(SLURM, mesh={"shard": 2}), name="other mesh")]
    assert sizes(runs) == [2, 1, 1, 1]


def test_a_run_that_has_saved_alone_stays_alone(tmp_path: Path) -> None:
    runs = grid(tmp_path, SLURM, 3)
    (runs[1].run_dir / "checkpoints" / "step-0000000004").mkdir(parents=True)
    assert [[run.run_id for run in job.runs] for job in make_jobs(runs, lambda run: 1.0, lambda job: True)] == [
        ["r0", "r2"],
        ["r1"],
    ]


def test_a_pack_that_has_saved_stays_this_pack(tmp_path: Path) -> None:
    runs = grid(tmp_path, SLURM, 4)
    first = job_of(runs[:2])
    freeze_job(first)
    assert sizes(runs) == [4], "nothing is saved yet: it may still be packed otherwise"
    (first.home / "checkpoints" / "step-0000000004").mkdir(parents=True)
    jobs = make_jobs(runs[1:], lambda run: 1.0, lambda job: True)
    assert {job.home for job in jobs} == {first.home, job_of(runs[2:]).home}
    # the other member was not asked for, and goes on with it
    kept = next(job for job in jobs if job.home == first.home)
    assert set(freeze_job(kept).run_dirs) == {runs[0].run_dir, runs[1].run_dir}
    # packs forbidden: its runs begin anew, alone, and are no part of it any more once they have saved
    alone = grid(tmp_path, SLURM | {"pack": 1}, 2)
    assert sizes(alone) == [1, 1]
    (runs[1].run_dir / "checkpoints" / "step-0000000001").mkdir(parents=True)
    assert read_job(first.home).run_dirs == (runs[0].run_dir,)


def peers(out: Path, cluster: dict, lr: float = 1e-3) -> list[Run]:
    common = {"train__mfr_weight": 1.0, "train__mfr_seeds": [0, 1, 2], "train__lr": lr}
    return [a_run(out, a_config(cluster, **common, train__seed=seed), name=f"p{lr}-{seed}") for seed in (2, 0, 1)]


def test_peers_are_never_apart(tmp_path: Path) -> None:
    for cluster in ({}, SLURM | {"pack": 1}, {"pack": 2}):
        assert sizes(peers(tmp_path, cluster) + peers(tmp_path, cluster, 1e-2)) == [3, 3]
    assert sizes(peers(tmp_path, SLURM), seconds=7200, most_in_memory=1) == [3]
    assert sizes(peers(tmp_path, SLURM) + grid(tmp_path, SLURM, 2) + peers(tmp_path, SLURM, 1e-2)) == [8]
    assert sizes(peers(tmp_path, {"pack": 4}) + grid(tmp_path, {"pack": 4}, 2)) == [4, 1]


def test_peers_that_have_saved_go_on_and_no_peer_begins_alone(tmp_path: Path) -> None:
    runs = peers(tmp_path, SLURM | {"pack": 1})
    with pytest.raises(UserError, match=r"train.seed=0.* is not to be trained with it; launch train.seed=0,1,2"):
        sizes([run for run in runs if run.config.train.seed])
    job = job_of(runs)
    freeze_job(job)
    (job.home / "checkpoints" / "step-0000000004").mkdir(parents=True)
    # two have ended, and the third has only its result to write
    assert [job.home for job in make_jobs(runs[:1], lambda run: 1.0, lambda job: True)] == [job.home]


def test_a_launch_asks_for_all_peers(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("train.mfr_weight=0,1", "train.mfr_seeds=[1,0]", "train.eval_points=0")
    assert launch(*settings, "train.seed=0") == 2
    assert "learns from its peers of train.mfr_seeds=[0, 1]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert launch(*settings, "train.seed=0,1") == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("t/*/result.json")]
    assert sorted(result["trained_together"] for result in results) == [1, 1, 2, 2]
    assert {tuple(r["config"]["train"]["mfr_seeds"]) for r in results} == {(), (0, 1)}
    assert launch(*settings, "train.seed=0,1") == 0
    assert "all 4 cells already done" in capsys.readouterr().err


def test_a_damaged_pack_is_told(tmp_path: Path) -> None:
    job = job_of(grid(tmp_path, SLURM, 2))
    freeze_job(job)
    (job.home / "pack.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_job(job.home)


def test_packed_locally_by_hand(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("sae.n_latents=32,64", "train.seed=0,1")
    assert launch(*grid, "sweep=alone") == 0
    assert launch(*grid, "sweep=packed", "cluster.pack=3") == 0
    assert capsys.readouterr().err.count("fvu 0.") == 8
    (pack,) = (tmp_path / "packed" / "_packs").iterdir()
    assert len(json.loads((pack / "pack.json").read_text())["runs"]) == 3
    assert (pack / "attempts" / "1" / "log.txt").is_file() and not (pack / "checkpoints").exists()
    for alone in (path.parent for path in (tmp_path / "alone").glob("*/result.json")):
        packed = tmp_path / "packed" / alone.name
        assert same_weights(alone, packed)
        lines = [[line["step"] for line in metrics.read(path / "metrics.jsonl")] for path in (alone, packed)]
        assert lines[0] == lines[1]
    assert launch(*grid, "sweep=packed") == 0
    assert "all 4 cells already done" in capsys.readouterr().err
