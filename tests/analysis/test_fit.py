"""The fit: recovery, intervals against an independent implementation, invariances, JSON, nested forms, weights."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from analysis import FitResult, RunTable, Status, fit
from analysis.fits.intervals import critical_f
from analysis.fits.problem import starting_points
from analysis.fits.solve import minimise
from analysis.notes import has
from harness.errors import UserError
from tests.analysis.generate import GPT4, MINILM_LIKE, grid_frame, sae_nk

N_GRID = 2 ** np.arange(11, 20)
K_GRID = 2 ** np.arange(5, 10)
ROLES = {"n": "n_latents", "k": "k", "loss": "fvu"}


def _table(noise=0.01, seed=0, **kwargs):
    return RunTable(grid_frame(N_GRID, K_GRID, noise, seed, **kwargs), dict(ROLES))


def _floor_table(sizes=9, noise=0.005, seed=0, floor=0.1, span=256.0):
    x = np.geomspace(256, 256 * span, sizes)
    y = (floor + 2.0 * x**-0.35) * np.exp(noise * np.random.default_rng(seed).standard_normal(sizes))
    return RunTable(pd.DataFrame({"x": x, "y": y}), {"x": "x", "loss": "y"})


@pytest.mark.parametrize("coefficients", [GPT4, MINILM_LIKE])
def test_noise_free_recovery(coefficients):
    worst = 0.0
    for seed in range(20):
        result = fit(_table(0.0, coefficients=coefficients), seed=seed, ci="wald")
        worst = max(worst, *(abs(result.values[name] / coefficients[name] - 1) for name in coefficients))
    print(f"largest relative error of a parameter over 20 seeds: {worst:.1e}")
    assert worst < 1e-6


def test_optimum_agrees_with_a_derivative_free_search():
    """Nelder–Mead from the fit finds nothing better, and from a perturbed start nothing else."""
    result = fit(_table(0.02, seed=3))
    frame = result.residuals()
    n, k = _table(0.02, seed=3).values("n"), _table(0.02, seed=3).values("k")
    y = _table(0.02, seed=3).values("loss")

    def rss(theta):
        model = sae_nk(n, k, dict(zip(GPT4, theta, strict=True)))
        return float(np.sum((np.log(y) - np.log(model)) ** 2))

    start = result.params["value"].to_numpy()
    assert np.isclose(rss(start), result.rss, rtol=1e-9)
    assert np.isclose(np.sum(frame["residual"] ** 2), result.rss, rtol=1e-9)
    end = minimize(rss, start + 1e-3, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-14})
    assert end.fun > result.rss * (1 - 1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_profiles_agree_with_lmfit():
    import lmfit

    table = _floor_table(noise=0.01)
    x, y = table.values("x"), table.values("loss")
    result = fit(table, "power_floor")

    def residual(p):
        return np.log(p["E"] + p["A"] * x ** -p["a"].value) - np.log(y)

    parameters = lmfit.Parameters()
    for name, value in result.values.items():
        parameters.add(name, value=value, min=1e-9)
    fitter = lmfit.Minimizer(residual, parameters)
    best = fitter.minimize(xtol=1e-12, ftol=1e-12)
    intervals: Any = lmfit.conf_interval(fitter, best, sigmas=[0.95])
    for name in ("E", "a"):
        low, high = intervals[name][0][1], intervals[name][2][1]
        assert result.intervals[name] == pytest.approx((low, high), rel=2e-4)


def test_rescaling_and_row_order_do_not_matter():
    """n, k and the loss of L(n, k), and C of a floor law in compute."""
    worst = 0.0
    for seed in range(5):
        frame = grid_frame(N_GRID, K_GRID, 0.01, seed)
        base = fit(RunTable(frame, dict(ROLES)), ci="wald")
        at = {"n": np.array([5e3, 1e6, 1e7]), "k": np.array([40.0, 64.0, 700.0])}
        shuffled = fit(RunTable(frame.sample(frac=1, random_state=5), dict(ROLES)), ci="wald")
        assert np.array_equal(base.value(at), shuffled.value(at))
        for by in ({"n_latents": 768.0}, {"k": 1 / 7}, {"fvu": 4.2e3}, {"n_latents": 768.0, "k": 1 / 7, "fvu": 4.2e3}):
            scaled = frame.assign(**{column: frame[column] * factor for column, factor in by.items()})
            other = fit(RunTable(scaled, dict(ROLES)), ci="wald")
            there = {"n": at["n"] * by.get("n_latents", 1.0), "k": at["k"] * by.get("k", 1.0)}
            worst = max(worst, float(np.max(np.abs(other.value(there) / by.get("fvu", 1.0) / base.value(at) - 1))))
        x = np.geomspace(1e15, 1e20, 12)
        y = (0.1 + 4e5 * x**-0.4) * np.exp(0.01 * np.random.default_rng(seed).standard_normal(12))
        laws = [
            fit(RunTable(pd.DataFrame({"c": x * unit, "y": y}), {"x": "c", "loss": "y"}), "power_floor", ci="wald")
            for unit in (1.0, 1 / 8.64e19)
        ]
        far = np.array([1e14, 3e17, 1e22])
        worst = max(worst, float(np.max(np.abs(laws[1].value({"x": far / 8.64e19}) / laws[0].value({"x": far}) - 1))))
    print(f"largest relative change of a prediction by a change of units, 5 seeds: {worst:.1e}")
    assert worst < 1e-9


def test_json_round_trip_predicts_the_same_bits(tmp_path):
    result = fit(_table())
    result.to_json(tmp_path / "fit.json")
    content = json.loads((tmp_path / "fit.json").read_text())
    assert content["law"] == "sae_nk" and list(content["params"]) == list(GPT4)
    assert set(content["params"]["gamma"]) == {"value", "lo", "hi"}
    assert np.shape(content["cov"]) == (6, 6) and content["status"] == "ok"
    again = FitResult.from_json(tmp_path / "fit.json")
    grid = {"n": np.geomspace(1e3, 1e8, 40), "k": np.full(40, 48.0)}
    for kind in ("mean", "new_run"):
        pd.testing.assert_frame_equal(result.predict(grid, kind), again.predict(grid, kind), check_exact=True)


@pytest.mark.parametrize(
    "damage",
    {
        "not JSON": lambda content: "{",
        "a list": lambda content: [1],
        "empty": lambda content: {},
        "another law": lambda content: content | {"law": "sea_nk"},
        "a note of another vocabulary": lambda content: (
            content | {"notes": [{"code": "odd", "severity": "info", "message": "", "remedy": "x"}]}
        ),
        "too few coefficients": lambda content: content | {"centred": content["centred"] | {"theta": [1.0]}},
        "text for a covariance": lambda content: content | {"centred": content["centred"] | {"cov": "os.system"}},
        "a status that is none": lambda content: content | {"status": "splendid"},
    }.values(),
)
def test_a_damaged_file_is_one_line(damage, tmp_path):
    path = tmp_path / "fit.json"
    damaged = damage(json.loads(json.dumps(fit(_table(), ci="wald").as_dict())))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(UserError) as caught:
        FitResult.from_json(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_fit_stored_under_an_old_name_of_its_law_is_read(tmp_path):
    sizes = pd.DataFrame({"n": [1e3, 1e4, 1e5, 1e6], "d": [1.0, 4.0, 15.0, 60.0]})
    content = fit(RunTable(sizes, {"n": "n", "loss": "d"}), "tokens_to_convergence").as_dict()
    assert content["law"] == "monomial"
    (tmp_path / "fit.json").write_text(json.dumps(content | {"law": "tokens_to_convergence"}))
    assert FitResult.from_json(tmp_path / "fit.json").law.name == "monomial"


def test_a_failed_fit_makes_the_round_trip(tmp_path):
    result = fit(RunTable(grid_frame(N_GRID, [32], 0.01), dict(ROLES)))
    result.to_json(tmp_path / "fit.json")
    again = FitResult.from_json(tmp_path / "fit.json")
    assert again.status is Status.FAILED and again.notes == result.notes


def test_covariance_is_that_of_the_reported_parameters():
    result = fit(_floor_table(noise=0.002), "power_floor")
    x, y = _floor_table(noise=0.002).values("x"), _floor_table(noise=0.002).values("loss")
    e, big_a, a = result.values.values()
    model = e + big_a * x**-a
    jac = np.stack([1 / model, x**-a / model, -big_a * np.log(x) * x**-a / model], axis=1)
    variance = np.sum((np.log(y) - np.log(model)) ** 2) / (len(x) - 3)
    np.testing.assert_allclose(result.cov, variance * np.linalg.inv(jac.T @ jac), rtol=1e-5)


def test_short_span_leaves_the_floor_open():
    result = fit(_floor_table(sizes=4, span=8.0, floor=0.02, seed=1), "power_floor")
    assert has(result.notes, "floor_not_identified") and result.status is Status.OPEN
    assert result.intervals["E"][0] is None
    assert json.loads(json.dumps(result.as_dict()))["params"]["E"]["lo"] is None


def test_long_span_identifies_the_floor():
    result = fit(_floor_table(), "power_floor")
    assert not has(result.notes, "floor_not_identified")
    low, high = result.intervals["E"]
    assert low is not None and high is not None and low < 0.1 < high


def test_zero_floor_is_said_to_be_at_its_bound():
    x = np.geomspace(256, 65536, 9)
    frame = pd.DataFrame({"x": x, "y": 3.0 * x**-0.4 * (1 - 0.004 * np.log(x / 256) ** 2)})
    result = fit(RunTable(frame, {"x": "x", "loss": "y"}), "power_floor")
    assert has(result.notes, "parameter_at_bound") and has(result.notes, "floor_not_identified")
    assert result.intervals["E"][0] is None


def test_nested_forms_are_compared():
    result = fit(_table(0.005))
    rows = {row["law"]: row for row in result.nested}
    assert rows["sae_nk"]["delta_aicc"] == 0
    assert rows["sae_nk_no_floor"]["delta_aicc"] > 20
    assert rows["sae_nk"]["holdout"] < rows["sae_nk_no_floor"]["holdout"]
    assert rows["same last slope"]["holdout"] > 0


def test_seed_variance_gives_weights():
    noisy_small = fit(_table(0.02, seed=2, seeds=3, noise_slope=-0.5))
    assert -1.3 < noisy_small.weighting["slope"] < -0.7
    constant = fit(_table(0.01, seed=2, seeds=3), weights="auto")
    assert constant.weighting == {}
    assert fit(_table(0.01, seeds=3), weights="none").weighting == {}


def test_slope_of_the_reducible_part():
    result = fit(_table(0.005))
    value, low, high = result.slope("n", at={"k": 64})
    assert np.isclose(value, result.values["beta_n"] + result.values["gamma"] * np.log(64), rtol=1e-9)
    assert low < GPT4["beta_n"] + GPT4["gamma"] * np.log(64) < high
    with pytest.raises(UserError, match="depends on k"):
        result.slope("n")


def test_bands_and_extrapolation():
    result = fit(_table(0.01))
    inside = result.predict({"n": [2.0**14], "k": [64.0]})
    beyond = result.predict({"n": [2.0**27], "k": [64.0]})
    new = result.predict({"n": [2.0**14], "k": [64.0]}, kind="new_run")
    assert inside["extrapolation"][0] == 0 and np.isclose(beyond["extrapolation"][0], 9 / 8 * 8 / 8, atol=0.2)
    assert (new["hi"] - new["lo"])[0] > (inside["hi"] - inside["lo"])[0]
    assert (np.log(beyond["hi"] / beyond["lo"]) > np.log(inside["hi"] / inside["lo"])).all()
    assert has(result.extrapolation_notes({"n": [2.0**27], "k": [64.0]}), "extrapolation")
    assert not result.extrapolation_notes({"n": [2.0**14], "k": [64.0]})


def test_huber_resists_an_outlier():
    frame = grid_frame(N_GRID, K_GRID, 0.005)
    frame["fvu"] = frame["fvu"].where(frame.index != 7, 1.6 * frame["fvu"])
    plain = fit(RunTable(frame, dict(ROLES)), ci="wald")
    robust = fit(RunTable(frame, dict(ROLES)), robust="huber", delta=0.005, resamples=50)
    truth = fit(_table(0.005), ci="wald")
    assert abs(robust.values["zeta"] - truth.values["zeta"]) < abs(plain.values["zeta"] - truth.values["zeta"])
    assert robust.ci == "bootstrap" and has(plain.notes, "outlier_driven")


def test_too_little_data_fails_with_the_reason():
    frame = grid_frame(N_GRID, [32], 0.01)
    result = fit(RunTable(frame, dict(ROLES)))
    assert result.status is Status.FAILED and has(result.notes, "too_few_levels")
    few = fit(RunTable(grid_frame(N_GRID[:3], K_GRID[:2], 0.01), dict(ROLES)))
    assert few.status is Status.FAILED and has(few.notes, "too_few_points")


@pytest.mark.parametrize(
    "wrong",
    [{"ci": "magic"}, {"robust": "tukey"}, {"weights": "some"}, {"level": 2.0}, {"starts": 0}],
)
def test_wrong_requests_are_refused(wrong):
    with pytest.raises(UserError):
        fit(_table(), **wrong)


def test_what_a_notebook_shows():
    text = fit(_floor_table(sizes=4, span=8.0, floor=0.02, seed=1), "power_floor")._repr_html_()
    assert "E + A·x^−a" in text and "floor_not_identified" in text and "open" in text


def test_forecasts_outside_the_data_are_profiles(tmp_path):
    """Inside, and for a law whose logarithm is linear in its coefficients, they are Wald's. At the ends F is critical,
    found anew from many starts."""
    x = np.geomspace(256, 4096, 8)
    y = 2.0 * x**-0.3 * np.exp(0.01 * np.random.default_rng(0).standard_normal(8))
    line = fit(RunTable(pd.DataFrame({"x": x, "y": y}), {"x": "x", "loss": "y"}), "power")
    for kind in ("mean", "new_run"):
        far = {"x": [2.0**20]}
        np.testing.assert_allclose(line.forecast(far, kind), line.predict(far, kind), rtol=1e-6)
    frame = grid_frame(2 ** np.arange(8, 13), [8, 32, 128], 0.005)
    result = fit(RunTable(frame, {"n": "n_latents", "k": "k", "loss": "fvu"}))
    inputs = {"n": [2.0**10, 2.0**15], "k": [32.0, 32.0]}
    band, wald = result.forecast(inputs), result.predict(inputs)
    assert band.iloc[0].equals(wald.iloc[0]) and abs(band["hi"][1] / wald["hi"][1] - 1) > 1e-4
    problem, phi = result.problem, result._features({"n": [2.0**15], "k": [32.0]})
    assert problem is not None
    for end in (band["lo"][1], band["hi"][1]):
        held = replace(
            problem,
            phi=np.concatenate([problem.phi, phi], axis=1),
            y=np.r_[problem.y, np.log(end) - result.y_mean],
            root_weight=np.r_[problem.root_weight, 1e3],
        )
        best = minimise(held, [result.theta, *starting_points(problem, 24, 0)])
        f = (np.sum(problem.residual(best.theta) ** 2) - result.rss) / (result.rss / result.dof)
        assert f == pytest.approx(critical_f(result.dof, 0.95), rel=0.02)  # another basin may be a little better
    result.to_json(tmp_path / "fit.json")
    assert FitResult.from_json(tmp_path / "fit.json").forecast(inputs).equals(wald)
