"""Architectures at equal measured L0: interpolation in log L0 and log FLOPs, with exact power laws as truth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.questions.paired import PairedErrors
from analysis.questions.sparsity import at_equal_l0, frontiers, order
from analysis.report.page import write_report
from analysis.runs.table import RunTable
from tests.analysis.generate import write_run


def table() -> RunTable:
    """TopK: loss = n^-0.2·L0^-0.5 and FLOPs = n·L0^0.1. Gated: 1.1 times that at its own L0, twice the FLOPs."""
    rows = []
    for n in (256, 512, 1024):
        for k in (8, 16, 32):
            rows.append(("topk", n, k, float(k), n**-0.2 * k**-0.5, n * k**0.1))
            l0 = k * 1.25
            rows.append(("gated", n, k, l0, 1.1 * n**-0.2 * l0**-0.5, 2 * n * l0**0.1))
    frame = pd.DataFrame(rows, columns=["sae", "n_latents", "k", "l0", "fvu", "flops"])
    frame["run_id"] = [f"r{i}" for i in range(len(frame))]
    frame["status"] = "done"
    return RunTable(frame, dict(ROLES))


ROLES = {"n": "n_latents", "k": "k", "l0": "l0", "loss": "fvu", "flops": "flops", "run": "run_id", "status": "status"}


def test_ratios_are_those_of_the_laws() -> None:
    rows = at_equal_l0(table())
    assert {row["sae"] for row in rows} == {"gated"}
    inside = [row for row in rows if row["ratio_n"] is not None]
    # L0 = 40 lies beyond the runs of TopK
    assert sorted({round(row["l0"]) for row in inside}) == [10, 20]
    assert all(row["ratio_n"] == pytest.approx(1.1) for row in inside)
    # at equal FLOPs TopK is twice as wide: 2^-0.2 lower
    flops = [row["ratio_flops"] for row in rows if row["ratio_flops"] is not None]
    assert len(flops) == 4 and all(ratio == pytest.approx(1.1 * 2**0.2) for ratio in flops)
    (mean,) = order(rows, "n")
    assert (mean["ratio"], mean["cells"], mean["ends"]) == (pytest.approx(1.1), 6, None)


def test_intervals_are_of_the_paired_difference() -> None:
    runs = table()
    names = tuple(runs.frame["run_id"])
    generator = np.random.default_rng(0)
    common = generator.normal(size=(1, 50)) * 0.1
    own = generator.normal(size=(len(names), 50)) * 1e-3
    rows = at_equal_l0(runs, PairedErrors(names, common + own, None, 0))
    row = next(row for row in rows if row["ratio_n"] is not None)
    assert sum(row["weights_n"].values()) == pytest.approx(0)
    low, high = row["ends_n"]
    # the common error, a hundred times as large, has cancelled
    assert low < 1.1 < high and math.log(high / low) < 0.1


def test_without_topk_there_is_no_comparison() -> None:
    frame = table().frame
    alone = RunTable(frame[frame["sae"] == "gated"].reset_index(drop=True), ROLES)
    assert at_equal_l0(alone) == []
    assert [frontier.architecture for frontier in frontiers(alone)] == ["gated"] * 3


def test_the_report_shows_several_architectures(tmp_path: Path) -> None:
    for name, factor in (("topk", 1.0), ("gated", 1.1), ("relu", 1.3)):
        for n in (256, 512):
            for k in (8, 16, 32):
                loss, l0 = factor * n**-0.2 * k**-0.5, k * (1.0 if name == "topk" else 1.2)
                write_run(tmp_path, sae=name, n=n, k=k, fvu=loss, extra={"l0": l0})
    page = write_report(tmp_path).read_text()
    assert "Architectures at equal sparsity" in page and "one panel for each n" in page
    first = page.index("fvu over that of TopK at equal n and L0")
    assert page.index("gated", first) < page.index("relu", first)
    # 1.1·(1.2·8)^-0.5 against TopK at the same L0, which is (1.2·8)^-0.5·… lower by 1.2^0.5 than at k
    ratio = 1.1 * 1.2**0.5
    assert f"{ratio:.3f}" in page


def test_a_law_in_measured_l0(tmp_path: Path) -> None:
    # SAEs with a penalty end near their target, and the law holds for the L0 that they reached
    miss = iter(np.random.default_rng(0).uniform(0.7, 1.4, 12))
    for n in (256, 512, 1024):
        for target in (8, 16, 32, 64):
            l0 = target * next(miss)
            write_run(tmp_path, sae="relu", n=n, k=target, fvu=3 * n**-0.2 * l0**-0.5, extra={"l0": l0})

    def fit(*options: str) -> dict[str, float]:
        out, law = tmp_path / "fit.json", "sae_nk_no_interaction_no_floor"
        assert main(["fit", str(tmp_path), "--law", law, "--ci", "wald", *options, "--out", str(out)]) == 0
        return {name: found["value"] for name, found in json.loads(out.read_text())["params"].items()}

    measured = fit("--k", "l0")
    assert measured["beta_n"] == pytest.approx(-0.2, abs=1e-6)
    assert measured["beta_k"] == pytest.approx(-0.5, abs=1e-6)
    assert abs(fit()["beta_k"] + 0.5) > 0.01
