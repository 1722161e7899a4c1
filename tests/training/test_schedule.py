"""When things happen: pure functions of the configuration."""

from __future__ import annotations

import numpy as np
import pytest

from harness.budget import learning_rate, total_steps
from harness.training.schedule import evaluation_steps, gain, has_converged, lr_at
from tests.training.members import small_config


def test_learning_rate_follows_the_rule_of_n() -> None:
    config = small_config(train__lr=0.0, train__lr_factor=3.0, sae__n_latents=4096)
    assert learning_rate(config) == pytest.approx(3 * 2e-4 / (4096 / 2**14) ** 0.5)


def test_warm_up_and_decay_are_linear() -> None:
    config = small_config(train__lr=1.0, train__warmup_tokens=640, train__decay_fraction=0.2)
    rates = [lr_at(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[79] == 1.0
    assert rates[80] == 1.0 and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


def test_every_evaluation_but_the_first_has_one_at_half_its_tokens() -> None:
    for until, per_doubling in (("budget", 2), ("convergence", 4)):
        config = small_config(train__until=until, train__eval_points=12)
        steps = [*sorted(evaluation_steps(config, 5000)), 5000]
        for step in steps[per_doubling:]:
            assert min(abs(other - step / 2) for other in steps) <= 1


def test_convergence_compares_with_half_the_tokens() -> None:
    config = small_config(train__until="convergence", train__convergence_epsilon=0.01)
    assert not has_converged(config, {100: 0.5, 200: 0.4}, 200)
    assert has_converged(config, {100: 0.5, 141: 0.45, 200: 0.497}, 200)
    assert not has_converged(config, {200: 0.4}, 200)
    assert not has_converged(small_config(train__decay_fraction=0.1), {100: 0.5, 200: 0.5}, 200)
    warm = small_config(train__until="convergence", train__warmup_tokens=64 * 150)
    assert not has_converged(warm, {100: 0.5, 200: 0.5}, 200)


def test_the_smaller_budget_counts() -> None:
    config = small_config(train__tokens=6400, train__flops=1e18)
    assert total_steps(config, 16) == 100
    assert total_steps(small_config(train__tokens=100), 16) == 1
    assert total_steps(small_config(train__tokens=0, train__flops=1), 16) == 1


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_schedules_over_the_whole_run(schedule: str, middle: float) -> None:
    config = small_config(train__lr=1.0, train__schedule=schedule, train__warmup_tokens=640)
    rates = [lr_at(config, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(middle)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert config.train.decays == (schedule != "constant")


def test_schedules_that_contradict_other_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="decay_fraction"):
        small_config(train__schedule="cosine", train__decay_fraction=0.2)
    with pytest.raises(ValueError, match="constant"):
        small_config(train__schedule="linear", train__until="convergence")
    with pytest.raises(ValueError, match="ema"):
        small_config(train__optimizer="signum", train__ema=0.9)


def test_the_gain_over_a_doubling_has_the_error_of_its_documents():
    """The truth is a fall of 1 %: intervals of ± 2 standard errors hold it, and are far narrower than unpaired ones."""
    inside, paired, apart = [], [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        hard = rng.lognormal(0, 0.5, 128)
        half, now = (hard * level * np.exp(0.02 * rng.standard_normal(128)) for level in (1.0, 0.99))
        value, se = gain(now, half)
        inside.append(abs(value - 0.01) < 2 * se)
        paired.append(se)
        apart.append(np.sqrt(2) * hard.std() / hard.mean() / np.sqrt(128))
    assert 0.92 <= np.mean(inside) <= 0.98 and np.mean(paired) < 0.1 * np.mean(apart)
    assert np.isnan(gain([float("nan"), 1.0], [1.0, 1.0])[0])
