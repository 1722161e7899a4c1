import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.process import claim as claims
from harness.process.claim import Claimed, Owner, claim
from harness.process.signals import Interrupted, StopFlag

HOLDER = """
import sys, time
from pathlib import Path
from harness.process.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work.lock"


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_claim_is_exclusive_and_leaves_nothing(path: Path) -> None:
    with claim(path):
        with pytest.raises(Claimed, match=rf"work.lock is being worked on by process {os.getpid()} on "), claim(path):
            pass
        assert json.loads(path.read_text())["pid"] == os.getpid()
    with claim(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_a_claim_of_a_living_process_is_respected_and_of_a_killed_one_taken_over(path: Path) -> None:
    process = hold_elsewhere(path)
    try:
        with pytest.raises(Claimed) as caught, claim(path):
            pass
        assert caught.value.owner is not None and caught.value.owner.pid == process.pid
    finally:
        end(process)
    assert path.exists()
    started = time.monotonic()
    with claim(path):
        assert time.monotonic() - started < 5
    assert list(path.parent.iterdir()) == []


def test_a_zombie_is_dead(path: Path) -> None:
    process = hold_elsewhere(path)
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)  # killed, but not waited for
    try:
        with claim(path):
            pass
    finally:
        end(process)


def test_waiting_is_announced_once_and_ends_with_the_release(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.02)
    seen: list[Owner | None] = []
    with claim(path):
        result: list[bool] = []

        def wait() -> None:
            with claim(path, wait=True, on_wait=seen.append):
                result.append(True)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.2)
        assert result == [] and len(seen) == 1
    waiter.join(timeout=10)
    assert result == [True] and seen[0] is not None and seen[0].pid == os.getpid()


def test_waiting_stops_when_asked(path: Path) -> None:
    stop = StopFlag()
    stop.request()
    with claim(path), pytest.raises(Interrupted), claim(path, wait=True, stop=stop):
        pass


def test_a_claim_says_who_holds_it_since_when_and_for_which_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    with claim(path):
        owner = json.loads(path.read_text())
        assert owner["host"] == socket.gethostname() and owner["pid"] == os.getpid() and owner["job"] == "124"
        assert owner["started"] == pytest.approx(psutil.Process().create_time(), abs=1)
        with pytest.raises(Claimed, match=r", job 124"), claim(path):
            pass
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "120")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    with claim(path):
        assert json.loads(path.read_text())["job"] == "120_4"


def write_owner(path: Path, age: float, **changes: object) -> None:
    owner = claims._this_process()._replace(token="other", **changes)  # pyright: ignore
    path.write_text(json.dumps(owner._asdict()))
    os.utime(path, (time.time() - age, time.time() - age))


def test_another_host_is_judged_by_its_heartbeat(path: Path) -> None:
    write_owner(path, age=5, host="elsewhere", pid=1)
    with pytest.raises(Claimed, match="process 1 on elsewhere"), claim(path):
        pass
    write_owner(path, age=claims.STALE_S + 5, host="elsewhere", pid=1)
    with claim(path) as held:
        assert not held.lost


def test_who_only_looks_needs_to_write_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    path.write_text(json.dumps({"host": "elsewhere", "machine": "m", "pid": 1, "started": 0.0, "token": "t"}))
    monkeypatch.setattr(Path, "touch", refused)
    found = claims.holder(path)
    assert found is not None and found.host == "elsewhere"
    long_ago = time.time() - 1000
    os.utime(path, (long_ago, long_ago))
    assert claims.holder(path) is None


def test_a_reused_process_id_is_not_the_owner(path: Path) -> None:
    this = claims._this_process()
    assert this.ticks is not None
    write_owner(path, age=0, ticks=this.ticks - 1)
    with claim(path):
        pass
    write_owner(path, age=0, started=this.started - 1000, ticks=None)  # of a system or a version without ticks
    with claim(path):
        pass


@pytest.mark.parametrize("step_s", [-86400.0, -2.5, 2.5, 3600.0, 1e9])
def test_a_living_owner_outlives_a_step_of_the_clock(path: Path, step_s: float) -> None:
    write_owner(path, age=step_s, started=claims._this_process().started + step_s)
    with pytest.raises(Claimed), claim(path):
        pass
    assert claims.holder(path) is not None


def test_a_claim_from_the_future_is_not_renewed_any_more(path: Path) -> None:
    """The clock of the file system was set back, and the owner elsewhere has not renewed its claim since."""
    write_owner(path, age=-claims.STALE_S - 60, host="elsewhere")
    with claim(path):
        pass


DAMAGED = {
    "a byte that is no UTF-8": b'{"host": "\xff"}',
    "cut": b'{"host": "el',
    "empty": b"",
    "a list": b"[]",
    "a number of five thousand digits": b"1" * 5000,
    "deep": b"[" * 100_000,
    "a key of another version": b'{"host": "h", "machine": "m", "pid": 1, "started": 0, "token": "t", "new": 1}',
    "a process id that means everybody": b'{"host": "h", "machine": "m", "pid": -1, "started": 0, "token": "t"}',
    "a process id that means our group": b'{"host": "h", "machine": "m", "pid": 0, "started": 0, "token": "t"}',
    "a text for a number": b'{"host": "h", "machine": "m", "pid": "7", "started": 0, "token": "t"}',
    "a number for a text": b'{"host": 5, "machine": "m", "pid": 7, "started": 0, "token": "t"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_claim_is_respected_until_it_is_stale_and_stops_nobody(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert claims.holder(path) is None
    with pytest.raises(Claimed, match="another process"), claim(path):
        pass
    os.utime(path, (0, 0))
    with claim(path):
        pass


def test_the_same_host_after_a_reboot_is_judged_by_its_heartbeat(path: Path) -> None:
    write_owner(path, age=5, machine="another boot")
    with pytest.raises(Claimed, match=socket.gethostname()), claim(path):
        pass
    write_owner(path, age=claims.STALE_S + 5, machine="another boot")
    with claim(path):
        pass


def test_an_unreadable_claim_is_respected_until_it_is_stale(path: Path) -> None:
    path.write_text('{"host": "el')
    with pytest.raises(Claimed, match="another process"), claim(path):
        pass
    os.utime(path, (0, 0))
    with claim(path):
        pass


def test_the_heartbeat_renews_and_notices_a_takeover(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    told: list[Path] = []
    with claim(path, on_lost=told.append) as held:
        os.utime(path, (0, 0))
        time.sleep(0.3)
        assert path.stat().st_mtime > 0 and not held.lost
        write_owner(path, age=0, host="elsewhere")
        time.sleep(0.3)
        assert held.lost and told == [path]
    assert path.exists()  # not ours any more


def _contend(path: Path, inside: Path, rounds: int) -> None:
    for _ in range(rounds):
        with claim(path, wait=True):
            inside.touch(exist_ok=False)  # fails when two are inside
            inside.unlink()


def test_many_contenders_for_a_dead_claim_enter_one_at_a_time(path: Path, tmp_path: Path) -> None:
    write_owner(path, age=0, ticks=0)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_contend, args=(path, tmp_path / "inside", 3)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_who_only_looks_writes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the age of a claim decides, because its owner is on another host."""
    claims._create(path, claims._this_process()._replace(host="elsewhere"))
    monkeypatch.setattr(Path, "touch", None)
    assert claims.holder(path) is not None
    os.utime(path, (0, 0))
    assert claims.holder(path) is None
