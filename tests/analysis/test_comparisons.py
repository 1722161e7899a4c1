"""Comparisons against known truths: forms, compute multipliers, IsoFLOP minima, frontiers, learning rates."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import RunTable, fit, load
from analysis.cli import main
from analysis.fits.compare import compare
from analysis.notes import has
from analysis.questions.frontier import frontier_law
from analysis.questions.isoflop import isoflop
from analysis.questions.learning_rate import at_best_rate, best_rates
from analysis.questions.multiplier import multiplier
from harness.errors import UserError
from tests.analysis.generate import grid_frame, write_run

ROLES = {"n": "n_latents", "k": "k", "loss": "fvu"}


def _grid(noise=0.005, seed=0):
    return RunTable(grid_frame(2 ** np.arange(11, 20), 2 ** np.arange(5, 10), noise, seed), dict(ROLES))


def test_compare_ranks_the_true_form_first():
    table = _grid()
    frame = compare([fit(table, law) for law in ("sae_nk_no_floor", "sae_nk", "sae_nk_no_interaction")])
    assert frame["law"][0] == "sae_nk" and frame["delta_aicc"][0] == 0 and (frame["delta_aicc"][1:] > 10).all()


def test_compare_refuses_different_data():
    with pytest.raises(UserError, match="different runs"):
        compare([fit(_grid(seed=0)), fit(_grid(seed=1))])


def test_holdout_beats_the_simple_forecasts():
    held = fit(_grid(0.002)).holdout(by="n", top=1)
    error, no_floor, last_slope = (held[key] for key in ("error", "no_floor", "last_slope"))
    assert error is not None and no_floor is not None and last_slope is not None
    assert error < min(no_floor, last_slope)


def _two(ratio_s, exponent_b=0.3, noise=0.003, floor=0.05, seed=0, sizes=8, span=200.0):
    rng = np.random.default_rng(seed)
    c = np.geomspace(1e12, 1e12 * span, sizes)
    a = floor + 0.3 * (c / 1e12) ** -0.3
    b = floor + 0.3 * np.exp(ratio_s) * (c / 1e12) ** -exponent_b
    loss = np.r_[a, b] * np.exp(noise * rng.standard_normal(2 * sizes))
    sae = ["topk"] * sizes + ["switch"] * sizes
    frame = pd.DataFrame({"flops": np.r_[c, c], "fvu": loss, "sae": sae, "k": 32})
    return RunTable(frame, {"flops": "flops", "loss": "fvu", "k": "k"})


def test_shared_exponent_gives_one_multiplier():
    truth = 5.0
    result = multiplier(_two(-0.3 * np.log(truth)))
    assert result.at_loss is None and result.p_shared > 0.05
    assert result.lo is not None and result.hi is not None and result.lo < result.hi
    assert result.value == pytest.approx(truth, rel=0.05)


@pytest.mark.slow
def test_multiplier_intervals_cover():
    shared, apart = [], []
    truth = 3.0
    c_a, c_b = (0.1 / 0.3) ** (-1 / 0.3), (0.1 / (0.3 * np.exp(0.5))) ** (-1 / 0.45)
    for seed in range(300):
        one = multiplier(_two(-0.3 * np.log(truth), noise=0.01, seed=seed))
        if one.at_loss is None:  # in 5 % the exponents differ by chance, and the estimate is another one
            shared.append((one.lo or 0) <= truth <= (one.hi or np.inf))
        two = multiplier(_two(0.5, exponent_b=0.45, noise=0.005, seed=seed), at_loss=0.15)
        apart.append((two.lo or 0) <= c_a / c_b <= (two.hi or np.inf))
    print(f"coverage of the multiplier: shared {np.mean(shared):.3f}, at a loss {np.mean(apart):.3f}")
    assert 0.91 < np.mean(shared) < 0.985 and 0.90 < np.mean(apart) < 0.985


def test_different_exponents_are_rejected_and_quoted_at_a_loss():
    table = _two(0.5, exponent_b=0.45, noise=0.002)
    result = multiplier(table)
    assert result.p_shared < 0.01 and result.at_loss is not None
    c_a = 1e12 * ((result.at_loss - 0.05) / 0.3) ** (-1 / 0.3)
    c_b = 1e12 * ((result.at_loss - 0.05) / (0.3 * np.exp(0.5))) ** (-1 / 0.45)
    assert result.value == pytest.approx(c_a / c_b, rel=0.1)
    assert result.lo is not None and result.hi is not None and result.lo < result.hi
    assert result.crossing == pytest.approx(1e12 * np.exp(0.5 / 0.15), rel=0.25)


@pytest.mark.slow
def test_crossing_intervals_cover():
    truth = 1e12 * np.exp(0.5 / 0.15)
    inside, closed = [], []
    for seed in range(600):
        saved = multiplier(_two(0.5, exponent_b=0.45, noise=0.01, seed=seed))
        if saved.crossing is None:  # outside the data there is no claim
            continue
        inside.append((saved.crossing_lo or 0) <= truth <= (saved.crossing_hi or np.inf))
        closed.append(saved.crossing_lo is not None and saved.crossing_hi is not None)
    print(f"coverage of the crossing: {np.mean(inside):.3f} of {len(inside)}, {np.mean(closed):.3f} closed")
    assert len(inside) > 550 and 0.92 <= np.mean(inside) <= 0.98


def test_crossing_has_an_interval_and_parallel_curves_have_none():
    saved = multiplier(_two(0.5, exponent_b=0.45, noise=0.002, seed=1))
    assert saved.crossing is not None and saved.crossing_lo is not None and saved.crossing_hi is not None
    assert saved.crossing_lo < 1e12 * np.exp(0.5 / 0.15) < saved.crossing_hi
    parallel = multiplier(_two(0.02, noise=0.01, seed=3))
    assert parallel.p_shared > 0.05 and (
        parallel.crossing is None or None in (parallel.crossing_lo, parallel.crossing_hi)
    )


def test_equal_n_compares_latents():
    """The same two curves along n: how many times fewer latents the second needs."""
    truth = 2.0
    table = _two(-0.3 * np.log(truth), seed=1)
    table = table.but(roles={"n": "flops", "loss": "fvu", "k": "k"})
    saved = multiplier(table, x="n")
    assert saved.value == pytest.approx(truth, rel=0.05) and saved.at_loss is None
    assert saved.lo is not None and saved.hi is not None and saved.lo < truth < saved.hi


def test_any_two_groups_can_be_compared():
    table = _two(-0.3 * np.log(4.0))
    back = multiplier(table, {"sae": "switch"}, {"sae": "topk"})
    forth = multiplier(table)
    assert back.value is not None and forth.value is not None
    assert back.value * forth.value == pytest.approx(1.0, rel=1e-6)


def test_multiplier_refuses_mixed_k_and_thin_groups():
    table = _two(-0.3)
    with pytest.raises(UserError, match="fewer than 3"):
        multiplier(table.keep(np.arange(16) < 9, "cut"))
    table.frame.loc[0, "k"] = 8
    with pytest.raises(UserError, match="one k"):
        multiplier(table)


def _chinchilla_profiles(budgets, sizes, noise=0.0):
    """L(N, D) = E + A N^-a + B D^-b on C = 6 N D; the optimum is n ∝ C^(b/(a+b))."""
    rows = []
    rng = np.random.default_rng(0)
    for c in budgets:
        best = (0.5 * 400 / (0.5 * 400)) ** 0.5 * (c / 6) ** 0.5
        for factor in sizes:
            n = best * factor
            loss = 1.7 + 400 * n**-0.34 + 400 * (c / 6 / n) ** -0.34
            rows.append({"flops": c, "n": n, "loss": loss * np.exp(noise * rng.standard_normal())})
    return RunTable(pd.DataFrame(rows), {"flops": "flops", "n": "n", "loss": "loss"})


BUDGETS = np.geomspace(1e18, 1e21, 5)


def test_isoflop_minima_and_exponent():
    result = isoflop(_chinchilla_profiles(BUDGETS, 2.0 ** np.arange(-3, 4) * 1.1))
    assert result.minima["bracketed"].all() and not result.notes
    np.testing.assert_allclose(result.minima["n"], (BUDGETS / 6) ** 0.5, rtol=0.06)
    assert result.law is not None and result.law.values["p"] == pytest.approx(0.5, abs=0.01)


def test_isoflop_edge_is_flagged_and_not_used():
    result = isoflop(_chinchilla_profiles(BUDGETS, 2.0 ** np.arange(1, 6)))
    assert has(result.notes, "isoflop_edge") and not result.minima["bracketed"].any() and result.law is None


def test_isoflop_with_two_dips_is_flagged():
    table = _chinchilla_profiles(BUDGETS[:1], 2.0 ** np.arange(-3, 4))
    assert not has(isoflop(table).notes, "isoflop_nonconvex")
    table.frame.loc[5, "loss"] = 1.0001 * table.frame["loss"].min()
    assert has(isoflop(table).notes, "isoflop_nonconvex")


def _curve_runs(directory, sizes, tokens, decayed=()):
    """Run directories whose curves follow E + A·n^-a + B·D^-a with FLOPs = 6·n·D: the best n is (C/6)^(1/2)."""
    for n in map(int, sizes):
        run = write_run(directory, sae="topk", n=n, k=16, decay_fraction=0.2 * (n in decayed))
        d = np.geomspace(tokens / 300, tokens, 60)
        loss = 0.05 + 3 * n**-0.4 + 3 * d**-0.4
        if n in decayed:
            loss = loss / 2  # would win at every budget, were its curve allowed in
        lines = [{"tokens": float(t), "flops": 6 * n * float(t), "fvu": float(y)} for t, y in zip(d, loss, strict=True)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        content = json.loads((run / "result.json").read_text())
        content |= {"tokens": tokens, "flops": 6 * n * tokens, "fvu": float(loss[-1])}
        (run / "result.json").write_text(json.dumps(content))
    return load(directory)


SIZES = 2 ** np.arange(8, 18)


def test_isoflop_from_training_curves(tmp_path):
    table = _curve_runs(tmp_path, SIZES, 2**16)
    result = isoflop(table, budgets=6 * 4.0 ** np.arange(10, 15))
    assert result.minima["bracketed"].all() and len(result.minima) == 5
    np.testing.assert_allclose(result.minima["n"], (result.minima["flops"] / 6) ** 0.5, rtol=0.03)
    assert result.law is not None and result.law.values["p"] == pytest.approx(0.5, abs=0.01)
    low, high = result.law.intervals["p"]
    assert low is not None and high is not None and low < high
    spaced = isoflop(table, budgets=6)
    assert len(spaced.minima) == 6 and spaced.profiles.groupby("flops")["n"].nunique().min() >= 3


def test_isoflop_takes_no_curve_of_a_decayed_run(tmp_path):
    result = isoflop(_curve_runs(tmp_path, SIZES, 2**16, decayed=(512,)), budgets=6 * 4.0 ** np.arange(10, 14))
    assert 512 not in set(result.profiles["n"])
    np.testing.assert_allclose(result.minima["n"], (result.minima["flops"] / 6) ** 0.5, rtol=0.05)


def test_isoflop_refuses_several_k_and_too_few_sizes(tmp_path):
    table = _curve_runs(tmp_path, SIZES[:2], 2**16)
    with pytest.raises(UserError, match="at least three sizes"):
        isoflop(table)
    table.frame.loc[0, "k"] = 8
    with pytest.raises(UserError, match="runs of one k"):
        isoflop(table)


def _curves(sizes, tokens, stop=None):
    rows = []
    for n in map(int, sizes):
        d = np.geomspace(1e4, tokens if stop is None else stop(n), 30)
        loss = 0.05 + 3 * n**-0.5 + 20 * d**-0.5
        rows.append(pd.DataFrame({"run": f"n{n}", "tokens": d, "flops": 6 * n * d, "loss": loss, "constant_lr": True}))
    return pd.concat(rows, ignore_index=True)


def test_frontier_law_has_intervals_over_runs():
    curves = _curves(2 ** np.arange(6, 15), 1e7)
    table = RunTable(curves.groupby("run", as_index=False).last(), {"run": "run", "loss": "loss", "flops": "flops"})
    result = frontier_law(table, curves, resamples=60)
    assert result.ci == "bootstrap" and result.values["a"] > 0
    low, high = result.intervals["a"]
    assert low is not None and high is not None and low <= result.values["a"] * 1.05 and high > low
    assert not has(result.notes, "frontier_owned_by_end")


def test_frontier_of_ends_is_flagged():
    curves = _curves(2 ** np.arange(6, 15), 1e7)
    ends = curves.groupby("run", as_index=False).last()
    table = RunTable(ends, {"run": "run", "loss": "loss", "flops": "flops"})
    assert has(frontier_law(table, ends.assign(constant_lr=False), resamples=5).notes, "frontier_owned_by_end")


def _rates(factors, best=lambda n: 2e-4 / np.sqrt(n / 2**14)):
    rows = []
    for n in 2 ** np.arange(9, 14):
        for factor in factors:
            lr = best(n) * factor
            rows.append({"n": n, "k": 16, "lr": lr, "loss": 0.2 * np.exp(0.05 * np.log(lr / best(n)) ** 2)})
    return RunTable(pd.DataFrame(rows), {"n": "n", "k": "k", "lr": "lr", "loss": "loss"})


def test_best_learning_rate_and_its_slope():
    result = best_rates(_rates([0.3, 0.6, 1.2, 2.4]))
    assert result.rates["bracketed"].all() and result.law is not None
    assert result.law.values["p"] == pytest.approx(-0.5, abs=1e-6)
    np.testing.assert_allclose(result.rates["lr"], 2e-4 / np.sqrt(result.rates["n"] / 2**14), rtol=1e-6)


def test_best_learning_rates_of_a_sweep_directory(tmp_path, capsys):
    """Rates as the launcher writes them: c of the rule c·2e-4/√(n/2^14); the best c here is 3 at every n but noisy."""
    rng = np.random.default_rng(0)
    for n in (256, 512, 1024, 2048, 4096):
        for factor in (0.75, 1.5, 3, 6, 12):
            loss = 0.2 * np.exp(0.06 * np.log(factor / 3) ** 2 + 0.003 * rng.standard_normal())
            run = write_run(tmp_path / f"c{factor}", sae="topk", n=n, k=16, fvu=loss)
            content = json.loads((run / "result.json").read_text())
            content["run_id"] += f"-c{factor}"
            content["config"]["train"] |= {"lr_factor": factor, "lr": 0.0}
            (run / "result.json").write_text(json.dumps(content))
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    assert main(["best-rates", *paths]) == 0 and "grid_lr" in capsys.readouterr().out
    best = best_rates(load(paths))
    assert best.law is not None and best.rates["bracketed"].all()
    low, high = best.law.intervals["p"]
    assert low is not None and high is not None
    print(f"best learning rate of a sweep: n^{best.law.values['p']:.3f} [{low:.3f}, {high:.3f}], true -0.5")
    assert low < -0.5 < high and high - low < 0.3


def test_best_learning_rate_at_the_edge_is_flagged():
    result = best_rates(_rates([1.2, 2.4, 4.8]))
    assert not result.rates["bracketed"].any() and result.law is None and has(result.notes, "isoflop_edge")


def test_only_the_best_rate_enters_a_law():
    table = _rates([0.5, 1.0, 2.0])
    kept = at_best_rate(table)
    assert len(kept) == 5 and set(kept.excluded["reason"]) == {"not the best learning rate of its n and k"}
    assert len(at_best_rate(kept)) == 5


def test_broken_power_law_finds_the_break():
    x = np.geomspace(1, 1e5, 40)
    y = 0.01 + 2 * x**-0.2 * (1 + (x / 300) ** (1 / 0.5)) ** (-0.4 * 0.5)
    table = RunTable(pd.DataFrame({"x": x, "y": y}), {"x": "x", "loss": "y"})
    result = fit(table, "bnsl1", ci="wald")
    assert result.values["x1"] == pytest.approx(300, rel=1e-3)
    assert result.values["a"] == pytest.approx(0.2, rel=1e-3) and result.values["c"] == pytest.approx(0.4, rel=1e-3)
    assert compare([result, fit(table, "power_floor")])["law"][0] == "bnsl1"
    level = y - 0.01
    alone = fit(RunTable(pd.DataFrame({"x": x, "y": level}), {"x": "x", "loss": "y"}), "bnsl1_no_floor", ci="wald")
    assert alone.values == pytest.approx({"A": 2.0, "x1": 300, "f": 0.5, "a": 0.2, "c": 0.4}, rel=1e-6)


def test_bilinear_experts_and_monomial():
    n, e = (a.ravel() for a in np.meshgrid(2.0 ** np.arange(11, 18), [1.0, 2, 8, 32]))
    y = 0.1 + np.exp(-0.2 * np.log(n) + 0.05 * np.log(e) - 0.012 * np.log(n) * np.log(e) + 0.4)
    table = RunTable(pd.DataFrame({"n": n, "e": e, "y": y}), {"n": "n", "experts": "e", "loss": "y"})
    values = fit(table, "bilinear_experts", ci="wald").values
    assert values == pytest.approx({"E": 0.1, "a": -0.2, "b": 0.05, "c": -0.012, "d": 0.4}, rel=1e-6)
    sizes = pd.DataFrame({"n": [1e3, 1e4, 1e5, 1e6], "d": 7e4 * np.array([1e3, 1e4, 1e5, 1e6]) ** 0.6})
    law = fit(RunTable(sizes, {"n": "n", "loss": "d"}), "monomial")
    assert law.values == pytest.approx({"D0": 7e4, "p": 0.6}, rel=1e-9)


def test_bilinear_experts_of_a_sweep_directory(tmp_path):
    """TopK counts as one expert; architectures and experts are what the law is about, not a mixed population."""
    truth = {"E": 0.05, "a": -0.3, "b": 0.25, "c": -0.02, "d": 1.2}
    rng = np.random.default_rng(1)
    for n in 2 ** np.arange(9, 16):
        for experts in (1, 2, 4, 8, 16):
            ln_n, ln_e = np.log(n), np.log(experts)
            fvu = truth["E"] + np.exp(truth["a"] * ln_n + truth["b"] * ln_e + truth["c"] * ln_n * ln_e + truth["d"])
            fvu = float(fvu * np.exp(0.002 * rng.standard_normal()))
            sae = "topk" if experts == 1 else "switch"
            write_run(tmp_path, sae=sae, n=int(n), k=16, experts=experts, fvu=fvu)
    result = fit(load(tmp_path), "bilinear_experts")
    assert result.points == 35 and not has(result.notes, "mixed_population")
    for name, value in truth.items():
        low, high = result.intervals[name]
        assert low is not None and high is not None and low <= value <= high, name
    _, low, high = result.slope("n", at={"experts": 8})
    assert low is not None and high is not None and low < truth["a"] + truth["c"] * np.log(8) < high
    write_run(tmp_path, sae="topk", n=512, k=8, fvu=0.3)
    assert has(fit(load(tmp_path), "bilinear_experts", ci="wald").notes, "mixed_population")
