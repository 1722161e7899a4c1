"""What a launch hands to `sbatch`; what a real Slurm makes of it is in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.launch import main
from harness.places.slurm import client
from tests.tiny import TINY

GRID = ("sae.k=1,2,4,8,16", "cluster=slurm", "cluster.gpus_per_task=0", "cluster.pack=1")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The flags of each submission, to a Slurm whose arrays have at most two elements; job ids count from 1."""
    flags: list[tuple[str, ...]] = []

    def submit(script: str, *given: str) -> str:
        flags.append(given)
        return str(len(flags))

    monkeypatch.setattr(client, "elements", lambda *_: [])
    monkeypatch.setattr(client, "max_array_size", lambda: 2)
    monkeypatch.setattr(client, "submit", submit)
    return flags


def test_a_limit_of_running_jobs_holds_for_all_arrays_of_a_launch(
    submitted: list[tuple[str, ...]], tmp_path: Path
) -> None:
    assert main([*TINY, *GRID, f"out={tmp_path}", "cluster.max_running=2"]) == 0
    assert [given[:1] for given in submitted] == [(), ("--dependency=afterany:1",), ("--dependency=afterany:2",)]
    for script in tmp_path.glob("t/_slurm/*/job.sh"):
        assert "%2\n" in next(line + "\n" for line in script.read_text().splitlines() if "--array" in line)


def test_without_a_limit_arrays_do_not_wait(submitted: list[tuple[str, ...]], tmp_path: Path) -> None:
    assert main([*TINY, *GRID, f"out={tmp_path}"]) == 0
    assert submitted == [(), (), ()]


def test_defaults_for_sbatch_are_named(
    submitted: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    assert main([*TINY, *GRID[1:], f"out={tmp_path}"]) == 0
    assert "SBATCH_TIMELIMIT do not count here; what a job asks for is set by cluster.*=…" in capsys.readouterr().err


def test_a_path_that_slurm_would_read_in_another_way_leaves_nothing(
    submitted: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a\\b"
    assert main([*TINY, *GRID[1:], f"out='{out}'"]) == 2
    assert "has a backslash" in capsys.readouterr().err
    assert submitted == [] and not list(out.glob("t/_slurm/*/job.sh"))
