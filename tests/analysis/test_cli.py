"""The command line: contract of `fit.json`, exit codes, one-line errors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from analysis.cli import main
from tests.analysis.generate import GPT4, grid_frame, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "quick")


@pytest.fixture
def csv(tmp_path):
    frame = grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), 0.005)
    path = tmp_path / "table.csv"
    frame.rename(columns={"n_latents": "width", "k": "active", "fvu": "nmse"}).to_csv(path, index=False)
    return path


def test_fit_of_a_sweep(sweep, tmp_path, capsys):
    out = tmp_path / "fit.json"
    assert main(["fit", str(sweep), "--law", "sae_nk", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert list(content["params"]) == ["alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"]
    assert {"law", "params", "cov", "rss_log", "notes", "status"} <= set(content)
    printed = capsys.readouterr().out
    assert "left out: 3 run(s)" in printed and "gamma" in printed


def test_fit_of_a_table_with_named_columns(csv, tmp_path):
    out = tmp_path / "fit.json"
    line = ["fit", str(csv), "--law", "sae_nk", "--n", "width", "--k", "active", "--loss", "nmse", "--out", str(out)]
    assert main(line) == 0
    params = json.loads(out.read_text())["params"]
    for name, truth in GPT4.items():
        assert params[name]["lo"] - 0.5 < truth < params[name]["hi"] + 0.5


def test_no_fit_possible_is_exit_1_with_the_reason(csv, tmp_path, capsys):
    out = tmp_path / "fit.json"
    line = [
        "fit",
        str(csv),
        "--n",
        "width",
        "--k",
        "active",
        "--loss",
        "nmse",
        "--where",
        "active=32",
        "--out",
        str(out),
    ]
    assert main(line) == 1
    assert "needs at least 2 values of active" in capsys.readouterr().err
    content = json.loads(out.read_text())
    assert content["status"] == "failed" and content["params"] == {} and content["notes"]


WRONG = {
    "unknown law": ["--law", "sea_nk"],
    "unknown column": ["--n", "breadth"],
    "condition": ["--where", "active"],
    "drop too many": ["--drop-largest-loss", "1000"],
    "level": ["--level", "3"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_exit_2_in_one_line(name, csv, capsys):
    line = ["fit", str(csv), "--n", "width", "--k", "active", "--loss", "nmse", *WRONG[name]]
    assert main(line) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_wrong_option_and_missing_source(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["fit", "x.csv", "--lwa", "power"])
    assert end.value.code == 2
    assert main(["fit", str(tmp_path / "none.csv")]) == 2
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_report_prints_table_and_path(sweep, capsys):
    assert main(["report", str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("report.html") and "topk" in printed


def test_importing_needs_no_torch():
    code = "import sys, analysis, analysis.report; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_module_runs(csv):
    line = [sys.executable, "-m", "analysis", "fit", str(csv), "--n", "width", "--k", "active", "--loss", "nmse"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "status: ok" in done.stdout
