"""W&B as a mirror: offline without a key, and harmless whatever it does."""

import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness import replay
from harness.mirror import tracker, wandb_mirror
from harness.mirror.tracker import NullTracker, close_mirror, open_tracker
from harness.record.rundir import read_config

LINES = [{"step": step, "tokens": 100 * step, "loss": 1.0 / step, "fvu": None} for step in range(1, 2001)]


@pytest.fixture
def run_dir(topk_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run that asks for W&B, in an environment without a key."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    copy = tmp_path / "sweep" / topk_run.name
    shutil.copytree(topk_run, copy)
    config = (copy / "config.yaml").read_text()
    assert "name: none" in config
    (copy / "config.yaml").write_text(config.replace("name: none", "name: wandb"))
    return copy


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


def mirrored(run_dir: Path) -> float:
    """Send all lines and end the run; the seconds that the training would have noticed."""
    begin = time.monotonic()
    mirror = open_tracker(read_config(run_dir), run_dir.name, run_dir, False)
    for line in LINES:
        mirror.log(line)
    mirror.finish({"fvu": 0.1, "config": {}}, 0)
    return time.monotonic() - begin


def test_offline_without_a_key(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert mirrored(run_dir) < 5
    close_mirror()
    error = capfd.readouterr().err
    assert error.count("no API key, recording offline") == 1
    assert "wandb sync" in error
    (record,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    name = wandb_mirror.wandb_id(run_dir)
    assert name in record.name
    assert record.stat().st_size > 20_000
    assert wandb_mirror.wandb_id(run_dir) == name


def test_two_runs_at_once_and_a_resumed_one(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = run_dir.with_name("other")
    shutil.copytree(run_dir, other)
    mirrored(run_dir)
    mirrored(other)
    close_mirror()
    mirrored(run_dir)
    close_mirror()
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 2
    assert len(list(other.glob("wandb/offline-run-*"))) == 1
    assert "warning" not in capfd.readouterr().err


def test_switched_off(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror = open_tracker(read_config(run_dir), run_dir.name, run_dir, False)
    assert isinstance(mirror, NullTracker)
    mirror.log(LINES[0])
    mirror.finish({}, 0)
    assert tracker._mirror is None


def test_a_server_that_hangs_delays_nothing(
    run_dir: Path, hanging_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", hanging_server)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert mirrored(run_dir) < 5
    begin = time.monotonic()
    close_mirror(timeout_s=3)
    assert time.monotonic() - begin < 6
    assert "did not finish within 3 s; the runs are not affected" in capfd.readouterr().err


def test_a_mirror_that_dies_in_the_middle(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mirror = open_tracker(read_config(run_dir), run_dir.name, run_dir, False)
    mirror.log(LINES[0])
    assert tracker._mirror is not None
    process = tracker._mirror._process
    assert process is not None
    process.kill()
    process.wait()
    for line in LINES:
        mirror.log(line)
    mirror.finish({}, 0)
    close_mirror()
    assert capfd.readouterr().err.count("warning: W&B ended early") == 1


def test_an_unreachable_server_means_offline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    mirrored(run_dir)
    close_mirror()
    assert capfd.readouterr().err.count("W&B cannot be reached at http://127.0.0.1:9; recording offline") == 1
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_a_finished_record_can_be_sent_later(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(run_dir)]) == 0
    assert "sent (offline; send it: wandb sync" in capsys.readouterr().out
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
