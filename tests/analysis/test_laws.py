"""The laws: analytic Jacobians against finite differences, centring as an exact change of coordinates."""

import numpy as np
import pytest

from analysis.laws.catalogue import LAWS, get


def _draw(law, seed=0, points=23):
    rng = np.random.default_rng(seed)
    logs = {name: rng.uniform(1.0, 9.0, points) for name in law.inputs}
    theta = rng.normal(0.0, 0.4, len(law.params))
    return logs, theta


@pytest.mark.parametrize("name", LAWS)
def test_jacobian_equals_finite_differences(name):
    law = get(name)
    logs, theta = _draw(law)
    phi = law.features(logs)
    jac = law.jacobian(theta, phi)
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-6
        difference = (law.log_value(theta + step, phi) - law.log_value(theta - step, phi)) / 2e-6
        np.testing.assert_allclose(jac[:, i], difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LAWS)
def test_centred_and_raw_coefficients_are_the_same_law(name):
    law = get(name)
    logs, theta = _draw(law, seed=1)
    means = {key: float(values.mean()) for key, values in logs.items()}
    raw = law.centring_matrix(means) @ theta + law.centring_offset(means, 0.7)
    centred = law.features({key: values - means[key] for key, values in logs.items()})
    np.testing.assert_allclose(
        law.log_value(raw, law.features(logs)), law.log_value(theta, centred) + 0.7, rtol=1e-11, atol=1e-11
    )


def test_contract_names():
    assert get("sae_nk").params == ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
    assert get("power_floor").params == ("E", "A", "a")
    assert set(get("chinchilla").params) == {"E", "A", "B", "alpha", "beta"}


def test_chinchilla_parameters_are_in_the_contract_order():
    assert get("chinchilla").params == ("E", "A", "B", "alpha", "beta")


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.floor is not None])
def test_every_law_with_a_floor_has_its_form_without(name):
    law = get(name)
    (without,) = [get(form) for form in law.nested if get(form).floor is None]
    assert set(without.params) == set(law.params) - set(law.floor_params)


def test_old_names_are_accepted():
    assert get("tokens_to_convergence") is LAWS["monomial"] and "tokens_to_convergence" not in LAWS


def test_unknown_law_names_the_known_ones():
    with pytest.raises(ValueError, match="sae_nk"):
        get("sea_nk")
