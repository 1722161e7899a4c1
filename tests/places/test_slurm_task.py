"""What a job script makes of the state of its own job."""

from __future__ import annotations

import time

import pytest

from harness.places.slurm import client, task


@pytest.mark.parametrize(
    ("text", "minutes_left", "state"),
    [
        ("JobState=RUNNING PreemptTime=None Restarts=0", 60, "RUNNING"),
        ("JobState=CANCELLED PreemptTime=None Restarts=0", 60, "CANCELLED"),
        ("JobState=COMPLETING PreemptTime=None Restarts=0", 60, "CANCELLED"),
        ("JobState=COMPLETING PreemptTime=None Restarts=0", 1, "COMPLETING"),  # the time limit
        ("JobState=COMPLETING PreemptTime=2026-11-26T09:00:00 Restarts=0", 60, "COMPLETING"),
        ("JobState=COMPLETING PreemptTime=None Restarts=1", 60, "PENDING"),  # Slurm has requeued it
    ],
)
def test_a_job_that_is_completing_was_cancelled_unless_slurm_says_why(
    text: str, minutes_left: float, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "call", lambda *command: f"JobId=7 {text} EndTime=2026-11-26T12:00:00")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv(task.END_TIME, str(time.time() + 60 * minutes_left))
    assert task.own_state() == state
