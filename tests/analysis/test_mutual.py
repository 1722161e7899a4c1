"""What mutual feature regularisation does, against planted losses and planted common features."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from analysis.questions.mutual import mutual
from analysis.questions.seeds import seed_stability
from harness.errors import UserError
from tests.analysis.test_paired import cells, heldout, table_of


def a_table(tmp_path, common):
    """Four seeds without the regulariser, and the same in two groups of peers with it, whose loss is 0.9 of it.

    Of 40 rows of each dictionary the first `common[kind]` are those of its peers (0), of all with the regulariser (1).
    """
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.05, 4)
    losses = np.exp([*np.log(0.3) + seeds, *np.log(0.27) + seeds])
    variance, errors = heldout(losses, rng, own=0.02)
    groups = ["0, 1", "0, 1", "2, 3", "2, 3"]
    settings = {
        "seed": [0, 1, 2, 3] * 2,
        "train.mfr_weight": [0.0] * 4 + [2.0] * 4,
        "train.mfr_seeds": [""] * 4 + groups,
    }
    table = table_of(tmp_path, cells([40] * 8).assign(**settings), variance, errors)
    everybody = rng.standard_normal((40, 500))
    for first in (4, 6):
        ours = rng.standard_normal((40, 500))
        for run in (first, first + 1):
            rows = rng.standard_normal((40, 500))
            rows[: common[0]] = ours[: common[0]]
            rows[: common[1]] = everybody[: common[1]]
            save(table, run, rows)
    for run in range(4):
        save(table, run, rng.standard_normal((40, 500)))
    return table


def save(table, run, rows):
    folder = table.directories[f"a{run}"] / "sae"
    folder.mkdir(exist_ok=True)
    save_file({"W_dec": rows.astype(np.float32)}, folder / "sae.safetensors")


def test_a_planted_gain_and_planted_features_are_found(tmp_path):
    table = a_table(tmp_path, common=(30, 10))
    (found,) = mutual(table)
    assert (found.weight, found.runs) == (2.0, 4)
    low, high = found.interval
    assert low is not None and high is not None
    # the seeds differ by 5 % and are paired
    assert low < 0.9 < high and high - low < 0.01
    chance = found.chance
    assert chance is not None
    assert found.without == pytest.approx(chance, abs=0.02) and chance < 0.2
    assert found.peers == pytest.approx(0.75 + 0.25 * chance, abs=0.01)
    assert found.strangers == pytest.approx(0.25 + 0.75 * chance, abs=0.01)
    # nor are dictionaries with it compared with those without
    assert [round(entry.mean_cosine, 1) for entry in seed_stability(table)] == [0.1, 0.8]


def test_without_a_control_there_is_nothing_to_compare(tmp_path):
    table = a_table(tmp_path, common=(0, 0))
    with pytest.raises(UserError, match="no seed trained both with"):
        mutual(table.but(frame=table.frame[table.frame["train.mfr_weight"] > 0]))
    with pytest.raises(UserError, match=r"no run has train\.mfr_weight"):
        mutual(table.but(frame=table.frame.drop(columns="train.mfr_weight")))
