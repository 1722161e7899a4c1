"""Both regimes of the law of manifolds, from allocations of latents that are known to be best."""

import heapq

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.questions.manifolds import Regime, expected, regimes
from analysis.runs.table import RunTable
from harness.errors import UserError

FEATURES = 20_000
SIZES = (64, 128, 256, 512, 1024)


def best_allocation(alpha: float, beta: float) -> pd.DataFrame:
    """The n latents that lower Σ p_i·(1 + s_i)^−β most, one by one: the gains of a feature fall, so greed is best."""
    p = np.arange(1, FEATURES + 1) ** -(1 + alpha)
    gains = [(-float(p[i]) * (1 - 2**-beta), i, 1) for i in range(FEATURES)]
    heapq.heapify(gains)
    held = np.zeros(FEATURES)
    rows = []
    for n in range(1, SIZES[-1] + 1):
        _, i, s = heapq.heappop(gains)
        held[i] = s
        heapq.heappush(gains, (-float(p[i]) * ((s + 1) ** -beta - (s + 2) ** -beta), i, s + 1))
        if n in SIZES:
            tail = FEATURES**-alpha / alpha
            loss = float((p * (1 + held) ** -beta).sum()) + tail
            rows.append({"sae": "topk", "n_latents": n, "k": 1, "fvu": loss, "recovered": (held > 0).mean()})
    return pd.DataFrame(rows)


def table_of(frame: pd.DataFrame) -> RunTable:
    frame = frame.assign(run_id=[f"r{i}" for i in range(len(frame))])
    return RunTable(frame, {"n": "n_latents", "k": "k", "loss": "fvu", "run": "run_id"})


def test_two_laws_with_one_exponent_are_told_apart() -> None:
    """Both losses fall about as n^−½: new features at α = ½ and β = 2 (circles), tiling at α = 3/2 and β = ½."""
    (new,), (tiling,) = (regimes(table_of(best_allocation(*law))) for law in ((0.5, 2.0), (1.5, 0.5)))
    assert new.loss == pytest.approx(0.5, abs=0.1) and tiling.loss == pytest.approx(0.5, abs=0.1)
    assert new.found == pytest.approx(expected(0.5, 2.0)[0], abs=0.1)
    assert tiling.found == pytest.approx(expected(1.5, 0.5)[0], abs=0.1)
    assert new.tiles is False and tiling.tiles is True
    assert expected(0.5, 2.0) == (1.0, 0.5) and expected(1.5, 0.5) == (0.6, 0.5)


def test_an_interval_with_both_decides_nothing() -> None:
    assert Regime("", 3, 0.9, (0.6, 1.2), 0.5, (0.4, 0.6)).tiles is None
    assert Regime("", 3, 0.9, (None, None), 0.5, (None, None)).tiles is None
    assert Regime("", 3, 0.9, (0.85, 1.1), 0.5, (0.4, 0.6)).tiles is False


def test_saturated_runs_are_left_out() -> None:
    frame = best_allocation(0.5, 2.0).assign(recovered=[0.2, 0.4, 0.8, 0.95, 1.0])
    (found,) = regimes(table_of(frame))
    assert found.sizes == 3 and found.found == pytest.approx(1.0)
    with pytest.raises(UserError, match="recover something and at most 90%"):
        regimes(table_of(frame.assign(recovered=1.0)))
    with pytest.raises(UserError, match="activations=synthetic"):
        regimes(table_of(frame.drop(columns="recovered")))


def test_the_command_names_the_regime(tmp_path, capsys) -> None:
    path = tmp_path / "runs.csv"
    best_allocation(1.5, 0.5).to_csv(path, index=False)
    assert main(["manifolds", str(path), "--n", "n_latents", "--k", "k", "--loss", "fvu"]) == 0
    assert "tile" in capsys.readouterr().out
