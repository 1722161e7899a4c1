"""Qualities are columns like any other: a law of KL is fitted like one of fvu."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from analysis.cli import main
from analysis.runs.load import load
from harness.record.quality import Value, quality_path, write_quality


@pytest.fixture
def sweep(topk_run: Path, tmp_path: Path) -> Path:
    """A grid of runs with a known law of KL: 2·n^−0.5·k^−0.3."""
    result = json.loads((topk_run / "result.json").read_text())
    for n in (256, 512, 1024, 2048):
        for k in (8, 16, 32):
            run = tmp_path / "t" / f"n{n}k{k}"
            run.mkdir(parents=True)
            run.joinpath("result.json").write_text(json.dumps(result | {"run_id": run.name, "n_latents": n, "k": k}))
            kl = 2 * n**-0.5 * k**-0.3 * (1 + 0.01 * ((n + 3 * k) % 7 - 3))
            about = {"metric": "downstream", "version": 1, "settings": {}, "weights": "", "tokens": 10}
            values = {"kl": Value(kl, 0.01 * kl), "delta_ce": Value(kl - 0.01)}
            write_quality(run, about, values, {}, {"document": np.arange(2)}, {})
    shutil.copytree(topk_run, tmp_path / "t" / topk_run.name)  # not evaluated
    return tmp_path / "t"


def test_columns(sweep: Path) -> None:
    table = load(sweep, {"loss": "quality.downstream.kl"})
    assert table.roles["loss_se"] == "quality.downstream.kl_se" and len(table) == 12
    assert len(table.excluded) == 1  # the run without a value
    row = table.frame[table.frame["run_id"] == "n256k8"].iloc[0]
    assert row["quality.downstream.kl"] == pytest.approx(2 * 256**-0.5 * 8**-0.3, rel=0.05)
    assert len(load(sweep)) > 0  # fvu is still the loss where none is named


def test_a_law_of_kl(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fit.json"
    arguments = ["fit", str(sweep), "--law", "sae_nk_no_interaction", "--loss", "quality.downstream.kl"]
    assert main([*arguments, "--starts", "8", "--out", str(out)]) in (0, 1)
    text = "".join(capsys.readouterr())
    assert "quality.downstream.kl" in text


def test_delta_ce_is_refused_by_name(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(sweep), "--loss", "quality.downstream.delta_ce"]) == 2
    assert "use quality.downstream.kl" in capsys.readouterr().err


def test_a_damaged_file_is_named(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quality_path(sweep / "n256k8", "downstream")
    path.write_text(path.read_text().replace('"tokens": 10', '"tokens": 11'))
    assert main(["fit", str(sweep), "--loss", "quality.downstream.kl"]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_the_report_shows_it(sweep: Path) -> None:
    assert main(["report", str(sweep)]) == 0
    page = (sweep / "report.html").read_text()
    assert "Quality of the features" in page and "KL against width" in page and "topk: KL = " in page
