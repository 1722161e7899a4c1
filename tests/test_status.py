"""`harness.status`: what a person sees of a sweep, from its files alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from harness import status
from harness.config import science, to_container
from harness.files import write_json_atomic
from harness.process.claim import claim
from harness.sweep.rows import Row, last_line, sweep_rows
from tests.test_terminal import Terminal


class Sweep:
    """Run directories with what a test wants in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.names: list[str] = []
        self.planned: dict[str, Any] = {}

    def add(self, name: str, **files: Any) -> Path:
        """`result=…`, `metrics=[…]`; `log=…` and `ended=…` of attempt `attempts=n`. None of them: not begun."""
        self.names.append(name)
        run_dir = self.directory / name
        if not files:
            return run_dir
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text("{}\n")
        attempt = run_dir / "attempts" / str(files.get("attempts", 1))
        attempt.mkdir(parents=True)
        (attempt / "log.txt").write_text(files.get("log", "started\n"))
        if "ended" in files:
            write_json_atomic(attempt / "ended.json", files["ended"])
        if "metrics" in files:
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in files["metrics"]))
        if "result" in files:
            write_json_atomic(run_dir / "result.json", files["result"])
        return run_dir

    def plan(self, name: str, seconds: float, memory: int = 10**9, tokens: int = 1000) -> None:
        self.planned[name] = {"train_s": seconds, "memory_bytes": memory, "tokens": tokens}

    def rows(self) -> dict[str, Row]:
        write_json_atomic(self.directory / "study.json", {"runs": self.names})
        write_json_atomic(self.directory / "plan.json", {"calibrations": [], "runs": self.planned})
        return {row["run_id"]: row for row in sweep_rows(self.directory)}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "s")


def done(seconds: float = 10.0, **more: Any) -> dict[str, Any]:
    return {"status": "done", "fvu": 0.25, "tokens": 1000, "tokens_per_s": 50.0, "wall_s": seconds, **more}


def ended(**changes: Any) -> dict[str, Any]:
    return {"outcome": "saved", "reason": "preempted", "step": 40, "requeued": True, "time": "now"} | changes


def test_every_state_from_the_files(sweep: Sweep) -> None:
    sweep.add("finished", result=done())
    sweep.add("diverged", result={"status": "diverged", "diverged_at_step": 7})
    sweep.add("failed", result={"status": "failed", "error": "RuntimeError: boom"})
    sweep.add("preempted", ended=ended())
    sweep.add("cancelled", ended=ended(reason="cancelled", requeued=False))
    sweep.add("killed", log="began\n")
    sweep.add("later")
    running = sweep.add("running", metrics=[{"tokens": 100, "tokens_per_s": 10.0}])
    with claim(running / "claim.json"):
        rows = sweep.rows()
    states = {name: row["status"] for name, row in rows.items()}
    assert states == {
        "finished": "done",
        "diverged": "diverged",
        "failed": "failed",
        "preempted": "preempted",
        "cancelled": "interrupted",
        "killed": "interrupted",
        "later": "pending",
        "running": "running",
    }
    assert rows["preempted"]["error"] == "saved at step 40: preempted"
    assert rows["diverged"]["error"] == "diverged at step 7"
    assert "killed" in rows["killed"]["error"]
    assert rows["later"]["error"] is None and rows["finished"]["error"] is None
    assert rows["running"]["host"]


def test_only_the_newest_attempt_says_how_it_stands(sweep: Sweep) -> None:
    run_dir = sweep.add("a", attempts=3)
    (run_dir / "attempts/2").mkdir()
    write_json_atomic(run_dir / "attempts/2/ended.json", ended())
    row = sweep.rows()["a"]
    assert row["status"] == "interrupted" and row["restarts"] == 2


def test_a_running_cell_says_how_far_it_is_and_when_it_ends(sweep: Sweep) -> None:
    run_dir = sweep.add("a", attempts=2, metrics=[{"tokens": 250, "tokens_per_s": 50.0, "fvu": 0.5, "wall_s": 5.0}])
    sweep.plan("a", 20.0, tokens=1000)
    with claim(run_dir / "claim.json"):
        row = sweep.rows()["a"]
        shown = status.text([row])
    assert row["progress"] == 0.25 and row["fvu"] == 0.5 and row["restarts"] == 1
    assert "left: 1 runs, 15s of training by plan" in shown
    heading, line = (text.split() for text in shown.splitlines()[:2])
    told = dict(zip(heading, line, strict=True))
    assert told["progress"] == "25%" and told["planned"] == "20s" and told["left"] in ("14s", "15s")


def test_a_run_that_the_plan_does_not_know_says_how_far_it_is(sweep: Sweep) -> None:
    run_dir = sweep.add("a", metrics=[{"tokens": 300, "flops": 1.0}])
    from tests.training.members import small_config

    (run_dir / "config.yaml").write_text(json.dumps(to_container(small_config(train__tokens=1200))))
    assert sweep.rows()["a"]["progress"] == 0.25


def test_what_went_wrong_with_the_line_of_the_log(sweep: Sweep) -> None:
    log = "2026-11-20 starts\nTraceback\nRuntimeError: the third rank is gone\n\n"
    sweep.add("a", attempts=3, log=log, result={"status": "failed", "error": "failed 3 times at step 5"})
    row = sweep.rows()["a"]
    assert row["error"] == "failed 3 times at step 5 | RuntimeError: the third rank is gone"
    shown = status.text([row])
    assert "third rank is gone (log: " in shown and "attempts/3/log.txt" in shown


def test_a_run_of_a_pack_points_to_the_log_of_the_pack(sweep: Sweep) -> None:
    shared = sweep.directory / "_packs/2-abc/attempts/1/log.txt"
    shared.parent.mkdir(parents=True)
    shared.write_text("began\nMemoryError: too many together\n")
    told = "trained together with others, logged in runs/s/_packs/2-abc/attempts/1/log.txt\n"
    sweep.add("a", log=told, result={"status": "failed", "error": "RankFailed"})
    row = sweep.rows()["a"]
    assert row["log"] == str(shared) and row["error"].endswith("too many together")


def test_planned_beside_real(sweep: Sweep) -> None:
    sweep.add("a", result=done(20.0, peak_memory_bytes=15 * 10**8))
    sweep.add("b", result=done(30.0, trained_together=3, peak_memory_bytes=5 * 10**8))
    sweep.add("c", result=done(1.0))
    sweep.plan("a", 10.0)
    sweep.plan("b", 10.0)
    rows = sweep.rows()
    assert rows["b"]["took_s"] == 10.0, "of the time of a pack, its share"
    pack = sweep.directory / "_packs" / "2-abc" / "pack.json"
    pack.parent.mkdir(parents=True)
    write_json_atomic(pack, {"runs": ["d", "e"]})
    sweep.add("d", metrics=[{"tokens": 100, "wall_s": 8.0}])
    assert sweep.rows()["d"]["took_s"] == 4.0, "before it has ended too"
    shown = status.text(list(rows.values()))
    assert "2 done: planned 20s, took 30s (per run 1.50 of the plan, 1.00 to 2.00)" in shown
    assert "memory: planned at most 1GB, took at most 1.5GB (per run 1.00 of the plan, 0.50 to 1.50)" in shown


def test_what_needs_attention_comes_first_and_a_long_sweep_stays_readable(sweep: Sweep) -> None:
    for number in range(200):
        sweep.add(f"done-{number}", result=done())
    for number in range(30):
        sweep.add(f"bad-{number:02}", result={"status": "failed", "error": f"boom {number}"})
    rows = list(sweep.rows().values())
    lines = status.text(rows).splitlines()
    assert lines[1].startswith("bad-00") and len(lines) < 60
    assert any("197 done, 15 failed (--all shows them)" in line for line in lines)
    assert lines[-1] == "230 runs: 200 done, 30 failed"
    whole = status.text(rows, whole=True).splitlines()
    assert sum(line.startswith("done-") for line in whole) == 200 and any("boom 29" in line for line in whole)


def test_a_harvest_that_was_given_up_is_told(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.add("waits")
    sweep.rows()
    harvest = sweep.directory / "_slurm" / "s-harvest-1"
    harvest.mkdir(parents=True)
    (harvest / "failed.txt").write_text("failed 3 times at step 0: no model\n")
    assert status.main([str(sweep.directory)]) == 0
    assert f"s-harvest-1: failed 3 times at step 0: no model (log: {harvest}/log)" in capsys.readouterr().out


def test_what_sets_a_cell_apart_and_one_line_for_a_cause(sweep: Sweep) -> None:
    """From the result, the plan of a run that has not begun, or the frozen configuration; old runs keep their id."""
    from tests.training.members import small_config

    oom = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
    for number, rate in enumerate((0.1, 0.01, 0.001)):
        config = to_container(small_config(train__lr=rate))
        sweep.add(f"r{number}", result={"status": "failed", "error": oom, "config": config})
    sweep.add("later")
    sweep.plan("later", 1.0)
    sweep.planned["later"]["settings"] = science(small_config(train__lr=0.5))
    frozen = sweep.add("frozen", metrics=[{"tokens": 1}])
    (frozen / "config.yaml").write_text(json.dumps(to_container(small_config(train__lr=0.25))))
    sweep.add("old", metrics=[{"tokens": 1}])
    rows = sweep.rows()
    named = {name: row["cell"] for name, row in rows.items()}
    assert named == {
        **{"r0": "lr=0.1", "r1": "lr=0.01", "r2": "lr=0.001"},
        **{"later": "lr=0.5", "frozen": "lr=0.25", "old": None},
    }
    shown = status.text(list(rows.values()))
    assert "lr=0.1; lr=0.01; lr=0.001: the GPU is out of memory (log: " in shown
    assert shown.count("out of memory") == 1 and "lr=0.25; old: ended without a record" in shown


def test_json_has_every_run(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.add("a", result=done())
    sweep.add("b")
    sweep.rows()
    assert status.main([str(sweep.directory), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run_id"], row["status"]) for row in rows] == [("a", "done"), ("b", "pending")]


def test_watch_ends_by_itself(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.add("a", result=done())
    run_dir = sweep.add("b", ended=ended())
    sweep.rows()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        write_json_atomic(run_dir / "result.json", done())
        # a run that has ended is not read again
        (sweep.directory / "a/result.json").unlink(missing_ok=True)

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert status.main([str(sweep.directory), "--watch", "3"]) == 0
    assert naps == [3.0]
    shown = capsys.readouterr().out
    assert "2 runs: 1 done, 1 preempted" in shown and "2 runs: 2 done" in shown


def test_ctrl_c_ends_a_watch(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    sweep.add("a")
    sweep.rows()
    monkeypatch.setattr(status.time, "sleep", interrupt)
    assert status.main([str(sweep.directory), "--watch"]) == 0


def test_a_watch_on_a_terminal_ends_with_the_whole_status(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        sweep.add(f"run-{number:02}", ended=ended())
    sweep.rows()
    terminal, handler = Terminal(), signal.getsignal(signal.SIGTERM)

    def kill(_: float) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(status.time, "sleep", kill)
    monkeypatch.setattr("sys.stdout", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "12"}.items():
        monkeypatch.setenv(name, value)
    assert status.main([str(sweep.directory), "--watch"]) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    on_screen, after = terminal.getvalue().split("\x1b[?1049l")
    assert "run-05" in on_screen and "run-06" not in on_screen and "…" in on_screen
    assert "30 runs: 30 preempted" in on_screen and "30 runs: 30 preempted" in after
    assert all(f"run-{number:02}" in after for number in range(30))


def test_wrong_requests(tmp_path: Path, sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no sweep at" in capsys.readouterr().err
    sweep.add("a")
    sweep.rows()
    (sweep.directory / "plan.json").write_text("[]")
    assert status.main([str(sweep.directory)]) == 2
    assert "plan.json is damaged" in capsys.readouterr().err


def test_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("first\n" + "x" * 10_000 + "\nlast line\n\n  \n")
    assert last_line(path) == "last line"
    path.write_text("")
    assert last_line(path) == ""


def test_a_finished_run_that_is_worse_than_the_mean_says_so(sweep: Sweep) -> None:
    for name, fvu in (("good", 0.99), ("mean", 1.0), ("blown-up", 63569.2), ("unknown", None)):
        sweep.add(name, result=done() | {"fvu": fvu})
    rows = sweep.rows()
    assert {row["status"] for row in rows.values()} == {"done"}
    marked = [name for name, row in rows.items() if any("worse than the mean" in note for note in row["notes"])]
    assert marked == ["mean", "blown-up"]
    assert "blown-up: fvu 6.357e+04 is worse than the mean" in status.text(list(rows.values()))
