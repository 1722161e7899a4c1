"""The report: always written, self-contained, says what it knows and what it cannot know."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.report.cells import cell_text
from analysis.report.findings import gather, read_runs
from analysis.report.page import _excluded_rows, _lead, write_report
from harness.errors import UserError
from tests.analysis.generate import MINILM_LIKE, sae_nk, write_run, write_sweep
from tests.analysis.test_plan import degenerate_runs

RECORDED = Path(__file__).parent / "data" / "recorded_quick"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sweep = write_sweep(tmp_path_factory.mktemp("sweeps") / "quick")
    return write_report(sweep).read_text(encoding="utf-8")


def test_says_the_law_in_words(page):
    assert "<h1>Quick study — fixed tokens, not converged</h1>" in page
    assert re.search(r"Doubling n lowers the reducible loss by \d+\.\d % \[\d+\.\d, \d+\.\d\] at k = 8", page)
    assert re.search(r"At the same n and k, Switch has 2\d\.\d % higher fvu than TopK", page)


def test_holds_what_is_promised(page):
    for part in ("Left out", "diverged at step 200", "no space left", "Anchors", "PCA", "Cells", "Provenance", "Notes"):
        assert part in page
    for picture in ("Loss against width", "Loss against compute", "equal n", "equal FLOPs", "Dead latents"):
        assert picture in page
    assert page.count("topk-n256-k8-s0-generated") == 1


def test_is_self_contained(page):
    assert not re.search(r"(?:src|href)\s*=\s*(?![\"']?data:)", page)
    assert "http://" not in page and "https://" not in page and "@import" not in page


def _one_cell(path):
    write_run(path, sae="topk", n=256, k=8)


def _one_width(path):
    for k in (8, 16, 32):
        write_run(path, sae="topk", n=256, k=k, fvu=0.2 - 0.002 * k)


def _no_topk(path):
    for n in (512, 1024, 2048, 4096, 8192):
        write_run(path, sae="switch", n=n, k=8, experts=8, fvu=0.1 + 2 / n**0.5)


def _all_failed(path):
    for n in (256, 512):
        write_run(path, sae="topk", n=n, k=8, status="failed")


def _one_k(path):
    for n in (256, 512, 1024, 2048, 4096):
        write_run(path, sae="topk", n=n, k=8, fvu=0.1 + 2 / n**0.5)


def _no_metrics(path):
    _one_k(path)
    for file in path.glob("*/metrics.jsonl"):
        file.unlink()


def _no_dead_no_flops(path):
    for n in (256, 512, 1024, 2048, 4096):
        write_run(path, sae="topk", n=n, k=8, fvu=0.1 + 2 / n**0.5, dead=None, extra={"pca_fvu": None})


def _none_dead(path):
    write_run(path, sae="topk", n=256, k=8, dead=0.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_none_dead, "Dead latents"),
        (_one_cell, "No law can be fitted"),
        (_one_width, "needs at least 3 values of n_latents, found 1"),
        (_no_topk, "no TopK run"),
        (_all_failed, "No run of this sweep can be used: all 2 were left out"),
        (_one_k, "needs at least 2 values of k, found 1"),
        (_no_metrics, "Loss against compute"),
        (_no_dead_no_flops, "No PCA reference was recorded"),
    ],
)
def test_poor_sweeps_still_get_a_report(tmp_path, make, says):
    make(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert says in page
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"base64,[^\"]+", "", page))


def test_title_of_a_sweep_without_study(tmp_path):
    _one_k(tmp_path)
    assert f"<h1>Sweep {tmp_path.name} — not converged</h1>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_study_yaml_is_read(tmp_path):
    _one_k(tmp_path)
    (tmp_path / "study.yaml").write_text("title: Widths, converged\nquestion: how wide?\nlaw: power_floor\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h1>Widths, converged</h1>" in page and "how wide?" in page


def test_a_setting_of_switch_alone_makes_no_mixed_population(tmp_path):
    sweep = shutil.copytree(RECORDED, tmp_path / "quick")
    assert "mixed_population" not in write_report(sweep).read_text(encoding="utf-8")
    path = next(sweep.glob("switch-*/result.json"))
    result = json.loads(path.read_text())
    result["config"]["sae"]["balance_weight"] *= 2
    path.write_text(json.dumps(result))
    assert "the runs also differ in sae.balance_weight" in write_report(sweep).read_text(encoding="utf-8")


def test_names_from_files_are_escaped(tmp_path):
    _one_k(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"title": "<script>alert(1)</script>"}))
    assert "<script>" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_summary_table(tmp_path):
    write_sweep(tmp_path / "quick")
    text = cell_text(read_runs(tmp_path / "quick"))
    assert "left out: 1 × status diverged at step 200" in text
    assert text.splitlines()[0].split() == [
        "sae",
        "n",
        "k",
        "E",
        "seed",
        "tokens",
        "fvu",
        "±se",
        "l0",
        "dead",
        "%",
        "time",
    ]


def test_directory_without_runs(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        write_report(tmp_path / "none")


def test_forecasts_without_a_band_are_told(tmp_path):
    """The best floor of these runs is a huge power of k (see test_plan): no band at k = 64, and a note that says so."""
    pilot, more = degenerate_runs()
    for i, row in enumerate(pd.concat([pilot, more]).to_dict("records")):
        write_run(tmp_path, sae="topk", n=int(row["n_latents"]), k=int(row["k"]), seed=i, fvu=float(row["fvu"]))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "3 prediction(s) without a band" in page and "Forecasts" in page


def test_report_of_converged_runs(tmp_path):
    """The law is that of the converged runs; the others are listed, and tokens to convergence have a section."""
    sweep = tmp_path / "standard"
    for n in (256, 512, 1024, 2048, 4096):
        for k in (8, 16):
            fvu = float(sae_nk(n, k, MINILM_LIKE))
            tokens = int(3e4 * n**0.6)
            write_run(sweep, sae="topk", n=n, k=k, fvu=fvu * (1 + 0.002 * (n % 3)), tokens=tokens, converged=True)
    write_run(sweep, sae="topk", n=8192, k=8, fvu=0.3)
    page = write_report(sweep).read_text(encoding="utf-8")
    assert "<h1>Sweep standard — converged</h1>" in page
    assert "not converged, so not of the law at convergence" in page and "<h2>Tokens to convergence</h2>" in page
    assert re.search(r"k = 8: tokens to convergence go as n\^0\.6\b", page)


def test_rows_at_an_edge_that_do_not_belong_are_listed_as_left_out(tmp_path):
    sweep = write_sweep(
        tmp_path / "sweep", widths=(256, 512, 1024, 2048, 4096, 8192), experts=1, repeats=0, broken=False
    )
    for path in sweep.glob("topk-n256-*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"fvu": 1.1 * result["fvu"]}))
    findings = gather(sweep)
    assert findings.main.values("n").min() == 512 and findings.fits[0][1].points == len(findings.main) == 15
    assert [row["reason"][:7] for row in _excluded_rows(findings)] == ["n = 256"] * 3
    assert _lead(findings)[0] == "15 of 18 runs were fitted; 3 are listed under “Left out”."
