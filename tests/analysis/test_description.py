"""The n with the fewest bits at equal error, where it is known."""

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.questions.description import BITS, description_lengths
from analysis.runs.table import RunTable
from harness.errors import UserError

SIZES = (64, 128, 256, 512, 1024)


def table_of(best: float, seeds: int = 1, noise: float = 0.0) -> RunTable:
    """fvu = 4·k^−0.6·n^−0.2, and bits with a parabola in ln n at every fvu, whose minimum is at `best`."""
    rng = np.random.default_rng(0)
    rows = []
    for n in SIZES:
        for k in (2, 4, 8, 16, 32, 64):
            for seed in range(seeds):
                fvu = 4 * k**-0.6 * n**-0.2
                bits = 300 * fvu**-1.5 * np.exp(0.1 * np.log(n / best) ** 2 + noise * rng.standard_normal())
                rows.append({"sae": "topk", "n_latents": n, "k": k, "seed": seed, "fvu": fvu, BITS: bits})
    frame = pd.DataFrame(rows).assign(run_id=[f"r{i}" for i in range(len(rows))])
    return RunTable(frame, {"n": "n_latents", "k": "k", "loss": "fvu", "run": "run_id", "seed": "seed"})


@pytest.mark.parametrize("best", [128, 256, 512])
def test_a_minimum_inside_the_grid_is_found_at_every_error(best: int) -> None:
    table = table_of(best, seeds=3, noise=0.01)
    assert len(description_lengths(table)) >= 5
    found = description_lengths(table, [0.2, 0.3, 0.5])
    assert [len(entry.n) for entry in found] == [5, 5, 5]
    assert all(entry.best == best and entry.inside and entry.by_seed == (best,) * 3 for entry in found)


@pytest.mark.parametrize(("best", "edge"), [(8, 64), (9000, 1024)])
def test_an_edge_is_called_one(best: int, edge: int) -> None:
    found = description_lengths(table_of(best), [0.3])
    assert [(entry.best, entry.inside) for entry in found] == [(edge, False)]


def test_bits_and_k_are_those_of_the_error() -> None:
    (found,) = description_lengths(table_of(256), [0.3])
    assert found.n == SIZES
    for n, k, bits in zip(found.n, found.k, found.bits, strict=True):
        assert 4 * k**-0.6 * n**-0.2 == pytest.approx(0.3, rel=1e-6)
        assert bits == pytest.approx(300 * 0.3**-1.5 * np.exp(0.1 * np.log(n / 256) ** 2), rel=1e-6)


def test_nothing_is_extrapolated() -> None:
    with pytest.raises(UserError, match="no fvu is reached by 3 sizes"):
        description_lengths(table_of(256), [5.0])
    with pytest.raises(UserError, match="--metrics mdl"):
        description_lengths(RunTable(table_of(256).frame.drop(columns=BITS), {"n": "n_latents", "loss": "fvu"}))


def test_the_command_prints_the_best_n(tmp_path, capsys) -> None:
    path = tmp_path / "runs.csv"
    table_of(512).frame.to_csv(path, index=False)
    roles = ["--n", "n_latents", "--k", "k", "--loss", "fvu"]
    assert main(["description", str(path), *roles, "--at-fvu", "0.3"]) == 0
    assert "512  inside the grid" in capsys.readouterr().out
