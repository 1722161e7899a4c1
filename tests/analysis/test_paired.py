"""Paired differences: sums per document, their intervals, and what is said with them."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from analysis.questions.learning_rate import best_rates
from analysis.questions.paired import PairedErrors, contrast, paired_errors, rises
from analysis.questions.versus import equal_n_and_flops, mean_ratio
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.record.heldout import write_heldout


def heldout(losses, rng, documents=300, own=0.0, variance_spread=0.5):
    """(documents,) variance and (runs, documents) errors: documents differ much, runs differ little within each."""
    variance = rng.lognormal(0, variance_spread, documents)
    hard = rng.lognormal(0, 0.4, documents)
    noise = np.exp(own * rng.standard_normal((len(losses), documents)))
    return variance, np.array(losses)[:, None] * (hard / hard.mean() * variance) * noise


def table_of(tmp_path, frame, variance, errors, name="a"):
    """A sweep's table whose loss is the ratio of the given sums."""
    frame = frame.assign(fvu=errors.sum(axis=1) / variance.sum(), run_id=[f"{name}{i}" for i in range(len(frame))])
    homes, hashes = {}, []
    for run, error in zip(frame["run_id"], errors, strict=True):
        homes[run] = tmp_path / run
        homes[run].mkdir(parents=True, exist_ok=True)
        count = np.arange(len(variance))
        sums = {"document": count, "documents": count * 0 + 1, "rows": count * 0 + 64}
        hashes.append(write_heldout(homes[run], sums | {"error": error, "variance": variance}))
    roles = {"n": "n_latents", "k": "k", "loss": "fvu", "run": "run_id", "flops": "flops", "lr": "lr"}
    table = RunTable(frame.assign(heldout_sha256=hashes, store_id="s", lr=frame.get("lr", 1.0)), roles)
    table.directories = homes
    return table


def cells(n, sae="topk"):
    n = np.array(n)
    return pd.DataFrame({"n_latents": n, "k": 8, "n_experts": 1, "sae": sae, "flops": n * 1e9, "tokens": 1e5})


def test_the_standard_error_of_one_run_is_that_of_the_record(tmp_path):
    variance, errors = heldout([0.2, 0.21], np.random.default_rng(0), own=0.1)
    paired = paired_errors(table_of(tmp_path, cells([64, 128]), variance, errors))
    assert paired is not None and paired.documents == 300
    fvu = errors[0].sum() / variance.sum()
    residual = errors[0] - fvu * variance
    recorded = np.sqrt(300 / 299 * np.square(residual).sum()) / variance.sum()  # as `training.evaluate` computes it
    assert paired.sd({"a0": 1.0}) == pytest.approx(recorded / fvu, rel=1e-12)


@pytest.mark.parametrize("own", [0.02, 0.2])
def test_intervals_of_differences_cover_and_are_narrow(tmp_path, own):
    """The truth is the ratio in the population of documents that 400 samples of documents are drawn from."""
    inside, widths, apart = [], [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        variance, errors = heldout([0.2, 0.206], rng, documents=120, own=own)
        influence = np.array([e / e.sum() - variance / variance.sum() for e in errors])
        paired = PairedErrors(("a", "b"), influence, None, 0)
        value = np.log(errors[1].sum() / errors[0].sum())
        ends = paired.interval(contrast(["b"], ["a"]), value)
        assert ends is not None
        inside.append(ends[0] <= np.log(1.03) <= ends[1])
        sd, one = paired.sd(contrast(["b"], ["a"])), paired.sd({"a": 1.0})
        assert sd is not None and one is not None
        widths.append(sd)
        apart.append(one)
    assert 0.92 <= np.mean(inside) <= 0.98
    assert np.mean(widths) < (0.1 if own < 0.1 else 0.9) * np.mean(apart)


def test_repeats_widen_the_interval(tmp_path):
    variance, errors = heldout([0.2, 0.202, 0.21, 0.212], np.random.default_rng(1))
    paired = paired_errors(table_of(tmp_path, cells([64, 64, 128, 128]), variance, errors))
    assert paired is not None and paired.repeat_dof == 2 and paired.repeat_sd is not None
    assert paired.repeat_sd == pytest.approx(0.01 / np.sqrt(2), rel=0.1)
    weights = contrast(["a2", "a3"], ["a0", "a1"])
    ends = paired.interval(weights, 0.0)
    assert ends is not None and ends[1] == pytest.approx(4.303 * paired.repeat_sd, rel=0.02)  # t with 2 dof


def test_common_error_is_the_level_and_own_error_is_the_rest(tmp_path):
    variance, errors = heldout([0.3, 0.2, 0.15], np.random.default_rng(2), own=0.0)
    paired = paired_errors(table_of(tmp_path, cells([64, 128, 256]), variance, errors))
    assert paired is not None
    assert paired.own < 1e-12 < 0.01 < paired.common
    assert paired.common == pytest.approx(paired.sd({"a0": 1.0}))
    assert "300 documents" in paired.sentence() and "level of a law only" in paired.sentence()


def test_runs_of_other_documents_or_without_sums_are_not_paired(tmp_path):
    variance, errors = heldout([0.2, 0.21, 0.22], np.random.default_rng(3))
    table = table_of(tmp_path, cells([64, 128, 256]), variance, errors)
    (tmp_path / "a2" / "heldout.parquet").unlink()
    paired = paired_errors(table)
    assert paired is not None and paired.runs == ("a0", "a1") and paired.sd({"a2": 1.0, "a0": -1.0}) is None
    table.frame.loc[1, "store_id"] = "another"
    assert paired_errors(table) is None
    assert paired_errors(RunTable(cells([64, 128]).assign(fvu=0.5), {"n": "n_latents", "loss": "fvu"})) is None


def test_a_damaged_file_is_named(tmp_path):
    variance, errors = heldout([0.2, 0.21], np.random.default_rng(4))
    table = table_of(tmp_path, cells([64, 128]), variance, errors)
    (tmp_path / "a1" / "heldout.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a1/heldout.parquet is damaged .* remove it"):
        paired_errors(table)


def test_the_hash_of_the_record_is_that_of_the_file(tmp_path):
    sha256 = write_heldout(tmp_path, {"document": np.arange(3), "error": np.ones(3)})
    assert sha256 == hashlib.sha256((tmp_path / "heldout.parquet").read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.parquet"]


@pytest.mark.parametrize(("loss", "rising"), [(0.2003, 0), (0.21, 1), (0.19, 0)])
def test_a_rise_with_n_counts_beyond_its_error_only(tmp_path, loss, rising):
    variance, errors = heldout([0.2, loss], np.random.default_rng(5), own=0.1)
    table = table_of(tmp_path, cells([64, 128]), variance, errors)
    assert len(rises(table, paired_errors(table))) == rising


def test_topk_against_switch_has_intervals(tmp_path):
    frame = pd.concat([cells([64, 128, 256]), cells([128, 256], "switch").assign(n_experts=4, flops=[1e11, 2e11])])
    variance, errors = heldout([0.3, 0.2, 0.15, 0.22, 0.165], np.random.default_rng(6), own=0.05)
    table = table_of(tmp_path, frame.reset_index(drop=True), variance, errors)
    paired = paired_errors(table)
    rows = equal_n_and_flops(table, paired)
    assert rows[0]["ends_n"][0] < rows[0]["ratio_n"] < rows[0]["ends_n"][1] and rows[0]["ends_n"][0] > 1.05
    assert sum(rows[0]["weights_flops"].values()) == pytest.approx(0)
    assert rows[0]["ends_flops"][0] < rows[0]["ratio_flops"] < rows[0]["ends_flops"][1]
    mean, ends = mean_ratio(rows, "n", paired) or (0.0, None)
    assert mean == pytest.approx(1.1, rel=0.02) and ends is not None and ends[0] < mean < ends[1]
    assert equal_n_and_flops(table)[0]["ends_n"] is None


def test_topk_is_interpolated_along_its_curve_not_its_chord():
    """A straight line between two sizes is 0.9 % above this curve in the middle, as much as a paired interval."""
    n = np.array([256.0, 512, 1024, 2048, 4096, 8192])
    topk = cells(n).assign(flops=n * 1e9, fvu=0.1 + 10 * n**-0.8)
    between = np.array([362.0, 1448, 5793])  # in the first, a middle and the last gap
    switch = cells(8 * between, "switch").assign(n_experts=8, flops=between * 1e9, fvu=0.9 * (0.1 + 10 * between**-0.8))
    frame = pd.concat([topk, switch], ignore_index=True).assign(run=lambda f: f.index.astype(str))
    table = RunTable(frame, {"n": "n_latents", "k": "k", "loss": "fvu", "flops": "flops", "run": "run"})
    ratios = [row["ratio_flops"] for row in equal_n_and_flops(table)]
    assert ratios == pytest.approx([0.9] * 3, rel=2e-3)


def test_rates_that_cannot_be_told_apart_are_counted(tmp_path):
    frame = cells([64] * 4).assign(lr=[1e-3, 2e-3, 4e-3, 8e-3])
    variance, errors = heldout([0.21, 0.2, 0.2001, 0.25], np.random.default_rng(7), own=0.1)
    table = table_of(tmp_path, frame, variance, errors)
    assert best_rates(table, paired_errors(table)).rates["as_good"].tolist() == [1]
    assert best_rates(table).rates["as_good"].tolist() == [None]
