"""`--rehearse`: what counts as one shape, that each is tried where it will train, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.grid.study import STUDY_DIR, load_study, study_names
from harness.launch import main
from harness.record.job import Job, job_of
from harness.record.peers import groups_of
from harness.sweep import rehearse as rehearsals
from harness.sweep.request import Request, plan_runs, requested_cells
from tests.tiny import TINY, Launch


def jobs_of(out: Path, *overrides: str) -> list[Job]:
    cells = requested_cells(Request([*TINY, f"out={out}", *overrides]))
    return [job_of([run]) for run in plan_runs(cells, dry_run=False)]


def test_seeds_rates_and_budgets_make_no_further_shape(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "train.seed=0,1", "train.lr_factor=1,2", "train.tokens=4096,8192", "sae.n_latents=32,64")
    assert len(jobs) == 16
    assert len({rehearsals._shape(job) for job in jobs}) == 2


@pytest.mark.parametrize(
    "other", ["sae.k=3", "sae=switch", "train.batch_tokens=512", "train.precision=fp64", "ops=cpu"]
)
def test_what_can_fail_by_itself_is_a_shape(tmp_path: Path, other: str) -> None:
    (one,), (two,) = jobs_of(tmp_path), jobs_of(tmp_path, other)
    assert rehearsals._shape(one) != rehearsals._shape(two)


def test_a_missing_store_is_made_with_few_rows(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, "activations=minilm", "activations.tokens=1e6", "train.batch_tokens=1024")
    short = rehearsals._short_job(job, tmp_path / "scratch").config
    assert (short.activations.tokens, short.activations.heldout_tokens) == (8192, 512)
    assert short.activations.store != job.config.activations.store
    windows = ("activations.keep=window", "activations.window_tokens=1e5", "train.batch_tokens=16384")
    windows += ("train.tokens=32768",)
    (job,) = jobs_of(tmp_path, "activations=minilm", "activations.tokens=1e6", *windows)
    short = rehearsals._short_job(job, tmp_path / "scratch").config
    assert (short.activations.window_tokens, short.activations.tokens) == (16384, 32768)


def test_peers_are_rehearsed_together(tmp_path: Path) -> None:
    peers = ("train.mfr_weight=1", "train.mfr_seeds=[4,9]", "train.seed=4,9", "train.lr_factor=1,2")
    cells = requested_cells(Request([*TINY, f"out={tmp_path}", *peers]))
    job = job_of(plan_runs(cells, dry_run=False))
    short = rehearsals._short_job(job, tmp_path / "scratch")
    assert len({run.run_id for run in short.runs}) == 4
    assert sorted(len(group) for group in groups_of(short.runs)) == [2, 2]


@pytest.mark.slow
def test_shapes_are_tried_and_nothing_stays(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ("train.mfr_weight=1", "train.mfr_seeds=[0,1]")
    assert launch("sae=topk", "train.seed=0,1", *peers, "cluster.pack=2", "--rehearse") == 0
    table = capsys.readouterr().out
    assert "done" in table and "1 × 1" in table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_stop_save_and_go_on(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("sae=topk", "mesh.dp=2", "--rehearse") == 0
    assert "2 × 1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_shows_in_one_line(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"out={small_disk}", "sae.n_latents=2048", "--rehearse"]) == 1
    assert "no room for a checkpoint" in capsys.readouterr().out
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
def test_a_missing_model_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = ("activations=lm", "activations.model=nowhere/at-all", "activations.text=stdlib")
    assert main([*TINY, *lm, f"out={tmp_path}", "--rehearse"]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_it_needs_a_plain_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"out={tmp_path}", "--rehearse", "--dry-run"]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_every_shipped_study_has_short_jobs(name: str, tmp_path: Path) -> None:
    """Also those for which this machine has neither the model nor the memory."""
    request = Request([f"out={tmp_path}", "tracker=none"], load_study(name))
    runs = plan_runs(requested_cells(request), dry_run=True)
    shapes = {rehearsals._shape(job_of([run])) for run in runs}
    assert 0 < len(shapes) <= len(runs)


REPRODUCE = tuple(f"reproduce/{path.stem}" for path in sorted((STUDY_DIR / "reproduce").glob("*.yaml")))
CLUSTER = (
    *("activations=minilm", "activations.text=stdlib", "activations.layer=4"),
    *("sae.n_latents=2048", "sae.k=8", "train.batch_tokens=1024", "mesh.shard=1"),
)
"""In place of what needs a cluster, and of GPT-2, which cannot be had without a network."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*study_names(), *REPRODUCE])
def test_every_shipped_study_is_rehearsed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cell of each architecture."""
    monkeypatch.setattr(rehearsals, "_shape", lambda job: job.config.sae.architecture)
    study = STUDY_DIR / f"{name}.yaml"
    few = CLUSTER if "activations=gpt2" in study.read_text() else ()
    assert main(["--study", str(study), *few, f"out={tmp_path}", "tracker=none", "--rehearse"]) == 0
    table = capsys.readouterr().out
    assert "done" in table and "failed" not in table
    assert list(tmp_path.iterdir()) == []
