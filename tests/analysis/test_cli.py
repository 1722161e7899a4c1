"""The command line: contract of `fit.json`, exit codes, one-line errors."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
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


def test_a_fit_that_is_not_possible_lists_what_was_left_out(tmp_path, capsys):
    path = tmp_path / "t.csv"
    rows = [f'"{n:,}",{k},0.{n}' for n in (512, 768, 1024, 2048, 4096) for k in (8, 16)]
    path.write_text("\n".join(["n,k,loss", *rows]) + "\n")
    assert main(["fit", str(path)]) == 1
    errors = capsys.readouterr().err
    assert "left out: 6 run(s)" in errors and "2 × n is '1,024', not a positive number" in errors
    assert main(["compare", str(path), "--laws", "sae_nk,sae_nk_no_floor"]) == 1
    assert "no fit of sae_nk_no_floor" in capsys.readouterr().err


WRONG = {
    "unknown law": ["--law", "sea_nk"],
    "unknown column": ["--n", "breadth"],
    "condition": ["--where", "active"],
    "drop too many": ["--drop-largest-loss", "1000"],
    "drop fewer than none": ["--drop-largest-loss", "-1"],
    "negative delta": ["--robust", "huber", "--delta", "-1"],
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
    code = "import sys, analysis, analysis.report.page; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_module_runs(csv):
    line = [sys.executable, "-m", "analysis", "fit", str(csv), "--n", "width", "--k", "active", "--loss", "nmse"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "status: ok" in done.stdout


EXAMPLES = {
    "fit RUNS --law sae_nk --out OUT": (0, "status: ok"),
    "fit TABLE --law sae_nk --n n --k k --loss nmse --out OUT": (0, "status: ok"),
    "fit CHINCHILLA --law chinchilla --n N --d D --loss loss --robust huber --delta 1e-3 --drop-largest-loss 5": (
        0,
        "5 × one of the 5 largest losses",
    ),
    "fit TABLE --law power_floor --x n --loss nmse --where k=32": (0, "E + A·x^−a"),
    "fit TABLE --law power_floor --x flops --loss nmse --where k=32": (0, "E + A·x^−a"),
    "compare RUNS": (0, "sae_nk_no_floor"),
    'predict RUNS --at "n=2**15 k=32" --kind new_run': (0, "extrapolation"),
    'plan RUNS --target "n=2**15 k=64" --budget 1e18': (0, "after the planned runs"),
    "ask RUNS --fvu 0.2 --k 64": (0, "is predicted to reach 0.2"),
    "ask RUNS --fvu 0.001 --k 64": (0, "not reachable: floor at"),
    "ask TABLE --n n --k k --loss nmse --fvu 0.5 --at-k 64": (0, "is predicted to reach 0.5"),
    "report RUNS": (0, "report.html"),
    "fit TABLE --law sae_nk --n n --k k --loss nmse --where k=32": (1, "too_few_levels"),
    "ask RUNS --fvu 0.2 --k 64 --where k=8": (1, "too_few_levels"),
    "fit TABLE --law sae_nk --n width --k k --loss nmse": (2, "no column 'width'"),
    "ask RUNS --fvu -1 --k 64": (2, "must be positive"),
    "plan RUNS --target n=2**20 --budget 1e18": (2, "must name n and k"),
    "report NOWHERE": (2, "is not a directory"),
}
"""The command lines of the documentation, as they are typed."""


@pytest.fixture(scope="module")
def places(sweep, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables")
    frame = grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), 0.005).assign(
        flops=lambda f: 6e9 * f["n_latents"]
    )
    frame.rename(columns={"n_latents": "n", "fvu": "nmse"}).to_csv(path / "table.csv", index=False)
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1e10), 245)), np.exp(rng.uniform(np.log(1e9), np.log(3e11), 245))
    loss = (1.82 + 482 * n**-0.348 + 2085 * d**-0.366) * np.exp(0.003 * rng.standard_t(3, 245))
    pd.DataFrame({"N": n, "D": d, "loss": loss}).to_csv(path / "chinchilla.csv", index=False)
    return {"RUNS": sweep, "TABLE": path / "table.csv", "CHINCHILLA": path / "chinchilla.csv", "NOWHERE": path / "x"}


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_as_they_are_typed(line, places, tmp_path, capsys):
    code, says = EXAMPLES[line]
    words = [str(places.get(word, tmp_path / "fit.json" if word == "OUT" else word)) for word in shlex.split(line)]
    assert main(words) == code
    out, err = capsys.readouterr()
    assert says in out + err and (code != 2 or len(err.strip().splitlines()) == 1)


def test_every_left_out_run_is_in_the_file_with_its_reason(sweep, tmp_path):
    out = tmp_path / "fit.json"
    assert main(["fit", str(sweep), "--out", str(out)]) == 0
    reasons = {entry["run"]: entry["reason"] for entry in json.loads(out.read_text())["excluded"]}
    assert reasons["topk-n4096-k32-s7-generated"] == "status diverged at step 200"
    assert sum("another architecture" in reason for reason in reasons.values()) == 12
