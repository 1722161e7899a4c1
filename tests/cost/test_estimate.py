"""Estimates: what they are made of, and that they come near what happens."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from harness import budget
from harness.activations.source import SAMPLE_ROWS
from harness.cost import calibrate, speed
from harness.cost import estimate as module
from harness.cost.calibrate import Timed, interpolate, probes
from harness.cost.estimate import estimate, rank_memory
from harness.cost.step_time import FLOOR_SHARE, step_seconds
from harness.ops.cpu.arrays import TILE_ELEMENTS
from harness.ops.reference import DENSE_ROWS_PER_K
from harness.process.gpus import find_gpu
from harness.record.job import job_of
from harness.record.run import Run, Store
from harness.record.rundir import read_config
from harness.record.sweepdir import read_plan
from harness.sweep.intent import record_intent
from tests.cost.planned import a_config, a_run
from tests.tiny import Launch


def test_times_lie_on_a_line_between_the_measured_points() -> None:
    points = [Timed(1e6, 1e-3), Timed(1e8, 1e-2), Timed(1e9, 1e-1)]
    assert interpolate(points, 1e7) == pytest.approx(math.sqrt(1e-3 * 1e-2))
    assert interpolate(points, 1e8) == pytest.approx(1e-2)
    assert interpolate(points, 1e10) == pytest.approx(1.0), "in proportion above"
    assert interpolate(points, 1e3) == 1e-3, "no step is cheaper than the cheapest that was timed"


def test_a_few_shapes_of_each_kind_are_timed(tmp_path: Path) -> None:
    widths = [64, 128, 256, 512, 1024, 2048]
    runs = [a_run(tmp_path, a_config(sae__n_latents=n)) for n in widths]
    runs += [a_run(tmp_path, a_config(sae__architecture="switch", sae__n_experts=4, sae__n_latents=n)) for n in widths]
    chosen = [config for config, _ in probes(runs)]
    assert len(chosen) == calibrate.SHAPES
    for architecture in ("topk", "switch"):
        timed = [c.sae.n_latents for c in chosen if c.sae.architecture == architecture]
        assert len(set(timed)) == 3 and max(timed) == 2048


def test_a_step_too_large_for_a_calibration_is_cut_down(tmp_path: Path) -> None:
    size = {"sae__n_latents": 1 << 21, "sae__k": 64, "train__batch_tokens": 131072, "train__tokens": 1e9}
    config = a_config(mesh={"shard": 4}, **size)
    ((small, d_model),) = probes([a_run(tmp_path, config, d_model=768)])
    flops = budget.flops_executed_per_token(small.sae, d_model, small.train.batch_tokens, 0, DENSE_ROWS_PER_K)
    assert sum(flops.values()) * small.train.batch_tokens <= calibrate.MOST_STEP_FLOPS
    assert small.sae.k == 64 and small.mesh.shard == 1
    assert rank_memory(small, d_model)["weights"] < 1e9


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that needs 1 ms for a step, 2 ms with dead latents, 0.5 ms for an evaluated batch, of any size, and
    10 µs to draw a row."""
    monkeypatch.setattr(speed, "measure_speed", lambda *_: speed.Speed(1e-3, 2e-3, 5e-4))
    monkeypatch.setattr(speed, "measure_start", lambda *_: 0.25)
    monkeypatch.setattr(speed, "measure_draw", lambda *_: 1e-5)


@pytest.mark.usefixtures("fixed_speed")
def test_steps_evaluations_and_start_are_counted(tmp_path: Path) -> None:
    run = a_run(tmp_path, a_config(train__eval_points=2, activations__heldout_tokens=640))
    known = estimate([run], measure=True).of(run)
    looks = 2 * 512 + 640  # twice the first 512 held-out rows, all 640 at the end
    # nothing can be dead in the first 2,000 of 6,400 tokens; a step takes 2 ms when something is
    computed = 100 * (1e-3 * 2000 / 6400 + 2e-3 * 4400 / 6400) + looks / 64 * 5e-4
    assert known.train_s == pytest.approx(computed + (6400 + looks) * 1e-5)
    assert known.seconds == pytest.approx((known.train_s or 0) + 0.25 + module.RUN_START_S + SAMPLE_ROWS * 1e-5)
    assert known.tokens == 6400
    assert sum(known.flops.values()) == pytest.approx(run.flops)


def test_real_steps_are_timed(tmp_path: Path) -> None:
    few = a_run(tmp_path, a_config(), "few")
    many = a_run(tmp_path, a_config(train__tokens=64 * 1000), "many")
    known = estimate([few, many], measure=True)
    assert known.calibration.source and not known.calibration.problem and known.calibration.seconds > 0
    assert 0 < (known.of(few).train_s or 0) < (known.of(many).train_s or 0)


def test_the_number_of_threads_is_left_as_it_was(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    estimate([a_run(tmp_path, a_config(train__threads=1))], measure=True)
    assert torch.get_num_threads() == before


def test_steps_are_timed_with_the_threads_that_a_job_will_have(tmp_path: Path) -> None:
    on_cluster = a_config(cluster={"name": "slurm", "gpus_per_task": 0, "cpus_per_task": 1})
    ((timed, _),) = probes([a_run(tmp_path, on_cluster)])
    assert timed.train.threads == 1 and calibrate.kind_of(timed) == calibrate.kind_of(on_cluster)
    ((timed, _),) = probes([a_run(tmp_path, a_config())])
    assert timed.train.threads == 0, "torch's own choice"


def test_runs_that_have_ended_need_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not(*_: object) -> None:
        raise AssertionError("timed a step for nothing")

    monkeypatch.setattr(calibrate, "_calibrate_here", must_not)
    run = a_run(tmp_path, a_config(), status="done")
    assert estimate([run]).of(run).seconds is None
    assert estimate([run]).of(run).memory_bytes


def test_a_calibration_that_fails_says_why(tmp_path: Path) -> None:
    run = a_run(tmp_path, a_config(train__device="cuda", cluster={"name": "slurm"}))
    known = estimate([run], measure=True)
    assert "no GPU here" in known.calibration.problem


def test_an_unknown_width_leaves_everything_open(tmp_path: Path) -> None:
    run = a_run(tmp_path, a_config(), d_model=None)
    assert estimate([run]).of(run).seconds is None


@pytest.mark.usefixtures("fixed_speed")
def test_a_pack_starts_and_draws_once_and_steps_in_turn(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, a_config(cluster={"name": "slurm", "gpus_per_task": 0}), str(i)) for i in range(3)]
    known = estimate(runs, measure=True)
    alone, three = known.job_seconds(job_of(runs[:1])), known.job_seconds(job_of(runs))
    assert alone is not None and three is not None
    assert three == pytest.approx(3 * alone - 2 * (module.PROCESS_START_S + 6400 * 1e-5))
    one, all_ = known.job_memory(job_of(runs[:1])), known.job_memory(job_of(runs))
    assert one is not None and all_ is not None
    assert one < all_ < 1.1 * one, "the process and a step's memory are there once"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("a100", "a100"),
        ("nvidia_a100-sxm4-80gb", "a100-80"),
        ("A100-SXM4-40GB", "a100"),
        ("gpu:h100:4", "h100"),
        ("h100_pcie", "h100-pcie"),
        ("NVIDIA-H200", "h200"),
        ("l40s", "l40s"),
        ("L40", "l40"),
        ("l4", "l4"),
        ("a10", "a10"),
        ("a100_3g.20gb", None),
        ("gh200", None),
        ("rtx4090", None),
    ],
)
def test_gpus_by_the_names_of_sites(said: str, meant: str | None) -> None:
    gpu = find_gpu(said)
    assert (gpu.name if gpu else None) == meant


def test_a_named_gpu_is_estimated_from_its_data_sheet(tmp_path: Path) -> None:
    runs = {}
    for name in ("a100", "h200"):
        config = a_config(
            sae__n_latents=32768, sae__k=32, train__batch_tokens=8192, train__tokens=1e9, train__precision="bf16",
            cluster={"name": "slurm", "gpu_type": name},
        )  # fmt: skip
        runs[name] = a_run(tmp_path, config, name, d_model=768)
    known = estimate(list(runs.values()))
    assert (known.seconds_of(runs["a100"]) or 0) > (known.seconds_of(runs["h200"]) or 0) > 0
    assert "unmeasured" in known.calibration.source and not known.calibration.steps
    # encoder product 0.52 ms, three gathers 0.28, Adam 0.30, a twentieth of the latents: at an H200's measured rates
    gpu, config = find_gpu("h200"), runs["h200"].config
    assert gpu is not None
    assert (step_seconds(gpu, config, 768) or 0) * FLOOR_SHARE == pytest.approx(1.12e-3, rel=0.03)


def test_an_unknown_gpu_leaves_times_open_and_says_which_are_known(tmp_path: Path) -> None:
    run = a_run(tmp_path, a_config(cluster={"name": "slurm", "gpu_type": "mi300"}))
    known = estimate([run])
    assert known.seconds_of(run) is None
    assert "mi300" in known.calibration.problem and "h200" in known.calibration.problem


@pytest.mark.usefixtures("fixed_speed")
def test_a_mesh_on_a_cluster_shares_work_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_draw", lambda *_: 0.0)  # which shards do not share
    cluster = {"name": "slurm", "gpus_per_task": 0}
    one = a_run(tmp_path, a_config(sae__n_latents=4096, cluster=cluster), "one")
    four = a_run(tmp_path, a_config(sae__n_latents=4096, cluster=cluster, mesh={"shard": 4}), "four")
    known = estimate([one, four], measure=True)
    assert known.of(four).train_s == pytest.approx((known.of(one).train_s or 0) / 4)
    assert (known.of(four).memory_bytes or 0) < (known.of(one).memory_bytes or 0)


def test_the_plan_of_a_launch_is_kept_and_widened(launch: Launch, tmp_path: Path) -> None:
    assert launch() == 0
    first = read_plan(tmp_path / "t")
    ((name, entry),) = first["runs"].items()
    assert entry["train_s"] > 0 and entry["memory_bytes"] > 0 and entry["tokens"] == 4096
    assert entry["flops"]["encoder"] > 0
    assert launch("sae.n_latents=32,64") == 0
    second = read_plan(tmp_path / "t")
    assert second["runs"][name] == entry, "what was expected of a run that is done stays"
    assert len(second["runs"]) == 2 and len(second["calibrations"]) == 2
    assert launch("sae.n_latents=32,64") == 0
    assert read_plan(tmp_path / "t") == second, "nothing to do, nothing written"


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    run = a_run(tmp_path, a_config())
    known = estimate([run])
    record_intent({}, [run], known)
    assert json.loads((tmp_path / "s/plan.json").read_text())["runs"].keys() == {run.run_id}
    (tmp_path / "s/plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        record_intent({}, [run], known)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not(*_: object) -> None:
        raise AssertionError("a plan has trained")

    for name in ("measure_speed", "measure_start", "measure_draw"):
        monkeypatch.setattr(speed, name, must_not)


@pytest.mark.usefixtures("no_training")
def test_without_anything_known_times_come_from_a_data_sheet_and_say_so(tmp_path: Path) -> None:
    cpu = a_run(tmp_path, a_config(), "cpu")
    gpu = a_run(tmp_path, a_config(train__device="auto", cluster={"name": "slurm"}), "gpu")
    known = estimate([cpu, gpu])
    assert (known.seconds_of(cpu) or 0) > 0 and (known.seconds_of(gpu) or 0) > 0
    assert "per CPU thread, within a factor of 5" in known.calibration.source
    assert "data sheet of a100, since cluster.gpu_type names none: within a factor of 5" in known.calibration.source


@pytest.mark.usefixtures("fixed_speed")
def test_what_was_measured_once_serves_later_plans_of_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = a_config(), a_config(cluster={"name": "slurm", "gpus_per_task": 0, "cpus_per_task": 1})
    runs = [a_run(tmp_path, here)]
    measured = estimate(runs, measure=True)
    record_intent({}, runs, measured)
    monkeypatch.setattr(speed, "measure_speed", None)
    later = estimate(runs)
    assert later.of(runs[0]).train_s == measured.of(runs[0]).train_s
    assert later.calibration.source == measured.calibration.source
    assert "assumed" in estimate([a_run(tmp_path, elsewhere)]).calibration.source


@pytest.mark.usefixtures("no_training")
def test_runs_that_have_ended_say_how_long_others_take(launch: Launch, tmp_path: Path) -> None:
    assert launch("sae.n_latents=32,64") == 0
    config = read_config(next(path.parent for path in (tmp_path / "t").glob("*n64*/result.json")))
    result = json.loads(next((tmp_path / "t").glob("*n64*/result.json")).read_text())
    seed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
    store = Store(config.activations.store, result["d_model"])
    run = Run(seed, tmp_path / "t" / "later", store)
    known = estimate([run])
    assert known.calibration.source == "from 2 sizes of ended runs of this sweep"
    steps_s = result["tokens"] / result["tokens_per_s"]
    assert (known.of(run).train_s or 0) > steps_s * 0.999, "as many steps, and evaluations"


def test_memory_counts_a_tile_per_thread_of_the_place_where_a_run_trains() -> None:
    large = {"sae__n_latents": 65536, "train__batch_tokens": 65536, "train__tokens": 1e9}
    cluster = {"name": "slurm", "gpus_per_task": 0}
    one, many = (
        rank_memory(a_config(cluster={**cluster, "cpus_per_task": threads}, **large), 16)["step"] for threads in (1, 65)
    )
    assert many - one == 64 * (TILE_ELEMENTS * 4 + 3 * 8 * 65536)
