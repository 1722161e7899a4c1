"""Converged and fixed-token runs are never mixed silently; tokens to convergence grow as n^p."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import RunTable, fit, load
from analysis.cli import main
from analysis.notes import has
from analysis.questions.convergence import convergence_table, first_convergence, tokens_to_convergence
from analysis.runs.regime import one_regime
from harness.errors import UserError
from tests.analysis.generate import grid_frame, write_run

ROLES = {"n": "n_latents", "k": "k", "loss": "fvu", "converged": "converged", "d": "tokens"}
N, K = 2 ** np.arange(9, 18), 2 ** np.arange(3, 7)


def _mixed(converged_sizes=9, fixed_shift=1.3):
    """Every cell at a fixed number of tokens, and the smaller ones at convergence too, where they are lower."""
    fixed = grid_frame(N, K, 0.003).assign(converged=False, tokens=4e5)
    done = grid_frame(N[:converged_sizes], K, 0.003, seed=1).assign(converged=True)
    done["tokens"] = 7e4 * done["n_latents"] ** 0.6
    return pd.concat([fixed.assign(fvu=fixed["fvu"] * fixed_shift), done], ignore_index=True)


def test_converged_and_fixed_runs_are_fitted_apart():
    table = RunTable(_mixed(), dict(ROLES))
    at_convergence, fixed = fit(table, ci="wald"), fit(table, ci="wald", regime="fixed")
    assert at_convergence.points == fixed.points == len(table) // 2
    assert has(at_convergence.notes, "unconverged_run")
    at = {"n": [2.0**14], "k": [32.0]}
    assert fixed.value(at)[0] / at_convergence.value(at)[0] == pytest.approx(1.3, rel=0.01)


def test_all_mixes_the_regimes_with_a_note():
    result = fit(RunTable(_mixed(), dict(ROLES)), ci="wald", regime="all")
    assert result.points == len(_mixed())
    assert {"unconverged_run", "mixed_population"} <= {entry.code for entry in result.notes}


def test_too_few_converged_runs_leave_the_law_at_fixed_tokens():
    table = RunTable(_mixed(converged_sizes=2), dict(ROLES))
    result = fit(table, ci="wald")
    assert result.points == len(N) * len(K) and has(result.notes, "unconverged_run")
    assert not fit(table, ci="wald", regime="converged").points > 2 * len(K)


def test_one_kind_of_run_is_left_as_it_is():
    for flag in (True, False):
        frame = _mixed()
        table = RunTable(frame[frame["converged"] == flag], dict(ROLES))
        assert one_regime(table) is table
    plain = RunTable(_mixed().drop(columns="converged"), {k: v for k, v in ROLES.items() if k != "converged"})
    assert one_regime(plain) is plain
    with pytest.raises(UserError, match="has no run for regime='converged'"):
        one_regime(plain, "converged")


def test_runs_of_a_fixed_budget_stay_together_even_where_some_have_converged():
    frame = _mixed().query("not converged").assign(**{"train.until": "budget"})
    frame.loc[frame["n_latents"] == N[0], "converged"] = True
    table = RunTable(frame, dict(ROLES))
    assert len(one_regime(table)) == len(frame) and len(one_regime(table, "converged")) == len(K)


def test_a_law_in_compute_takes_all_runs():
    frame = _mixed().assign(flops=lambda f: f["n_latents"] * f["tokens"])
    table = RunTable(frame, {**ROLES, "x": "flops"})
    assert fit(table, "power_floor", ci="wald").points == len(frame)


def test_different_tokens_give_a_note():
    frame = _mixed().query("not converged").assign(tokens=lambda f: 1e5 * (1 + f["n_latents"] % 3))
    notes = fit(RunTable(frame, dict(ROLES)), ci="wald").notes
    assert any("no law at fixed tokens" in entry.message for entry in notes)
    assert not any(
        "no law at" in e.message for e in fit(RunTable(frame.assign(tokens=1e5), dict(ROLES)), ci="wald").notes
    )


@pytest.fixture(scope="module")
def converging(tmp_path_factory):
    """Runs with until=convergence whose curves reach their own rule at D = 3e4·n^0.6; the widest hits its cap."""
    path = tmp_path_factory.mktemp("sweeps") / "standard"
    rng = np.random.default_rng(0)
    for n in (256, 512, 1024, 2048, 4096, 8192):
        for seed in (0, 1):
            tokens = 3e4 * n**0.6 * np.exp(0.03 * rng.standard_normal())
            cap = 5e6
            run = write_run(
                path, sae="topk", n=n, k=16, seed=seed, tokens=int(min(tokens, cap)), converged=bool(tokens < cap)
            )
            content = json.loads((run / "result.json").read_text())
            content["config"]["train"] |= {"until": "convergence", "convergence_epsilon": 0.01, "warmup_tokens": 1000}
            (run / "result.json").write_text(json.dumps(content))
            d = np.geomspace(2e3, content["tokens"], 60)
            loss = 0.1 + 0.05 * (d / (3e4 * n**0.6)) ** -1.0
            lines = [
                {"tokens": int(a), "flops": a * n, "fvu": b, "eval_rows": 8192} for a, b in zip(d, loss, strict=True)
            ]
            lines[-1] |= {"fvu": 0.9 * lines[-1]["fvu"], "eval_rows": 65536}
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tokens_to_convergence_from_a_sweep(converging):
    convergence = tokens_to_convergence(load(converging))
    ((k, law),) = convergence.laws
    low, high = law.intervals["p"]
    assert low is not None and high is not None
    print(f"tokens to convergence: p = {law.values['p']:.3f} [{low:.3f}, {high:.3f}], true 0.6")
    assert k == 16 and low < 0.6 < high and high - low < 0.1
    assert len(convergence.table.excluded) == 2 and has(convergence.notes, "unconverged_run")
    assert "longer than it was trained" in convergence.table.excluded["reason"][0]


def test_tokens_to_another_epsilon_come_from_the_curves(converging):
    convergence = tokens_to_convergence(load(converging), epsilon=0.4)
    ((_, law),) = convergence.laws
    # 1 − L(D)/L(D/2) of 0.1 + 0.05/u at u = D/D0 is 0.05/u over 0.1 + 0.1/u: 0.4 at u = 0.25
    truth = 0.25 * 3e4
    assert law.points == 12 and law.values["p"] == pytest.approx(0.6, abs=1e-3)
    assert law.values["D0"] == pytest.approx(truth, rel=0.02)
    none = convergence_table(load(converging), epsilon=1e-6)
    assert len(none) == 0 and "never improved by less" in none.excluded["reason"][0]


def test_first_convergence_reads_a_curve():
    d = np.geomspace(1, 1024, 41)
    assert first_convergence(d, 0.1 + 0.1 / d, 0.01) == pytest.approx(98, rel=0.01)
    assert np.isnan(first_convergence(d, d**-0.3, 0.01)) and np.isnan(first_convergence(d[:0], d[:0], 0.01))
    assert first_convergence(d, np.full(41, 0.2), 0.01) == pytest.approx(2.0)
    assert first_convergence(d, np.full(41, 0.2), 0.01, warmup=100) >= 200


def test_the_command_fits_tokens_of_a_sweep(converging, capsys):
    """The derived loss is named, or follows from the old name of the law."""
    printed = []
    for options in (["--law", "monomial", "--loss", "tokens_to_convergence"], ["--law", "tokens_to_convergence"]):
        assert main(["fit", str(converging), *options]) == 0
        printed.append(capsys.readouterr().out)
    assert "monomial: y = D0·n^p" in printed[0] and "2 × not converged" in printed[0] and printed[0] == printed[1]
    assert main(["fit", str(converging), "--law", "power_floor", "--x", "n_latents", "--regime", "fixed"]) == 1
    assert "too_few_levels" in capsys.readouterr().err
