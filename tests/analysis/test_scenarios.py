"""What is said about studies with a hidden fault, and about sound ones; the law with a term for tokens."""

import numpy as np
import pytest

from analysis import fit
from analysis.fits.result import FitResult
from analysis.notes import has
from analysis.questions.multiplier import multiplier
from analysis.questions.need import excluded, need
from analysis.report.words import floors_words, law_sentences
from tests.analysis.generate import MINILM_LIKE, sae_nk
from tests.analysis.scenarios import LAW, NO_FLOOR, NOISE, SCENARIOS, TARGET, WIDTHS, measure, token_study, two_floors

REPLICATES = 20
"""In the tests; the table of docs/analysis.md has more, by `python -m tests.analysis.scenarios`."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_hidden_fault_is_not_met_with_silence(name):
    covered, silent = measure(name, REPLICATES)
    print(f"{name}: coverage {100 * covered:.0f} %, silent {100 * silent:.0f} %")
    if name == "nothing wrong":
        assert covered >= 0.8 and silent >= 0.8
    else:
        assert silent <= 0.15


@pytest.mark.slow
@pytest.mark.parametrize("law, truth", [("sae_nkd_no_floor", NO_FLOOR), ("sae_nkd", MINILM_LIKE)])
def test_the_law_with_tokens_covers(law, truth):
    hits, variances = {"gamma": [], "beta_n": [], "forecast": []}, []
    for seed in range(40):
        result = fit(token_study(np.random.default_rng(seed), truth), law, starts=4)
        variances.append(result.run_variance)
        for name in ("gamma", "beta_n"):
            low, high = result.intervals[name]
            hits[name].append((low is None or low <= truth[name]) and (high is None or truth[name] <= high))
        band = result.predict({name: [value] for name, value in TARGET.items()})
        hits["forecast"].append(band["lo"][0] <= sae_nk(TARGET["n"], TARGET["k"], truth) <= band["hi"][0])
    rates = {name: np.mean(held) for name, held in hits.items()}
    print(f"coverage of {law} on curves: " + ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items()))
    assert min(rates.values()) >= 0.85
    # what the shapes of curves determine takes no degrees of freedom from the runs: else it is 1.21 times the truth
    assert np.mean(variances) == pytest.approx(NOISE**2, rel=0.15)


def test_a_token_term_that_looks_like_a_floor_is_called_a_level_and_the_cure_finds_none(tmp_path):
    table = token_study(np.random.default_rng(0))
    deceived = fit(table, LAW, starts=8)
    assert deceived.intervals["zeta"][0] is not None and has(deceived.notes, "level_at_budget")
    assert any("level at this budget" in text for text in law_sentences(deceived, [8, 16, 32]))
    cured = fit(table, "sae_nkd_no_floor", starts=8)
    assert cured.points > len(table) and cured.dof == len(table) - 4 and cured.status == "ok"
    for name, value in (("gamma", NO_FLOOR["gamma"]), ("beta_n", NO_FLOOR["beta_n"]), ("beta_d", 0.4)):
        assert cured.values[name] == pytest.approx(value, abs=0.01)
    assert not has(cured.notes, "level_at_budget") and not has(cured.notes, "unconverged_run")
    inputs = {"n": [WIDTHS[0]], "k": [16.0]}
    converged, now = (cured.predict(point)["value"][0] for point in (inputs, {**inputs, "d": [1e6]}))
    assert now / converged == pytest.approx(1.053, abs=0.005)
    assert cured.slope("n", at={"k": 16})[0] == pytest.approx(
        cured.values["beta_n"] + cured.values["gamma"] * np.log(16)
    )
    cured.to_json(tmp_path / "fit.json")
    again = FitResult.from_json(tmp_path / "fit.json")
    assert again.predict(inputs, "new_run").equals(cured.predict(inputs, "new_run")) and again.variance > 0


def test_points_of_one_run_are_not_counted_as_runs():
    """Ten times as many points of the same curves narrow nothing that differs between runs."""
    table = token_study(np.random.default_rng(1))
    result = fit(table, "sae_nkd_no_floor", starts=4)
    assert result.run_variance == pytest.approx(0.005**2, rel=0.9)
    assert len(set(result.runs)) == len(table) and "18 runs (162 points), 14 dof" in result.summary()


def test_not_reachable_needs_a_floor_that_is_closed_above_the_loss():
    with_floor = fit(token_study(np.random.default_rng(0)), LAW, starts=8)
    assert excluded(need(with_floor, 0.001, k=16.0), 0.001)
    answer = need(fit(token_study(np.random.default_rng(0)), "sae_nk_no_floor", starts=8), 1e-9, k=16.0)
    assert answer.floor == 0 and answer.floor_ends == (None, None) and not excluded(answer, 1e-9)


def test_different_floors_are_fitted_both_ways_and_no_number_is_below_one():
    table, at, truth = two_floors(np.random.default_rng(0))
    found = multiplier(table, at_loss=at)
    assert found.own_floors and found.p_floor < 0.01 and found.value == pytest.approx(truth, rel=0.1)
    assert found.otherwise is not None and "with a common floor, TopK / Switch is" in floors_words(found)
    below = multiplier(table, at_loss=0.06)
    assert below.value is None and below.lo is None and any("below the floor" in e.message for e in below.notes)


def test_equal_floors_are_fitted_as_one_and_the_other_way_is_told():
    table, _, truth = two_floors(np.random.default_rng(0), floors=(0.05, 0.05))
    found = multiplier(table)
    assert not found.own_floors and found.at_loss is None and found.p_floor >= 0.1
    assert found.value == pytest.approx(truth, rel=0.05) and found.lo is not None and found.hi is not None
    assert found.otherwise is not None and "with a floor for each" in floors_words(found)
