"""The planner and the question "what do I need", on synthetic truths."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis import RunTable, fit, load
from analysis.cli import main
from analysis.questions.cost import cost_of, kind_of
from analysis.questions.need import need
from analysis.questions.plan import Plan, plan
from harness.errors import UserError
from tests.analysis.generate import GPT4, MINILM_LIKE, grid_frame, sae_nk, write_sweep

ROLES = {"n": "n_latents", "k": "k", "loss": "fvu"}
TARGET = {"n": 2.0**17, "k": 64.0}
N, K = 2.0 ** np.arange(9, 16), np.array([8.0, 16.0, 32.0, 64.0])


def _cost(n, k):
    return 1e6 * (6 * 768 * n + 8 * 768 * k)


CAP = _cost(2.0**15, 64.0)
NOISE = 0.01


def _runs(cells, rng, truth):
    cells = np.array(cells, dtype=float)
    loss = sae_nk(cells[:, 0], cells[:, 1], truth) * np.exp(NOISE * rng.standard_normal(len(cells)))
    return pd.DataFrame({"n_latents": cells[:, 0], "k": cells[:, 1], "fvu": loss})


def _fit(frame, starts=16):
    return fit(RunTable(frame, dict(ROLES)), starts=starts, ci="wald", weights="none")


def _width(frame):
    band = _fit(frame).predict({name: np.array([value]) for name, value in TARGET.items()})
    return float(np.log(band["hi"] / band["lo"])[0])


def _even(budget):
    """Cells of an even log grid over the same domain, taken in rounds of the whole grid while the budget lasts."""
    cells, left = [], budget
    while True:
        bought = 0
        for n in N[::2]:
            for k in K:
                if _cost(n, k) <= min(left, CAP):
                    cells.append((n, k))
                    left -= _cost(n, k)
                    bought += 1
        if not bought:
            return cells


def _draw(seed):
    rng = np.random.default_rng(seed)
    truth = {name: value * rng.uniform(0.85, 1.15) for name, value in GPT4.items()}
    pilot = _runs([(n, k) for n in N[:5] for k in K[:3]], rng, truth)
    return rng, truth, pilot


BUDGET = 6 * CAP


@pytest.mark.slow
def test_planned_runs_beat_an_even_grid():
    ratios = []
    for seed in range(50):
        rng, truth, pilot = _draw(seed)
        further = plan(_fit(pilot), TARGET, BUDGET, _cost, list(N), list(K), CAP)
        assert further.flops <= BUDGET * (1 + 1e-12) and further.cells["n"].max() <= N.max()
        planned = [(row["n"], row["k"]) for _, row in further.cells.iterrows() for _ in range(int(row["seeds"]))]
        widths = [_width(pd.concat([pilot, _runs(cells, rng, truth)])) for cells in (_even(BUDGET), planned)]
        # A planned design without a band counts as no gain at all.
        ratios.append(widths[0] / widths[1] if np.isfinite(widths[1]) else 0.0)
    assert np.isfinite(ratios).all()
    print(f"interval after an even grid over interval after the plan: median {np.median(ratios):.2f} of 50 draws")
    assert np.median(ratios) >= 1.5


def test_plan_narrows_and_stays_in_budget():
    _, _, pilot = _draw(3)
    further = plan(_fit(pilot), TARGET, BUDGET, _cost, list(N), list(K), CAP)
    assert np.log(further.after[2] / further.after[1]) < np.log(further.before[2] / further.before[1])
    assert further.flops <= BUDGET and (further.cells["flops"] / further.cells["seeds"] <= CAP).all()
    study = yaml.safe_load(further.study("next", 1, ["activations=minilm"]))
    assert study["law"] == "sae_nk" and len(study["grids"]) == len(further.cells)
    assert isinstance(further, Plan)


def degenerate_runs():
    """(pilot, further runs) whose best floor is k^164."""
    rng, truth, pilot = _draw(22)
    _runs(_even(BUDGET), rng, truth)
    counts = {(512, 8): 4, (512, 32): 16, (512, 64): 35, (1024, 64): 1, (2048, 64): 1, (4096, 64): 9, (8192, 64): 15}
    cells = [cell for cell, seeds in counts.items() for _ in range(seeds)]
    return pilot, _runs(cells, rng, truth)


def test_a_degenerate_fit_gives_no_band_instead_of_one_of_width_zero():
    """The two coefficients of the floor cancel to a negative variance by rounding."""
    result = _fit(pd.concat(degenerate_runs()))
    band = result.predict({"n": [2.0**17, 2.0**10], "k": [64.0, 8.0]})
    assert np.isnan(band["lo"][0]) and np.isnan(band["hi"][0])
    assert band["lo"][1] < band["value"][1] < band["hi"][1]
    assert [entry.code for entry in result.band_notes(band)] == ["degenerate_design"]
    assert result.band_notes(band[1:]) == [] and result.status == "unreliable"


def test_a_plan_survives_an_estimate_without_a_floor():
    _, _, pilot = _draw(22)
    result = _fit(pilot)
    assert result.values["zeta"] < -100
    further = plan(result, TARGET, BUDGET, _cost, list(N), list(K), CAP)
    assert further.cells["n"].max() == N.max()
    assert np.log(further.after[2] / further.after[1]) < 0.2 * np.log(further.before[2] / further.before[1])


def test_plan_refuses_what_cannot_be_planned():
    _, _, pilot = _draw(3)
    with pytest.raises(UserError, match="no candidate costs at most"):
        plan(_fit(pilot), TARGET, 1.0, _cost, list(N), list(K))
    x = pd.DataFrame({"x": N, "y": 0.1 + N**-0.3})
    with pytest.raises(UserError, match="law in n and k"):
        plan(fit(RunTable(x, {"x": "x", "loss": "y"}), "power_floor"), TARGET, 1e30, _cost, list(N), list(K))


def test_need_finds_n_or_says_that_the_floor_is_above():
    frame = grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), 0.003)
    result = _fit(frame)
    loss = float(sae_nk(np.array([2.0**16]), np.array([64.0]))[0])
    answer = need(result, loss, k=64, cost=_cost)
    assert answer.n == pytest.approx(2**16, rel=0.15) and answer.flops is not None
    assert answer.n is not None and answer.lo is not None and answer.hi is not None
    assert answer.lo < answer.n < answer.hi
    floor = float(np.exp(GPT4["zeta"] + GPT4["eta"] * np.log(64)))
    below = need(result, 0.8 * floor, k=64)
    assert below.n is None and below.floor == pytest.approx(floor, rel=0.15)


def test_the_interval_of_n_is_where_the_edges_of_the_profile_band_reach_the_loss():
    frame = grid_frame(2 ** np.arange(8, 13), 2 ** np.arange(3, 6), 0.005, coefficients=MINILM_LIKE)
    result = fit(RunTable(frame, dict(ROLES)), starts=16)
    wanted = float(sae_nk(2.0**15, 16.0, MINILM_LIKE))
    answer = need(result, wanted, k=16.0)
    assert answer.lo is not None and answer.hi is not None
    band = result.forecast({"n": [answer.lo, answer.hi], "k": [16.0, 16.0]})
    assert [band["lo"][0], band["hi"][1]] == pytest.approx([wanted, wanted], rel=1e-5)
    wald = need(replace(result, ci="wald"), wanted, k=16.0)
    assert wald.hi is not None and wald.hi != pytest.approx(answer.hi, rel=0.01)


def test_a_loss_above_all_others_is_reached_by_every_n():
    answer = need(_fit(grid_frame(2 ** np.arange(11, 16), 2 ** np.arange(5, 8), 0.003)), 1e3, k=64.0, cost=_cost)
    assert answer.every and answer.n == 64.0


def test_cells_of_a_plan_are_of_the_architecture_of_the_runs():
    """Experts are no narrower per active latent than those of the runs, and one costs what a Switch SAE costs."""
    frame = pd.DataFrame({"n_latents": [256.0, 1024], "k": 8.0, "sae": "switch", "n_experts": 8.0, "d_model": 64})
    frame = frame.assign(**{"train.batch_tokens": 256, "tokens": 1e5, "sae.aux_alpha": 0.0, "fvu": 0.2})
    table = RunTable(frame, {"n": "n_latents", "k": "k", "experts": "n_experts", "loss": "fvu"})
    cost = cost_of(table)
    assert cost(512, 8) < 1e5 * 2 * 64 * 512  # less than the encoder of a TopK SAE of that size
    assert cost(256, 16) == cost(260, 8) == np.inf
    further = Plan(pd.DataFrame({"n": [512.0], "k": [8.0], "seeds": [1]}), (1, 1, 1), (1, 1, 1), 0.0)
    assert "ARCH=switch EXPERTS=8" in further.commands(Path("runs/a"), "quick", [], 1, kind_of(table))[0]
    grid = yaml.safe_load(further.study("next", 1, kind=kind_of(table)))["grids"][0]
    assert grid["overrides"][:2] == ["sae=switch", "sae.n_experts=8"]
    with pytest.raises(UserError, match=r"depends on n_experts, and these have 4\.0, 8\.0"):
        cost_of(RunTable(frame.assign(n_experts=[4.0, 8.0]), {"n": "n_latents", "k": "k", "loss": "fvu"}))


def test_costs_come_from_the_table_when_nothing_else_is_known():
    frame = grid_frame(N, K, 0.01).assign(flops=lambda f: 7.0 * f["n_latents"] ** 1.1)
    cost = cost_of(RunTable(frame, {**ROLES, "flops": "flops"}))
    assert cost(4096, 16) == pytest.approx(7.0 * 4096**1.1, rel=1e-6)


COMMANDS = {
    "predict": (["predict", "--at", "n=2**20 k=64"], 0, "extrapolation"),
    "predict badly": (["predict", "--at", "n=big"], 2, "is not NAME=NUMBER"),
    "predict without k": (["predict", "--at", "n=4096"], 2, "needs k="),
    "compare": (["compare"], 0, "sae_nk_no_floor"),
    "compare unknown": (["compare", "--laws", "sae_nk,magic"], 2, "'magic' is not known"),
    "plan": (["plan", "--target", "n=2**20 k=64", "--budget", "1e17", "--flops", "flops"], 0, "after the planned runs"),
    "plan for nothing": (["plan", "--target", "n=2**20 k=64", "--budget", "1", "--flops", "flops"], 2, "no candidate"),
    "plan without costs": (["plan", "--target", "n=2**20 k=64", "--budget", "1e17"], 2, "costs are unknown"),
    "plan half a target": (
        ["plan", "--target", "n=2**20", "--budget", "1e17", "--flops", "flops"],
        2,
        "must name n and k",
    ),
    "ask": (["ask", "--fvu", "0.4", "--at-k", "64"], 0, "is predicted to reach 0.4"),
    "ask below the floor": (["ask", "--fvu", "0.05", "--at-k", "64"], 0, "not reachable: floor at"),
    "ask between": (
        ["ask", "--fvu", "0.001", "--at-k", "64", "--where", "width<9000", "--where", "active>100"],
        0,
        "does not exclude 0.001",
    ),
    "predict far": (["predict", "--at", "n=2**23 k=64"], 2, "needs --far"),
    "predict far, asked for": (["predict", "--at", "n=2**23 k=64", "--far"], 0, "  far"),
    "predict says its status": (["predict", "--at", "n=2**20 k=64"], 0, "from sae_nk, status ok"),
    "predict says its notes": (["predict", "--at", "n=2**20 k=64"], 0, "level_at_budget"),
    "plan far": (["plan", "--target", "n=2**23 k=64", "--budget", "1e17", "--flops", "flops"], 2, "needs --far"),
    "plan predicts a width": (
        ["plan", "--target", "n=2**20 k=64", "--budget", "1e17", "--flops", "flops"],
        0,
        "predicted width of that interval: about ±",
    ),
    "plan says its status": (
        ["plan", "--target", "n=2**20 k=64", "--budget", "1e17", "--flops", "flops"],
        0,
        "from sae_nk, status ok",
    ),
    "ask says its status": (["ask", "--fvu", "0.4", "--at-k", "64"], 0, "from sae_nk, status ok"),
    "half a latent": (["predict", "--at", "n=2**20 k=0.5"], 2, "k = 0.5 is less than one active latent"),
    "ask half a latent": (["ask", "--fvu", "0.4", "--at-k", "0.5"], 2, "k = 0.5 is less than one active latent"),
    "k beyond n": (["predict", "--at", "n=64 k=128"], 2, "more than n = 64 latents"),
    "n beyond sense": (["predict", "--at", "n=1e15 k=64", "--far"], 2, "no number of latents"),
    "ask without a number": (["ask", "--fvu", "0.4", "--at-k", "nan"], 2, "k = nan is not"),
    "ask what all runs have": (["ask", "--fvu", "100", "--at-k", "64"], 0, "every n of the runs (from 2,048)"),
    "predict far below": (["predict", "--at", "n=128 k=64"], 2, "1/16 of the smallest of the runs"),
    "a seed below zero": (["ask", "--fvu", "0.4", "--at-k", "64", "--random-seed", "-1"], 2, "seed=-1 must not"),
    "ask without k": (["ask", "--fvu", "0.4"], 2, "--at-k"),
    "ask of too little": (["ask", "--fvu", "0.4", "--at-k", "64", "--where", "active=32"], 1, "too_few_levels"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, tmp_path, capsys):
    (command, *options), code, text = COMMANDS[name]
    frame = grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), 0.003)
    frame = frame.rename(columns={"n_latents": "width", "k": "active"})
    if "--flops" in options:
        frame["flops"] = frame["width"] * 1e9
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    got = main([command, str(path), "--n", "width", "--k", "active", "--loss", "fvu", "--starts", "16", *options])
    out, err = capsys.readouterr()
    assert got == code and text in out + err, out + err
    assert code != 2 or len(err.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_target_where_the_law_overflows_is_told(tmp_path, capsys):
    truth = {"alpha": -1.0, "beta_k": -0.3, "beta_n": -0.3, "gamma": 0.05, "zeta": -3.0, "eta": -0.2}
    path = tmp_path / "t.csv"
    grid_frame(2 ** np.arange(7, 13), 2 ** np.arange(2, 7), 0.001, coefficients=truth).assign(flops=1e9).to_csv(path)
    line = [str(path), "--n", "n_latents", "--loss", "fvu", "--flops", "flops", "--starts", "16"]
    assert main(["predict", *line, "--at", "n=2**300 k=2**200", "--far"]) == 2
    assert "is no number of latents" in capsys.readouterr().err
    with pytest.raises(UserError, match="no finite value at n="):
        fitted = fit(load(path, {"n": "n_latents", "loss": "fvu"}), starts=16)
        plan(fitted, {"n": 2.0**300, "k": 2.0**200}, 1e12, lambda n, k: 1.0, [128.0], [4.0])


def test_plan_of_a_sweep_prints_make_lines_that_go_into_it(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "my runs" / "quick")
    line = ["plan", str(sweep), "--target", "n=2**15 k=32", "--budget", "1e15", "--starts", "16"]
    assert main(line) == 0
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("make sweep ")]
    assert lines
    for text in lines:
        words = {word.partition("=")[0]: word.partition("=")[2] for word in shlex.split(text)[2:]}
        assert words["STUDY"] == "quick" and words["SWEEP"] == "quick" and words["OUT"] == str(tmp_path / "my runs")
        assert words["ARCH"] == "topk" and all(int(n) >= 256 for n in words["WIDTH"].split(","))
        assert min(map(int, words["SEEDS"].split(","))) > 1
    study = {
        "name": "x",
        "study": "",
        "overrides": ["activations=synthetic", "sae.k=8,16", "train.tokens=2e4", "sae=topk"],
    }
    (sweep / "study.json").write_text(json.dumps(study))
    assert main(line) == 0
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("python ")]
    assert all(
        shlex.split(text)[2:5] == ["harness.launch", "activations=synthetic", "train.tokens=2e4"] for text in lines
    )
    assert len(lines) > 0 and all(f"out={tmp_path / 'my runs'}" in shlex.split(text) for text in lines)
    (sweep / "study.json").write_text(json.dumps(study | {"study": "quick"}))
    assert main(line) == 0
    assert "ARGS='activations=synthetic train.tokens=2e4'" in capsys.readouterr().out
    assert main([*line, "--out", str(tmp_path / "next.yaml")]) == 0
    assert yaml.safe_load((tmp_path / "next.yaml").read_text())["grids"]
