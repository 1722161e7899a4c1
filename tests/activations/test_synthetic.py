import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.activations.statistics import layernorm_rows
from harness.activations.synthetic import best_cosines, close_latents, recovered, zipf_probabilities
from harness.config import ActivationsConfig, SyntheticConfig
from harness.process.signals import StopFlag

CPU = torch.device("cpu")


def source(seed: int = 0, dtype: str = "fp32", **spec: Any) -> ActivationSource:
    synthetic = dataclasses.replace(SyntheticConfig(), **spec)
    cfg = ActivationsConfig(kind="synthetic", seed=seed, dtype=dtype, heldout_tokens=3000, synthetic=synthetic)
    return open_source(cfg, Path("unused"), progress=False, stop=StopFlag())


def rows(made: ActivationSource, count: int, seed: int = 0) -> torch.Tensor:
    return made.stream(seed, count, CPU).batch(0)


@given(st.integers(1, 500), st.floats(0, 3), st.floats(0.001, 1))
def test_probabilities_are_zipf_and_add_up(n: int, exponent: float, share: float) -> None:
    p = zipf_probabilities(n, exponent, share * n)
    assert p.sum() == pytest.approx(share * n, rel=1e-9)
    assert (p > 0).all() and (p <= 1 + 1e-12).all() and (p[1:] <= p[:-1] + 1e-12).all()
    below = p[p < 1 - 1e-9]
    if len(below) > 1:
        first = n - len(below) + 1
        assert below[-1] / below[0] == pytest.approx((n / first) ** -exponent, rel=1e-6)


def test_statistics_agree_with_the_rows() -> None:
    made = source()
    x = rows(made, 60_000).double()
    raw = made.statistics(layernorm=False)
    assert raw.mean_sq_norm == pytest.approx(float(x.square().sum(1).mean()), rel=0.01)
    assert raw.variance == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), rel=0.01)
    torch.testing.assert_close(raw.mean, x.mean(0), rtol=0, atol=0.01)
    normal = made.statistics(layernorm=True)
    torch.testing.assert_close(normal.mean, layernorm_rows(x).mean(0), rtol=0, atol=0.005)
    assert normal.variance == pytest.approx(1 - float(normal.mean.square().sum()), rel=1e-6)


def test_noise_is_relative_to_the_signal() -> None:
    quiet, loud = source(noise=0.0), source(noise=0.5)
    variances = [made.statistics(layernorm=False).variance for made in (quiet, loud)]
    assert variances[1] == pytest.approx(1.25 * variances[0])
    assert float((rows(loud, 256) - rows(quiet, 256)).var()) == pytest.approx(0.25 * variances[0] / 64, rel=0.05)


def test_rows_do_not_depend_on_the_threads_of_a_machine() -> None:
    program = """
from hashlib import sha256
from tests.activations.test_synthetic import rows, source
print(sha256(rows(source(d_model=256, n_features=1024, active_features=16), 512).numpy().tobytes()).hexdigest())
"""
    command = [sys.executable, "-c", program]
    one, two = (
        subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=True).stdout
        for threads in ({"OPENBLAS_NUM_THREADS": n, "OMP_NUM_THREADS": n} for n in "12")
    )
    assert one == two and len(one.strip()) == 64


def test_rows_are_sparse_sums_of_the_dictionary() -> None:
    made = source(noise=0.0, d_model=32, n_features=16, active_features=3.0)
    assert made.dictionary is not None
    torch.testing.assert_close(made.dictionary.norm(dim=1), torch.ones(16))
    codes = torch.linalg.lstsq(made.dictionary.T, rows(made, 2000).T).solution
    on = codes.abs() > 1e-3
    assert float(on.float().sum(0).mean()) == pytest.approx(3.0, rel=0.05)
    assert codes[on].min() > 0.49 and codes[on].max() < 1.51


@given(st.integers(0, 10**9), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_batches_are_counter_based_and_ranks_divide_them(step: int, dp: int, seed: int) -> None:
    made = source(n_features=32, d_model=8)
    whole = made.stream(seed, 100, CPU).batch(step)
    parts = [made.stream(seed, 100, CPU, rank, dp).batch(step) for rank in range(dp)]
    assert torch.equal(torch.cat(parts), whole)


def test_batches_of_different_size_are_cut_from_one_stream() -> None:
    made = source()
    large = made.stream(0, 600, CPU).batch(1)
    small = torch.cat([made.stream(0, 100, CPU).batch(step) for step in range(6, 12)])
    assert torch.equal(large, small)


def test_streams_held_out_rows_and_sample_are_unrelated() -> None:
    made = source(dtype="bf16")
    heldout = torch.cat([x for x, _ in made.heldout(1000)])
    documents = torch.cat([d for _, d in made.heldout(1000)])
    assert documents.tolist() == list(range(3000)) and heldout.dtype == torch.bfloat16
    sets = [heldout[:256], rows(made, 256), rows(made, 256, seed=1), made.sample()[:256], rows(source(seed=1), 256)]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert not torch.equal(one.float(), other.float())
    assert made.train_rows is None and made.sample().shape == (32768, 64)


def test_recovered_counts_true_features_with_a_close_latent() -> None:
    truth = torch.eye(4, 8)
    assert recovered(best_cosines(3 * truth[[2, 0, 1, 3]], truth)) == {"recovered": 1.0, "mean_max_cosine": 1.0}
    half = torch.stack([truth[0], truth[1] + 0.3 * truth[2], torch.zeros(8)])
    measured = recovered(best_cosines(half, truth, block=3))
    assert measured["recovered"] == 0.5
    cosine = 1 / (1 + 0.3**2) ** 0.5
    assert measured["mean_max_cosine"] == pytest.approx((1 + cosine + 0.3 * cosine + 0) / 4)
    assert recovered(best_cosines(-truth, truth))["recovered"] == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"active_features": 0.0}, "active_features=0.0 must be at least 1e-06"),
        ({"active_features": 300.0}, "at most n_features=256"),
        ({"n_features": 0}, "n_features=0 must be at least 1"),
        ({"d_model": 0}, "d_model=0 must be at least 1"),
        ({"noise": -1.0}, "noise=-1.0 must be at least 0"),
    ],
)
def test_impossible_settings_are_one_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**spec)


def test_points_on_spheres_have_their_frequencies_dimensions_and_moments() -> None:
    made = source(noise=0.0, d_model=48, n_features=12, active_features=3.0, manifolds=[1, 0, 3])
    spans = made.dictionary
    assert spans is not None and spans.shape == (12, 4, 48)
    widths = [2, 1, 4] * 4
    for span, width in zip(spans, widths, strict=True):
        torch.testing.assert_close(span @ span.T, torch.diag((torch.arange(4) < width).float()), rtol=0, atol=1e-5)
    x = rows(made, 20_000)
    basis = torch.cat([span[:width] for span, width in zip(spans, widths, strict=True)])
    parts = torch.linalg.lstsq(basis.T.double(), x.T.double()).solution.T.split(widths, dim=1)
    expected = zipf_probabilities(12, 1.0, 3.0)
    for part, width, probability in zip(parts, widths, expected, strict=True):
        norm = part.norm(dim=1)
        on = norm > 1e-3
        assert float(on.double().mean()) == pytest.approx(probability, abs=0.015)
        assert norm[on].min() > 0.49 and norm[on].max() < 1.51
        points = part[on] / norm[on, None]
        # uniform on the sphere: mean 0, second moment 1/width in every direction; a direction has one sign
        centre = float(points.mean(dim=0).norm())
        assert centre == pytest.approx(1.0) if width == 1 else centre < 0.1
        moment = points.T @ points / len(points)
        torch.testing.assert_close(moment, torch.eye(width, dtype=torch.float64) / width, rtol=0, atol=0.05)
    raw, wide = made.statistics(layernorm=False), x.double()
    torch.testing.assert_close(raw.mean, wide.mean(0), rtol=0, atol=0.02)
    assert raw.variance == pytest.approx(float((wide - wide.mean(0)).square().sum(1).mean()), rel=0.02)


def test_without_spheres_rows_and_ids_are_those_of_earlier_versions() -> None:
    plain, zeros = source(), source(manifolds=[0])
    assert torch.equal(rows(plain, 300), rows(zeros, 300))
    assert plain.id == "b9f9e4bd7bdf5668" and zeros.id != plain.id


def test_a_latent_belongs_to_a_sphere_by_its_angle_to_the_span() -> None:
    spans = torch.zeros(2, 2, 6)
    spans[0, :, :2], spans[1, 0, 2] = torch.eye(2), 1.0
    decoder = torch.tensor([[0.6, 0.8, 0, 0, 0, 0], [-1, 0, 0.1, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, -3, 0, 0, 0]])
    torch.testing.assert_close(best_cosines(decoder, spans), torch.tensor([1.0, 1.0]))
    assert close_latents(decoder, spans) == 3
