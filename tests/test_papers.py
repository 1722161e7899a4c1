"""`make reproduce`: which studies belong to a paper, in which order, and what ends it."""

from pathlib import Path

import pytest

from harness.errors import INTERRUPTED
from harness.grid.study import load_study
from harness.sweep.request import Request, requested_cells
from sweeps.__main__ import main
from sweeps.papers import STUDIES, reproduce

SMALL = sorted({name for (_, scale), names in STUDIES.items() if scale == "cores" for name in names})


def test_every_study_of_a_paper_stands_in_the_list() -> None:
    folder = Path(__file__).parents[1] / "sweeps" / "reproduce"
    assert {f"reproduce/{path.stem}" for path in folder.glob("*.yaml")} == {
        name for name in SMALL if name.startswith("reproduce/")
    }


@pytest.mark.parametrize("name", SMALL)
def test_its_cells_are_valid(name: str) -> None:
    study = load_study(name)
    cells = requested_cells(Request([], study))
    assert 4 <= len(cells) <= 100 and study.question.endswith("?")


def test_studies_run_in_order_and_figures_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def run(study: str) -> int:
        ran.append(study)
        return 1 if "router" in study else 0

    assert reproduce("switch2024", "cores", tmp_path, run, trains_here=False) == 1
    assert tuple(ran) == STUDIES["switch2024", "cores"]
    assert "analysis figures switch2024" in capsys.readouterr().err
    ran.clear()
    assert (
        reproduce("switch2024", "cores", tmp_path, lambda study: ran.append(study) or INTERRUPTED, True) == INTERRUPTED
    )
    assert len(ran) == 1


def test_wrong_requests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reproduce", "gao2025"]) == 2
    assert main(["--reproduce", "gao2024", "--scale", "big"]) == 2
    assert main(["--reproduce", "gao2024", "--study", "quick"]) == 2
    error = capsys.readouterr().err
    assert "papers: gao2024, switch2024" in error and "leave out --study" in error
