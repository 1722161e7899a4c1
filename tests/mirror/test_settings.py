"""Which project, entity and tags W&B gets: ours where they are set, else those of its own variables."""

import os
from pathlib import Path

import pytest

from harness.config import TrackerConfig
from harness.errors import UserError
from harness.mirror import wandb_settings
from harness.mirror.to_wandb import chosen_mode
from harness.mirror.wandb_settings import AGENT, leave_agent, with_environment
from harness.record.rundir import read_config
from harness.replay import main as replay
from harness.sweep.request import Request, plan_runs, requested_cells
from tests.mirror.conftest import MakeRun

CELL = ("activations=synthetic", "sae.n_latents=32", "sae.k=2", "train.warmup_tokens=0", "tracker=wandb")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_TAGS", "WANDB_MODE", *AGENT):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("overrides", "project", "entity", "tags"),
    [
        ([], "my-thesis", "my-lab", ["a", "b"]),
        (["tracker.project=sae-scaling"], "sae-scaling", "my-lab", ["a", "b"]),
        (["tracker.entity=mine"], "my-thesis", "mine", ["a", "b"]),
        (["tracker.tags=[c]"], "my-thesis", "my-lab", ["c"]),
    ],
)
def test_variables_hold_where_ours_are_not_set(
    overrides: list[str], project: str, entity: str, tags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WANDB_PROJECT": "my-thesis", "WANDB_ENTITY": "my-lab", "WANDB_TAGS": "a, b"}.items():
        monkeypatch.setenv(name, value)
    tracker = requested_cells(Request([*CELL, *overrides]))[0].config.tracker
    assert (tracker.project, tracker.entity, tracker.tags) == (project, entity, tags)


def test_without_variables_the_project_has_a_name() -> None:
    assert with_environment(TrackerConfig()).project == wandb_settings.PROJECT


@pytest.mark.parametrize(
    "override",
    [
        f"tracker.tags=[{'t' * 80}]",
        "tracker.tags=['']",
        f"tracker.project={'p' * 129}",
        "tracker.project=a/b",
        "tracker.project='a:b'",
        "tracker.project='50%'",
        "tracker.entity='my lab'",
    ],
)
def test_what_wandb_refuses_is_refused_at_launch(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=override.split("=")[0].replace(".", r"\.")):
        requested_cells(Request([*CELL, override]))
    assert requested_cells(Request([*CELL, override, "tracker=none"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_TAGS", "t" * 65), ("WANDB_PROJECT", "a?b"), ("WANDB_ENTITY", "a/b"), ("WANDB_MODE", "of")],
)
def test_also_in_its_variables(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        requested_cells(Request(CELL))


def test_old_names_of_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mode in {"dryrun": "offline", "run": "online", "disabled": "disabled"}.items():
        monkeypatch.setenv("WANDB_MODE", name)
        assert chosen_mode() == mode


@pytest.mark.parametrize(("sweep", "kept"), [("train.seed=0,1", False), ("train.seed=0", True)])
def test_cells_of_a_grid_do_not_share_the_run_of_an_agent(
    sweep: str, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in AGENT:
        monkeypatch.setenv(name, "abc")
    plan_runs(requested_cells(Request([*CELL, sweep, f"out={tmp_path}"])), dry_run=True)
    assert [name in os.environ for name in AGENT] == [kept] * len(AGENT)
    assert not leave_agent() or kept


def test_replay_takes_settings_of_the_tracker(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run()
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("tags: []", f"tags: [{'t' * 80}]"))
    (run_dir / "metrics.jsonl").touch()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert replay([str(run_dir)]) == 2
    assert "1 to 64 characters" in capsys.readouterr().err
    assert replay([str(run_dir), "tracker.tags=[short]", "tracker.project=mine"]) == 0
    assert read_config(run_dir).tracker.tags == ["t" * 80], "the record stays as it is"
    assert replay([str(run_dir), "tracker.tag=x"]) == 2
    assert "did you mean tracker.tags" in capsys.readouterr().err
