"""The papers' figures and claims, made again from the tables that are kept beside the document."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.figures import gao2024, gao2024_claims, switch2024, switch2024_claims
from analysis.figures.claims import (
    Claim,
    Estimate,
    Verdict,
    claims_table,
    difference,
    direction,
    equals,
    mean_of,
    put,
    slope,
    steps,
)
from analysis.figures.drawn import Drawn, gallery
from analysis.figures.tables import read_studies, write_studies
from harness.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
QUICK = Path(__file__).parent / "data" / "recorded_quick"
CLAIMS = {"gao2024": gao2024_claims.claims, "switch2024": switch2024_claims.claims}
FIGURES = {"gao2024": gao2024.figures, "switch2024": switch2024.figures}


@pytest.fixture(scope="module", params=CLAIMS)
def made(request: pytest.FixtureRequest) -> tuple[str, str, list[Drawn]]:
    """A paper, its table of claims and its figures, from the tables that are kept."""
    studies = read_studies([DOCS / "reproduction" / request.param])
    return request.param, claims_table(CLAIMS[request.param](studies)), FIGURES[request.param](studies)


def test_the_document_says_what_the_tables_say(made: tuple[str, str, list[Drawn]]) -> None:
    paper, table, figures = made
    document = (DOCS / "reproduction.md").read_text()
    text = f"{table}\n\n{gallery(figures, f'reproduction/{paper}')}"
    assert put(text, paper, document, "reproduction.md") == document
    verdicts = [line.split("|")[3].strip(" *") for line in table.splitlines()[4:]]
    assert verdicts == sorted(verdicts, key=[v.value for v in Verdict].index), "contradicted claims come first"


def test_every_figure_is_drawn(made: tuple[str, str, list[Drawn]]) -> None:
    paper, _, figures = made
    assert {figure.name for figure in figures} == {p.stem for p in (DOCS / "reproduction" / paper).glob("*.svg")}
    for figure in figures:
        assert len(figure.data) > 1 and figure.picture.axes and figure.caption.startswith("Figure"), figure.name


@pytest.mark.slow
def test_the_command_makes_tables_figures_and_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- claims of switch2024: begin -->\nWHAT WAS THERE\n<!-- claims of switch2024: end -->\nafter\n"
    )
    source = DOCS / "reproduction/switch2024"
    assert main(["figures", "switch2024", str(source), "--out", str(out), "--doc", str(document)]) == 0
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "claims.md").read_text() == (source / "claims.md").read_text()
    for path in source.glob("*.csv"):
        assert (out / path.name).read_text() == path.read_text(), path
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "WHAT WAS THERE" not in text
    document.write_text("no block")
    assert main(["figures", "switch2024", str(source), "--out", str(out), "--doc", str(document)]) == 2
    assert main(["figures", "switch2024", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "add the lines <!-- claims of switch2024: begin -->" in error and "nowhere is no directory" in error


def test_tables_keep_what_the_claims_read(tmp_path: Path) -> None:
    sweep = read_studies([QUICK])["recorded_quick"]
    write_studies({"switch2024_orders": sweep}, tmp_path)
    again = read_studies([tmp_path])["switch2024_orders"]
    assert len(again.runs) == len(sweep.runs) > 20
    np.testing.assert_allclose(again.runs.values("loss"), sweep.runs.values("loss"), rtol=1e-8)
    text = claims_table(switch2024_claims.claims({"switch2024_orders": sweep}))
    assert text == claims_table(switch2024_claims.claims({"switch2024_orders": again}))
    (tmp_path / "switch2024_orders.curves.csv").unlink()
    with pytest.raises(UserError, match="write them again from the runs"):
        read_studies([tmp_path])


def test_without_runs_nothing_is_claimed() -> None:
    for claims in CLAIMS.values():
        found = claims({})
        told = [claim.statement for claim in found if claim.verdict is not Verdict.CANNOT]
        assert all(claim.why for claim in found) and told in ([], ["no gain in wall-clock time from experts"])


ABOVE, BELOW, ACROSS = Estimate(2, 1, 3), Estimate(-2, -3, -1), Estimate(0.5, -1, 2)
OPEN = Estimate(1, None, None)


def test_rules() -> None:
    assert [direction(e, 1) for e in (ABOVE, BELOW, ACROSS, OPEN)] == [
        Verdict.SHOWN,
        Verdict.CONTRADICTED,
        Verdict.CANNOT,
        Verdict.CANNOT,
    ]
    assert direction(ABOVE, -1) is Verdict.CONTRADICTED and direction(ABOVE, 1, of=2.5) is Verdict.CANNOT
    assert steps([ABOVE, ABOVE], 1) is Verdict.SHOWN and steps([ABOVE, ACROSS], 1) is Verdict.CANNOT
    assert steps([ABOVE, ACROSS, BELOW], 1) is Verdict.CONTRADICTED and steps([], 1) is Verdict.CANNOT
    assert equals(ABOVE, 2.5, 1) is Verdict.SHOWN and equals(ABOVE, 2.5, 0.9) is Verdict.CANNOT
    assert equals(ABOVE, 3.5, 9) is Verdict.CONTRADICTED
    assert equals(ACROSS, 1, 9) is Verdict.CANNOT and equals(OPEN, 1, 9) is Verdict.CANNOT


def test_contradicted_claims_come_first() -> None:
    claim = Claim("a | b", "1")
    claims = [claim.judged(verdict, "2", "here", "more") for verdict in reversed(Verdict)]
    lines = claims_table(claims).splitlines()
    assert lines[0] == "3 claims: 1 contradicted, 1 shown, 1 cannot be told here."
    assert [line.split("**")[1] for line in lines[4:]] == [verdict.value for verdict in Verdict]
    assert "a \\| b" in lines[4] and lines[6].endswith("| here; more |") and lines[4].endswith("| here |")


def test_estimates_hold_what_was_planted() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        cells = [(aux, init) for aux in (0, 1) for init in ("tied", "untied") for _ in range(3)]
        frame = pd.DataFrame(cells, columns=["aux", "init"])
        frame["dead"] = 10 - 4.0 * frame["aux"] + random.normal(size=len(frame))
        found = difference(frame, "dead", frame["aux"] == 1, frame["aux"] == 0, ["aux", "init"])
        assert found.low is not None and found.high is not None
        inside += found.low <= -4 <= found.high
    assert 52 <= inside <= 60
    n, k = (grid.ravel() for grid in np.meshgrid([256.0, 512, 1024], [8.0, 32]))
    frame = pd.DataFrame({"n": np.tile(n, 2), "k": np.tile(k, 2), "sae": ["a"] * 6 + ["b"] * 6})
    frame["kl"] = 3 * frame["n"] ** -0.5 * frame["k"] ** -0.2 * np.where(frame["sae"] == "a", 1.0, 1.3)
    found = slope(frame, "kl", "n", ["k", "sae"])
    assert math.isclose(found.value, -0.5, abs_tol=1e-9)
    assert slope(frame[:3], "kl", "n", ["k", "sae"]).low is None, "too few rows"
    assert mean_of([1.0]).low is None and mean_of([1.0, 3.0]).value == 2
