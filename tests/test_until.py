"""`python -m sweeps --until …`: rounds are recorded, trained, taken down and gone on with. Decisions are scripted here:
`tests/analysis/test_rounds.py` tests them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sweeps.__main__
import sweeps.until
from analysis.questions.rounds import Decision, Verdict
from harness.process.claim import claim
from harness.record.sweepdir import read_rounds, write_rounds
from sweeps.__main__ import main
from sweeps.until import parse_budget, parse_goal
from tests.tiny import TINY

SMALL = [text for text in TINY if text.split("=")[0] not in ("activations", "sae.n_latents", "sae.k", "sweep")]
FORECAST = (0.5, 0.45, 0.55)
END = Decision(Verdict.REACHED, "the goal was ± 50 %", FORECAST)


def cells(*rows: tuple[int, int, int]) -> Decision:
    """A round of cells (n, k, repeats)."""
    frame = pd.DataFrame([(*row, 1e6) for row in rows], columns=["n", "k", "seeds", "flops"])
    return Decision(Verdict.TRAIN, "", FORECAST, 0.1, frame)


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """What is decided after each training, in order."""
    scripted: list[Decision] = []
    answers: Iterator[Decision] = iter(scripted)
    monkeypatch.setattr(sweeps.until, "decide", lambda *_: next(answers))
    monkeypatch.setattr(sweeps.__main__, "report", lambda _: None)  # it takes longer than the runs
    return scripted


def until(out: Path, *arguments: str, goal: str = "forecast n=512 k=4 within 50%", budget: str = "1e15") -> int:
    study = ["--activations", "synthetic", "--arch", "topk", "--width", "16,32,64", "--k", "1,2,4", "--out", str(out)]
    return main([*study, *SMALL, "--until", goal, "--budget", budget, *arguments])


def rounds(out: Path) -> dict[str, Any]:
    return read_rounds(out / "quick")


@pytest.mark.slow
def test_rounds_are_recorded_with_what_was_predicted_and_what_came(
    tmp_path: Path, decisions: list[Decision], capsys: pytest.CaptureFixture[str]
) -> None:
    decisions += [cells((128, 2, 1), (16, 1, 2)), cells((128, 2, 1)), END]
    assert until(tmp_path) == 0
    record = rounds(tmp_path)
    planned = [[(run["n"], run["k"], run["seed"]) for run in entry["runs"]] for entry in record["rounds"]]
    seeds = {(n, k): seed for n, k, seed in planned[0]}
    assert planned[0][0] == (128, 2, 0) and planned[1] == [(128, 2, 1)], "repeats get seeds that were not taken"
    assert len(planned[0]) == 3 and seeds[16, 1] == max(seed for n, _, seed in planned[0] if n == 16)
    for entry in record["rounds"]:
        assert entry["ended"] and entry["spent"] > 0 and entry["forecast"]["value"] == FORECAST[0]
        for run in entry["runs"]:
            result = json.loads((tmp_path / "quick" / run["run"] / "result.json").read_text())
            assert run["came"] == pytest.approx(result["fvu"]) and result["seed"] == run["seed"]
            assert run["predicted"]["lo"] < run["predicted"]["value"] < run["predicted"]["hi"]
    assert record["end"]["verdict"] == "reached"
    said = capsys.readouterr().err
    assert "round 1: forecast 0.5 [0.45, 0.55]" in said and "of 3 runs came inside" in said
    assert "reached: forecast 0.5" in said


def test_a_chase_goes_on_where_it_stopped(tmp_path: Path, decisions: list[Decision]) -> None:
    decisions += [cells((128, 2, 1)), END, END]
    assert until(tmp_path) == 0
    record = rounds(tmp_path)
    (run,) = record["rounds"][0]["runs"]
    (tmp_path / "quick" / run["run"]).rename(tmp_path / "aside")  # as if it was killed in its first round
    came, run["came"], record["rounds"][0]["ended"], record["end"] = run["came"], None, False, None
    write_rounds(tmp_path / "quick", record)
    assert until(tmp_path) == 0
    again = rounds(tmp_path)
    assert [entry["runs"][0]["came"] for entry in again["rounds"]] == [came]
    assert again["rounds"][0]["ended"] and again["end"]["verdict"] == "reached"


@pytest.mark.slow
def test_rounds_without_a_result_end_the_chase(
    tmp_path: Path, decisions: list[Decision], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions += [cells((128, 2, 1))]
    monkeypatch.setattr(sweeps.until, "_take_down", lambda record, *_: record["rounds"] and None)
    assert until(tmp_path) == 1
    assert "none of the runs of round 1 gave a result" in capsys.readouterr().err
    assert rounds(tmp_path)["end"]["verdict"] == "unsupported"


def test_two_chases_of_one_sweep_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quick").mkdir()
    with claim(tmp_path / "quick/rounds.lock"):
        assert until(tmp_path) == 2
    assert "another process chases a forecast in this sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "budget", "said"),
    [
        ("n=512 k=4", "1e15", "is not of the form"),
        ("forecast n=512 within 3%", "1e15", "must name n and k"),
        ("forecast n=512 k=4 within 0%", "1e15", "must be a positive number"),
        ("forecast n=512 k=4 within 300%", "1e15", "choose less than 100 %"),
        ("forecast n=512 k=4 within 3%", "lots", "must be a positive number, not 'lots'"),
        ("forecast n=512 k=4 within 3%", "", "go together"),
        ("", "1e15", "go together"),
        ("forecast n=512 k=4 within 3%", "1e3", "the first grid takes"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    goal: str, budget: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert until(tmp_path, goal=goal, budget=budget) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert said in line
    assert not (tmp_path / "quick").exists()


def test_one_architecture_is_chased(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert until(tmp_path, "--arch", "topk,switch") == 2
    assert "of one architecture in one sweep" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert until(tmp_path, "--dry-run") == 0
    assert "then rounds of further cells until forecast n=512 k=4 within 50%" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_goals_and_budgets() -> None:
    goal = parse_goal("forecast n=2**17 k=64 within 3%")
    assert (goal.n, goal.k, goal.within) == (131072, 64, pytest.approx(0.03))
    assert parse_goal(str(goal)) == goal and parse_budget("1e17") == 1e17


def test_a_grid_that_carries_no_law_is_not_chased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps.__main__, "report", lambda _: None)
    assert until(tmp_path, "--width", "16,32", "--k", "1,2") == 1
    assert "the fit has status failed" in capsys.readouterr().err
    assert rounds(tmp_path)["end"]["verdict"] == "unsupported"
