"""W&B as a mirror: offline without a key, live while the run trains, and harmless in every failure."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from harness import replay
from harness.files import write_json_atomic
from harness.mirror import follow as mirror
from harness.mirror.ids import copy_id
from harness.record import metrics
from harness.record.result import read_result
from harness.record.rundir import read_config
from tests.analysis.wandb_server import Store, serving
from tests.mirror.conftest import LINES, PATIENCE_S, RESULT, MakeRun, cut_to, server_environment, steps, sync, train
from tests.tiny import Launch


class HangingServer(BaseHTTPRequestHandler):
    """Answers GET, which only asks whether there is a server, and never a POST, with which runs begin."""

    released = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.released.wait(60)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hanging_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HangingServer) as server:
        server.daemon_threads = True
        HangingServer.released.clear()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        HangingServer.released.set()
        server.shutdown()
        thread.join(5)


def process() -> subprocess.Popen[bytes]:
    assert mirror._mirror is not None
    return mirror._mirror.process


def test_offline_without_a_key(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(run_dir) < 5
    mirror.close(PATIENCE_S)
    error = capfd.readouterr().err
    assert error.count("no API key, recording offline") == 1
    assert "wandb sync" in error
    assert "warning" not in error
    (record,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    name = copy_id(run_dir, "wandb")
    assert name in record.name
    assert record.stat().st_size > 20_000
    assert json.loads((run_dir / "tracker.json").read_text()) == {"wandb_id": name}
    store = Store()
    sent = sync(run_dir, store, tmp_path)
    config = read_config(run_dir)
    assert list(store.runs) == [name]
    assert (sent["bucket"]["displayName"], sent["bucket"]["groupName"]) == (run_dir.name, config.sweep)
    assert sent["bucket"]["tags"] == ["topk"]
    assert json.loads(sent["bucket"]["config"])["run_id"]["value"] == run_dir.name
    assert steps(sent) == [line["step"] for line in LINES]
    assert [line["tokens"] for line in sent["history"]] == [line["tokens"] for line in LINES]
    assert all("fvu" not in line for line in sent["history"]), "null is no value"
    assert {name: sent["summary"][name] for name in ("status", "steps", "fvu")} == {
        "status": "done",
        "steps": 2000,
        "fvu": 0.1,
    }
    assert sent["exit"] == 0


def test_two_runs_at_once_and_a_resumed_one(
    make_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first run is stopped after step 1000, and goes on from a checkpoint at step 800."""
    one, other = make_run("one"), make_run("other")
    train(one, LINES[:1000], None)
    train(other)
    mirror.close(PATIENCE_S)
    cut_to(one, 800)
    train(one, LINES[800:])
    mirror.close(PATIENCE_S)
    assert len(list(one.glob("wandb/offline-run-*"))) == 2
    assert len(list(other.glob("wandb/offline-run-*"))) == 1
    assert "warning" not in capfd.readouterr().err
    for run_dir in (one, other):
        sent = sync(run_dir, Store(), tmp_path)
        assert steps(sent) == [line["step"] for line in LINES]
        assert sent["exit"] == 0


def test_switched_off(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(run_dir)
    assert mirror._mirror is None


def test_live_while_the_run_trains_and_a_resume_continues_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    with serving(store) as address:
        for name, value in server_environment(address, tmp_path).items():
            monkeypatch.setenv(name, value)
        train(run_dir, LINES[:1000], None)
        deadline = time.monotonic() + 60
        # W&B sends a step when the next one begins: more values of it may follow
        while not any(steps(run)[-1:] == [999] for run in store.runs.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        (run,) = store.runs.values()
        assert steps(run)[-1] == 999
        assert run["exit"] is None, "it is still open"
        mirror.close(PATIENCE_S)
        assert run["exit"] == 1, "the program ended, the run did not"
        assert run["summary"]["status"] == "interrupted"
        cut_to(run_dir, 800)
        train(run_dir, LINES[800:])
        mirror.close(PATIENCE_S)
    assert len(store.runs) == 1
    assert steps(run) == [line["step"] for line in LINES]
    assert run["exit"] == 0
    assert run["summary"]["status"] == "done"


def test_a_server_that_hangs_delays_nothing(
    run_dir: Path, hanging_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", hanging_server)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert train(run_dir) < 5
    begin = time.monotonic()
    mirror.close(timeout_s=3)
    assert time.monotonic() - begin < 6
    assert "did not finish within 3 s; the runs are not affected" in capfd.readouterr().err


def test_a_stopped_mirror_delays_nothing(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mirror.follow(run_dir, read_config(run_dir))
    os.kill(process().pid, signal.SIGSTOP)
    config = read_config(run_dir)
    begin = time.monotonic()
    for number in range(10_000):
        mirror.follow(run_dir.parent / f"run-{number}", config)
    train(run_dir)
    assert time.monotonic() - begin < 5
    stopped = process()
    mirror.close(timeout_s=1)
    assert stopped.returncode == -signal.SIGKILL
    assert "did not finish within 1 s; the runs are not affected" in capfd.readouterr().err


def test_a_mirror_that_dies_in_the_middle(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    train(make_run("one"), LINES[:1], None)
    killed = process()
    killed.kill()
    killed.wait()
    train(make_run("two"))
    train(make_run("three"))
    mirror.close(PATIENCE_S)
    assert capfd.readouterr().err.count("warning: W&B ended early") == 1


def test_a_mirror_that_cannot_be_started(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    train(run_dir)
    mirror.close(PATIENCE_S)
    expected = "warning: W&B cannot be started (No such file or directory); the runs are not affected"
    assert capfd.readouterr().err.count(expected) == 1


PARENT = """
import os, signal, sys
from pathlib import Path
from harness.mirror import follow as mirror
from tests.mirror.conftest import LINES, train
for name in sys.argv[1:]:
    train(Path(name), LINES[:1500], None)
print(mirror._mirror.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_program_leaves_a_whole_copy_and_no_process(run_dir: Path, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", PARENT, str(run_dir)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    pid = int(killed.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)
    sent = sync(run_dir, Store(), tmp_path)
    assert steps(sent) == list(range(1, 1501))
    assert sent["exit"] == 1
    assert sent["summary"]["status"] == "interrupted"


def test_a_process_whose_copy_hangs_ends_after_the_program(run_dir: Path) -> None:
    code = (
        "import sys, time\n"
        "from harness.mirror import __main__ as process, copies\n"
        "process.DRAIN_LIMIT_S = 0.5\n"
        "copies.open_copy = lambda *_, **__: time.sleep(600)\n"
        "sys.exit(process.main())\n"
    )
    runs = run_dir / "runs"
    runs.write_text(json.dumps(str(run_dir)) + "\n")
    with runs.open() as announced:  # its parent is never process 0, so the program counts as gone
        ended = subprocess.run([sys.executable, "-c", code, "0"], stdin=announced, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_a_signal_to_the_whole_job_ends_the_mirror_after_the_program(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cancelled job gets SIGTERM in all its processes. W&B's own ends at once, and the next start makes up for it."""
    store = Store()
    with serving(store) as address:
        for name, value in server_environment(address, tmp_path).items():
            monkeypatch.setenv(name, value)
        train(run_dir, LINES[:1000], None)
        deadline = time.monotonic() + 60
        while not store.runs and time.monotonic() < deadline:
            time.sleep(0.1)
        service = psutil.Process(process().pid).children(recursive=True)
        for each in [process().pid, *(child.pid for child in service)]:
            os.kill(each, signal.SIGTERM)
        mirror.close(PATIENCE_S)
        assert "Traceback" not in capfd.readouterr().err
        train(run_dir, LINES[1000:])
        service = psutil.Process(process().pid).children(recursive=True)
        mirror.close(PATIENCE_S)
        _, alive = psutil.wait_procs(service, timeout=20)
        assert not alive
    (run,) = store.runs.values()
    assert steps(run) == [line["step"] for line in LINES]
    assert run["exit"] == 0


def test_a_pack_is_mirrored_run_by_run(
    launch: Launch, make_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("tracker=wandb", "sae.k=2,4", "cluster.pack=2", "sweep=p") == 0
    mirror.close(PATIENCE_S)
    assert capfd.readouterr().err.count("recording offline") == 1
    run_dirs = [path.parent for path in tmp_path.glob("p/*/result.json")]
    assert len(run_dirs) == 2
    for run_dir in run_dirs:
        sent = sync(run_dir, Store(), tmp_path)
        recorded = metrics.read(run_dir / "metrics.jsonl")
        assert steps(sent) == sorted({line["step"] for line in recorded})
        fvu = {line["step"]: line["fvu"] for line in recorded if line.get("fvu") is not None}
        assert {line["_step"]: line["fvu"] for line in sent["history"] if "fvu" in line} == fvu
        assert sent["exit"] == 0
        assert sent["summary"]["fvu"] == (read_result(run_dir) or {})["fvu"]


def test_an_unreachable_server_means_offline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    train(run_dir)
    mirror.close(PATIENCE_S)
    assert capfd.readouterr().err.count("W&B cannot be reached at http://127.0.0.1:9; recording offline") == 1
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_a_server_that_hangs_means_offline(
    run_dir: Path, hanging_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", hanging_server)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    train(run_dir)
    mirror.close(PATIENCE_S)
    error = capfd.readouterr().err
    assert error.count(f"W&B cannot be reached at {hanging_server}; recording offline") == error.count("warning") == 1
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_a_finished_record_can_be_sent_later(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(run_dir, LINES[:10])
    mirror.close(0.1)  # too short to start
    assert not list(run_dir.glob("wandb/offline-run-*"))
    assert replay.main([str(run_dir)]) == 0
    assert re.search(r"sent \(offline; send it: \S*wandb sync", capsys.readouterr().out)
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_a_service_of_wandb_in_the_environment_is_not_used(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It belongs to a parent that used wandb, and would hold the run after the mirror has ended."""
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/nonexistent/socket")
    train(run_dir)
    mirror.close(PATIENCE_S)
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert "warning" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_replay_after_an_outage_gives_the_same_points(
    make_run: MakeRun, hanging_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is mirrored live, one to a server that hangs; the second is sent again, twice."""
    live, lost = make_run("live"), make_run("lost")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", hanging_server)
    train(lost)
    mirror.close(timeout_s=1)
    store = Store()
    with serving(store) as address:
        environment = server_environment(address, tmp_path)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        train(live)
        mirror.close(PATIENCE_S)
        for _ in range(2):
            command = [sys.executable, "-m", "harness.replay", str(lost)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (0, "lost: sent\n"), done.stderr
    points = {}
    for run_dir in (live, lost):
        run = store.runs[copy_id(run_dir, "wandb")]
        history = [{k: v for k, v in line.items() if not k.startswith("_") or k == "_step"} for line in run["history"]]
        summary = {name: run["summary"][name] for name in RESULT if name != "config"}
        points[run_dir.name] = (history, summary, run["exit"])
    assert len(points["live"][0]) == len(LINES)
    assert len(points["lost"][0]) == len(LINES)
    assert points["live"][0][-3:] == points["lost"][0][-3:]
    assert points["live"] == points["lost"]


def test_an_old_tracker_file_stays_valid(run_dir: Path) -> None:
    write_json_atomic(run_dir / "tracker.json", {"wandb_id": "abc"})
    assert copy_id(run_dir, "wandb") == "abc"
    other = copy_id(run_dir, "trackio")
    assert json.loads((run_dir / "tracker.json").read_text()) == {"wandb_id": "abc", "trackio_id": other}
