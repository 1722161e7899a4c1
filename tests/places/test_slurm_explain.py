"""What `status` says of a run that does not train, from what Slurm and the job's log say. No Slurm is needed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.files import write_json_atomic
from harness.places.slurm import client
from harness.places.slurm.client import Element, End
from harness.places.slurm.explain import explain, harvests_that_never_began

RUN = "topk-n64"


@pytest.fixture
def array(tmp_path: Path) -> Path:
    directory = tmp_path / "_slurm" / "s-cells-0"
    (directory / "log").mkdir(parents=True)
    write_json_atomic(directory / "runs.json", [["another"], [RUN]])
    write_json_atomic(directory / "submitted.json", {"job_id": "7", "jobs": 2, "time": "2026-11-26T10:00:00+00:00"})
    return directory


def ask(
    monkeypatch: pytest.MonkeyPatch,
    array: Path,
    queued: list[Element] | None = None,
    ends: dict[int, End] | None = None,
    begun: bool = False,
) -> tuple[bool, str] | None:
    monkeypatch.setattr(client, "elements", lambda *_: queued or [])
    monkeypatch.setattr(client, "ends", lambda *_: ends or {})
    told = explain(array.parents[1], {RUN: begun}).get(RUN)
    return None if told is None else (told.failed, told.text)


@pytest.mark.parametrize(
    ("state", "reason", "failed", "text"),
    [
        ("PENDING", "Resources", False, "job 7_1 waits: what it asks for is in use (Resources)"),
        ("PENDING", "(ReqNodeNotAvail, UnavailableNodes:n1)", False, "job 7_1 waits: nodes that it needs are down"),
        ("PENDING", "SomethingNew", False, "job 7_1 waits: SomethingNew"),
        ("PENDING", "launch failed requeued held", True, "job 7_1 waits: Slurm could not start it and holds it"),
        ("RUNNING", "None", False, "job 7_1 is running and does not train this run now"),
    ],
)
def test_a_job_in_the_queue(
    monkeypatch: pytest.MonkeyPatch, array: Path, state: str, reason: str, failed: bool, text: str
) -> None:
    told = ask(monkeypatch, array, [Element("7_1", array.name, 1, state, reason)])
    assert told is not None and told[0] == failed and told[1].startswith(text)


@pytest.mark.parametrize(
    ("end", "log", "begun", "expected"),
    [
        (
            End("FAILED", "JobLaunchFailure", "0:53"),
            "",
            False,
            (True, "job 7_1 never began: Slurm could not start its"),
        ),
        (End("BOOT_FAIL", "NodeDown", "0:0"), "", False, (True, "job 7_1 never began: its node failed (NodeDown)")),
        (End("FAILED", "NonZeroExitCode", "127:0"), "x\nno python\n", False, (True, "job 7_1 ended before its work")),
        (None, "no python\n", False, (True, "job 7_1 ended before its work began: no python")),
        (None, "", False, (False, "job 7_1 left the queue before it began; the same launch submits it again")),
        (End("CANCELLED", "None", "0:0"), "", False, (False, "job 7_1 was cancelled before it trained this run")),
        (
            End("CANCELLED", "DependencyNeverSatisfied", "0:0"),
            "",
            False,
            (False, "job 7_1 was cancelled before it trained this run: the job that makes its activations failed"),
        ),
        (End("OUT_OF_MEMORY", "OutOfMemory", "0:125"), "x\n", True, (False, "job 7_1 ended as OUT_OF_MEMORY: it used")),
        (End("COMPLETED", "None", "0:0"), "x\n", True, None),  # its own record says how it stopped
    ],
)
def test_a_job_that_has_left_the_queue(
    monkeypatch: pytest.MonkeyPatch,
    array: Path,
    end: End | None,
    log: str,
    begun: bool,
    expected: tuple[bool, str] | None,
) -> None:
    if log:
        (array / "log" / "7_1.out").write_text(log)
    (array / "log" / "7_0.out").write_text("of the other element\n")
    told = ask(monkeypatch, array, ends={} if end is None else {1: end}, begun=begun)
    if expected is None:
        assert told is None
    else:
        assert told is not None and told[0] == expected[0] and told[1].startswith(expected[1])
        assert "other element" not in told[1] and (not log or begun or log.split()[-1] in told[1])


def test_the_newest_job_counts(monkeypatch: pytest.MonkeyPatch, array: Path) -> None:
    newer = array.with_name("a-cells-1")  # its name sorts before the older one
    (newer / "log").mkdir(parents=True)
    write_json_atomic(newer / "runs.json", [[RUN]])
    write_json_atomic(newer / "submitted.json", {"job_id": "9", "jobs": 1, "time": "2026-11-26T11:00:00+00:00"})
    told = ask(monkeypatch, array, [Element("9_0", newer.name, 0, "PENDING", "Priority")])
    assert told == (False, "job 9_0 waits: jobs of higher priority come first (Priority)")


@pytest.mark.parametrize("error", [UserError("no Slurm"), client.SlurmError("no answer")])
def test_without_an_answer_nothing_is_said(monkeypatch: pytest.MonkeyPatch, array: Path, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(client, "elements", refuse)
    assert explain(array.parents[1], {RUN: False}) == {}


@pytest.mark.parametrize(
    ("state", "told"), [("FAILED", ["s-harvest-0: job 8_0 never began: "]), ("COMPLETED", []), ("PENDING", [])]
)
def test_a_harvest_that_never_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, array: Path, state: str, told: list[str]
) -> None:
    harvest = array.with_name("s-harvest-0")
    (harvest / "log").mkdir(parents=True)
    (harvest / "config.yaml").touch()
    write_json_atomic(harvest / "runs.json", [[]])
    write_json_atomic(harvest / "submitted.json", {"job_id": "8", "jobs": 1, "time": "2026-11-26T09:00:00+00:00"})
    monkeypatch.setattr(client, "ends", lambda *_: {0: End(state, "JobLaunchFailure", "0:53")})
    lines = harvests_that_never_began(tmp_path)
    assert len(lines) == len(told) and all(line.startswith(start) for line, start in zip(lines, told, strict=True))
    (harvest / "attempts" / "1").mkdir(parents=True)  # it has worked, and its own record says how it went
    assert harvests_that_never_began(tmp_path) == []


LINE = (
    "JobId=9 ArrayJobId=7 ArrayTaskId=1 JobName=p JobState=RUNNING Reason=x UserId=me(1) Nice=0 JobState=FAILED "
    "Reason=JobLaunchFailure Dependency=(null) Requeue=1 ExitCode=0:53 RunTime=00:00:00 StdOut=/x JobState=y \n"
    "JobId=7 ArrayJobId=7 ArrayTaskId=2-3,5 JobName=p UserId=me(1) JobState=CANCELLED Reason=None "
    "Dependency=(null) ExitCode=0:0 RunTime=00:00:00 \n"
)


def test_slurms_own_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the controller; once it has forgotten the job, of its data base."""
    monkeypatch.setattr(client, "call", lambda *_, **__: LINE)
    cancelled = dict.fromkeys((2, 3, 5), End("CANCELLED", "None", "0:0"))
    assert client.ends("7") == {1: End("FAILED", "JobLaunchFailure", "0:53"), **cancelled}

    def forgotten(command: str, *_: str, **__: float) -> str:
        if command == "scontrol":
            raise client.SlurmError("Invalid job id specified")
        return "7_1|CANCELLED by 1000|None|0:0\n7_[2-5]|PENDING|Priority|0:0\n"

    monkeypatch.setattr(client, "call", forgotten)
    assert client.ends("7") == {1: End("CANCELLED", "None", "0:0")}
