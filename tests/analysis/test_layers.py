"""Exponents per hook and their relation to dimensions, both planted."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.questions.layers import layer_laws, rank_correlation, suite
from analysis.runs.table import RunTable
from harness.errors import UserError
from tests.analysis.generate import write_run

EXPONENTS = {0: 0.45, 1: 0.30, 2: 0.20, 3: 0.15, 4: 0.12, 5: 0.10}


def table_of(noise: float = 0.0, layers: int = 6, sizes=(64, 128, 256, 512)) -> RunTable:
    """fvu ∝ n^−exponent with a two-NN dimension of 2/exponent, and a participation ratio that means nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for layer, exponent in list(EXPONENTS.items())[:layers]:
        for n in sizes:
            for seed in (0, 1):
                fvu = n**-exponent * np.exp(noise * rng.standard_normal())
                row = {"sae": "topk", "n_latents": n, "k": 8, "seed": seed, "fvu": fvu, "layer": layer}
                row |= {"quality.dimension.two_nn": 2 / exponent}
                rows.append(row | {"quality.dimension.participation_ratio": (7 * layer) % 5 + layer / 100})
    frame = pd.DataFrame(rows).assign(run_id=[f"r{i}" for i in range(len(rows))])
    return RunTable(frame, {"n": "n_latents", "k": "k", "loss": "fvu", "run": "run_id", "seed": "seed"})


def test_exponents_are_found_with_intervals_that_hold_them() -> None:
    laws = layer_laws(table_of(noise=0.01))
    assert [law.place for law in laws] == [f"layer={layer}" for layer in EXPONENTS]
    for law, exponent in zip(laws, EXPONENTS.values(), strict=True):
        low, high = law.interval
        assert low is not None and high is not None and high - low < 0.04
        assert abs(law.exponent - exponent) < 0.02


def test_the_planted_relation_is_told_from_the_other() -> None:
    laws = layer_laws(table_of())
    falls, none = rank_correlation(laws, "two_nn"), rank_correlation(laws, "participation_ratio")
    assert falls is not None and none is not None
    assert falls[0] == pytest.approx(-1) and falls[1] < 0.01
    assert none[1] > 0.2


def test_too_little_is_said_so() -> None:
    assert rank_correlation(layer_laws(table_of(layers=3)), "two_nn") is None
    with pytest.raises(UserError, match="all runs are of one hook"):
        layer_laws(table_of(layers=1))
    with pytest.raises(UserError, match="no hook has 3 sizes"):
        layer_laws(table_of(sizes=(64, 128)))


def test_the_command_prints_both(tmp_path, capsys) -> None:
    path = tmp_path / "runs.csv"
    table_of(noise=0.01).frame.to_csv(path, index=False)
    assert main(["layers", str(path), "--n", "n_latents", "--k", "k", "--loss", "fvu"]) == 0
    printed = capsys.readouterr().out
    assert "layer=5" in printed and "rank correlation of the exponent with two_nn -1" in printed


def test_a_suite_has_a_row_per_hook_and_means_over_seeds(tmp_path, capsys) -> None:
    table = table_of(noise=0.1, layers=2, sizes=(64,))
    frame = table.frame.assign(hook=["mlp_out", "mlp_out", "resid_post", "resid_post"], l0=8.0)
    frame["quality.downstream.kl"] = [1.0, 3.0, 0.5, 0.7]
    found = suite(RunTable(frame, table.roles))
    assert found["layer"].tolist() == [0, 1] and found["quality.downstream.kl"].tolist() == [2.0, pytest.approx(0.6)]
    path = tmp_path / "runs.csv"
    frame.to_csv(path, index=False)
    assert main(["suite", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "resid_post" in printed and " kl" in printed


def test_a_suite_tells_what_it_leaves_out(tmp_path: Path, capsys) -> None:
    for layer, fvu in enumerate((0.2, 0.3, 1.4)):
        path = write_run(tmp_path / "s", sae="topk", n=64, k=8, seed=layer, fvu=fvu) / "result.json"
        result = json.loads(path.read_text())
        result["config"]["activations"]["layer"] = layer
        path.write_text(json.dumps(result))
    assert main(["suite", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    assert "left out: layer=2 (topk-n64-k8-s2-generated): fvu is 1.4, not below 1" in printed
