"""TensorBoard and trackio, read back with their own readers. Skipped where the extra is not installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import replay
from harness.mirror import follow as mirror
from harness.mirror.ids import copy_id
from tests.mirror.conftest import LINES, PATIENCE_S, RESULT, MakeRun, cut_to, train

Points = dict[str, list[tuple[int, float]]]
"""Name -> (step, value) in the order of the copy."""
Read = Callable[[Path], Points]

EVERY = 100
SOME = [line for line in LINES if line["step"] % EVERY == 0]
"""20 lines, the last one at step 2000."""

TRACKIO = """
import json, sys
import trackio
(run,) = [run for run in trackio.Api().runs("sae-scaling") if run.name == sys.argv[1]]
logs = trackio.SQLiteStorage.get_logs("sae-scaling", run.name)
assert run.config["run_id"] == sys.argv[2]
print(json.dumps({name: [(line["step"], line[name]) for line in logs if name in line] for name in sys.argv[3:]}))
"""

TENSORBOARD = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
names = set(sys.argv[2:]) & set(events.Tags()["scalars"])
print(json.dumps({name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}))
"""

NAMES = ("loss", "tokens", "final/fvu")


def read_tensorboard(run_dir: Path) -> Points:
    return output(TENSORBOARD, str(run_dir / "tensorboard"), *NAMES)


def read_trackio(run_dir: Path) -> Points:
    """Of the database of `<out>`."""
    folder = {"TRACKIO_DIR": str(run_dir.parent.parent / ".trackio")}
    return output(TRACKIO, copy_id(run_dir, "trackio"), run_dir.name, *NAMES, **folder)


def output(code: str, *arguments: str, **environment: str) -> Points:
    """In a process of its own: both packages give warnings when imported, which are errors here."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    return {name: [(step, value) for step, value in points] for name, points in json.loads(done.stdout).items()}


@pytest.fixture(params=["tensorboard", "trackio"])
def tracker(request: pytest.FixtureRequest) -> str:
    # found, not imported: the mirror and the readers are processes of their own
    if subprocess.run([sys.executable, "-c", f"import {request.param}"], capture_output=True).returncode != 0:
        pytest.skip(f"needs the extra {request.param}")
    return request.param


@pytest.fixture
def read(tracker: str) -> Read:
    return read_tensorboard if tracker == "tensorboard" else read_trackio


def pairs(name: str) -> list[Any]:
    return [(line["step"], pytest.approx(line[name])) for line in SOME]


def test_a_resumed_and_replayed_run_has_every_point_once(
    tracker: str, read: Read, make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run is stopped after its tenth line and goes on from a checkpoint at the eighth."""
    run_dir = make_run(tracker=tracker)
    train(run_dir, SOME[:10], None)
    mirror.close(PATIENCE_S)
    assert read(run_dir)["loss"] == pairs("loss")[:10]
    cut_to(run_dir, SOME[7]["step"])
    train(run_dir, SOME[8:])
    mirror.close(PATIENCE_S)
    assert capfd.readouterr().err == ""
    mirrored = read(run_dir)
    assert mirrored["loss"] == pairs("loss")
    assert mirrored["tokens"] == pairs("tokens")
    assert [value for _, value in mirrored["final/fvu"]] == [pytest.approx(RESULT["fvu"])]
    command = [sys.executable, "-m", "harness.replay", str(run_dir)]
    sent = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert sent.startswith(f"{run_dir.name}: sent (look at it: ")
    assert sent.count("\n") == 1
    assert read(run_dir) == mirrored


def test_two_runs_at_once_and_one_that_fails(tracker: str, read: Read, make_run: MakeRun) -> None:
    one, two = make_run("one", tracker), make_run("two", tracker)
    train(one, SOME)
    train(two, SOME[:5], {"status": "failed", "error": "it broke", "seed": 0})
    mirror.close(PATIENCE_S)
    assert read(one)["loss"] == pairs("loss")
    assert read(two)["loss"] == pairs("loss")[:5]


def test_a_run_of_another_tracker_is_replayed(tracker: str, read: Read, make_run: MakeRun) -> None:
    run_dir = make_run(tracker="none")
    train(run_dir, SOME)
    assert mirror._mirror is None
    command = [sys.executable, "-m", "harness.replay", "--tracker", tracker, str(run_dir)]
    subprocess.run(command, check=True, capture_output=True)
    assert read(run_dir)["loss"] == pairs("loss")
    assert not (run_dir / "wandb").exists()


def test_a_missing_package_is_refused_by_replay(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tracker="none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert replay.main(["--tracker", "trackio", str(run_dir)]) == 2
    assert "needs the package trackio" in capsys.readouterr().err
