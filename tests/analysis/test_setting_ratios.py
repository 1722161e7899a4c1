"""Ratios of losses between values of a setting, against ratios that were planted."""

import numpy as np
import pytest

from analysis.questions.setting_ratios import setting_ratios
from harness.errors import UserError
from tests.analysis.test_paired import cells, heldout, table_of


def table(tmp_path, losses, routings, n, noise=0.0):
    variance, errors = heldout(losses, np.random.default_rng(0), own=noise)
    frame = cells(n, sae="switch").assign(**{"sae.routing": routings, "sae.consistency": 0.0})
    return table_of(tmp_path, frame, variance, errors)


def test_planted_ratios_are_found_inside_their_intervals(tmp_path):
    losses = [0.20, 0.202, 0.24, 0.242, 0.30, 0.302]
    runs = table(tmp_path, losses, ["learned"] * 2 + ["hash"] * 2 + ["random"] * 2, [64] * 6, noise=0.05)
    found = {entry.setting: entry for entry in setting_ratios(runs, {"sae.routing": "learned"})}
    for setting, ratio in (("sae.routing=hash", 1.2), ("sae.routing=random", 1.5)):
        low, high = found[setting].interval
        assert low is not None and high is not None
        assert low < ratio < high and high - low < 0.15
        assert found[setting].runs == 2
        assert found[setting].ratio == pytest.approx(found[setting].loss / found[setting].base)


def test_cells_are_compared_with_their_own_base(tmp_path):
    runs = table(tmp_path, [0.4, 0.2, 0.44, 0.3], ["learned", "learned", "hash", "hash"], [64, 128, 64, 128])
    found = setting_ratios(runs, {"sae.routing": "learned", "sae.consistency": "0"})
    assert [(entry.cell.split(", ")[2], round(entry.ratio, 2)) for entry in found] == [
        ("n_latents=128", 1.5),
        ("n_latents=64", 1.1),
    ]
    assert {entry.setting for entry in found} == {"sae.routing=hash"}


def test_a_base_that_does_not_occur_is_an_error(tmp_path):
    runs = table(tmp_path, [0.4, 0.2], ["learned", "hash"], [64, 64])
    with pytest.raises(UserError, match="no column 'routing'"):
        setting_ratios(runs, {"routing": "learned"})
    with pytest.raises(UserError, match=r"has runs with sae\.routing=best and others"):
        setting_ratios(runs, {"sae.routing": "best"})
