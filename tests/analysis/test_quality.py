"""Qualities are columns like any other: a law of KL is fitted like one of fvu."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from analysis.cli import main
from analysis.questions.quality_pairs import quality_pairs
from analysis.questions.seeds import seed_stability
from analysis.report.quality import quality_section
from analysis.runs.load import load
from analysis.runs.populations import differing
from harness.errors import UserError
from harness.record.quality import Value, quality_path, write_quality
from harness.schema import with_seal


@pytest.fixture
def sweep(topk_run: Path, tmp_path: Path) -> Path:
    """A grid of runs with a known law of KL: 2·n^−0.5·k^−0.3."""
    result = json.loads((topk_run / "result.json").read_text())
    for n in (256, 512, 1024, 2048):
        for k in (8, 16, 32):
            run = tmp_path / "t" / f"n{n}k{k}"
            run.mkdir(parents=True)
            run.joinpath("result.json").write_text(
                json.dumps(with_seal(result | {"run_id": run.name, "n_latents": n, "k": k}))
            )
            kl = 2 * n**-0.5 * k**-0.3 * (1 + 0.01 * ((n + 3 * k) % 7 - 3))
            about = {"metric": "downstream", "version": 1, "settings": {}, "weights": "", "tokens": 10}
            values = {"kl": Value(kl, 0.01 * kl), "delta_ce": Value(kl - 0.01)}
            write_quality(run, about, values, {}, {"document": np.arange(2)}, {})
    shutil.copytree(topk_run, tmp_path / "t" / topk_run.name)  # not evaluated
    return tmp_path / "t"


def test_columns(sweep: Path) -> None:
    table = load(sweep, {"loss": "quality.downstream.kl"})
    assert table.roles["loss_se"] == "quality.downstream.kl_se" and len(table) == 12
    assert len(table.excluded) == 1  # the run without a value
    row = table.frame[table.frame["run_id"] == "n256k8"].iloc[0]
    assert row["quality.downstream.kl"] == pytest.approx(2 * 256**-0.5 * 8**-0.3, rel=0.05)
    assert differing(table) == [], "what is measured is no setting"
    assert len(load(sweep)) > 0  # fvu is still the loss where none is named


def test_a_law_of_kl(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fit.json"
    arguments = ["fit", str(sweep), "--law", "sae_nk_no_interaction", "--loss", "quality.downstream.kl"]
    assert main([*arguments, "--starts", "8", "--out", str(out)]) in (0, 1)
    text = "".join(capsys.readouterr())
    assert "quality.downstream.kl" in text


def test_delta_ce_is_refused_by_name(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(sweep), "--loss", "quality.downstream.delta_ce"]) == 2
    assert "use quality.downstream.kl" in capsys.readouterr().err


def test_a_damaged_file_is_named(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quality_path(sweep / "n256k8", "downstream")
    path.write_text(path.read_text().replace('"tokens": 10', '"tokens": 11'))
    assert main(["fit", str(sweep), "--loss", "quality.downstream.kl"]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_the_report_shows_it(sweep: Path) -> None:
    assert main(["report", str(sweep)]) == 0
    page = (sweep / "report.html").read_text()
    assert "Quality of the features" in page and "KL against width" in page and "topk: KL = " in page


@pytest.fixture
def two_kinds(topk_run: Path, tmp_path: Path) -> Path:
    """TopK and Switch with the same k on the same documents. Documents differ by far more than the architectures."""
    result = json.loads((topk_run / "result.json").read_text())
    generator = np.random.default_rng(0)
    difficulty, positions = np.exp(generator.normal(0, 1, 50)), generator.integers(50, 80, 50).astype(float)
    for sae, factor in (("topk", 1.0), ("switch", 1.3)):
        for n in (256, 512):
            run = tmp_path / "pairs" / f"{sae}{n}"
            run.mkdir(parents=True)
            about = {"run_id": run.name, "sae": sae, "n_latents": n, "k": 8}
            run.joinpath("result.json").write_text(json.dumps(with_seal(result | about)))
            kl = factor * difficulty * positions * (1 + 0.01 * generator.normal(size=50))
            sums = {"kl": kl, "positions": positions, "ce": 3 * positions + kl, "tokens": positions}
            value, ce = float(kl.sum() / positions.sum()), float((kl / positions).mean())
            settings = {"store": "s", "tokens": 10}
            written = {"metric": "downstream", "version": 1, "settings": settings, "weights": "", "tokens": 10}
            write_quality(run, written, {"kl": Value(value, 0.2), "delta_ce": Value(ce)}, {}, sums, {})
    return tmp_path / "pairs"


def test_differences_are_paired_by_document(two_kinds: Path) -> None:
    """The spread of the documents cancels: the interval is that of what is left."""
    pairs = quality_pairs(load(two_kinds))
    assert [(pair.first, pair.second, pair.n, pair.k) for pair in pairs] == [
        ("topk", "switch", 256, 8.0),
        ("topk", "switch", 512, 8.0),
    ]
    for pair in pairs:
        low, high = pair.kl_interval
        assert low is not None and high is not None and low < 1.3 < high and high - low < 0.03
        low, high = pair.delta_ce_interval
        assert low is not None and high is not None and 0 < low < pair.delta_ce < high
    assert main(["report", str(two_kinds)]) in (0, 1)
    assert "times the KL of topk" in (two_kinds / "report.html").read_text()


def test_sums_of_other_documents_are_not_paired(two_kinds: Path) -> None:
    path = two_kinds / "switch256" / "quality" / "downstream.per_document.parquet"
    sums = pd.read_parquet(path)
    sums.assign(positions=sums["positions"] + 1).to_parquet(path)
    assert [pair.n for pair in quality_pairs(load(two_kinds))] == [512]
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        quality_pairs(load(two_kinds))


def test_what_another_seed_finds_again(topk_run: Path, tmp_path: Path) -> None:
    """Half of the rows are those of the other seed in another order, half are its own."""
    result = json.loads((topk_run / "result.json").read_text())
    generator = np.random.default_rng(7)
    rows = generator.standard_normal((64, 400), dtype=np.float32)
    other = rows[generator.permutation(64)].copy()
    other[:32] = generator.standard_normal((32, 400), dtype=np.float32)
    for seed, W_dec in enumerate((rows, 3 * other)):
        run = tmp_path / "seeds" / f"seed{seed}"
        (run / "sae").mkdir(parents=True)
        about = {"run_id": run.name, "seed": seed, "n_latents": 64, "fvu": 0.4 + 0.01 * seed}
        run.joinpath("result.json").write_text(json.dumps(with_seal(result | about)))
        save_file({"W_dec": W_dec}, run / "sae" / "sae.safetensors")
        about = {"metric": "geometry", "version": 1, "settings": {}, "weights": "", "tokens": 0}
        write_quality(run, about, {"duplicates": Value(0.0)}, {}, {}, {})
    (found,) = seed_stability(load(tmp_path / "seeds"))
    assert found.shared == 0.5 and found.random_cosine < 0.3
    assert found.mean_cosine == pytest.approx((1 + found.random_cosine) / 2, abs=0.05)
    section = quality_section(load(tmp_path / "seeds"))
    assert section is not None and "50 % of the decoder rows of one seed" in section["lines"][0]
    (tmp_path / "seeds" / "seed0" / "sae" / "sae.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        seed_stability(load(tmp_path / "seeds"))
