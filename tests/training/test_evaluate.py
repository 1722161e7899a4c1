"""Held-out fvu, its standard error and the PCA anchor against direct computation."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.ops import choose_ops
from harness.parallel import Solo
from harness.process.signals import StopFlag
from harness.saes import forward
from harness.training import evaluate as evaluation
from harness.training.evaluate import HeldOutErrors, evaluate, pca_fvu
from harness.training.state import make_state
from tests.training.members import runtime, small_config, source_of


@pytest.mark.parametrize("architecture", ["topk", "switch"])
def test_fvu_is_the_ratio_of_sums_over_every_row(architecture: str) -> None:
    experts = 4 if architecture == "switch" else 1
    config = small_config(sae__architecture=architecture, sae__n_experts=experts, train__precision="fp64")
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(Solo(), ops))
    arguments = (member.sae, member.params, source, member.normalizer)
    found = evaluate(*arguments, (500, 10**9), runtime(Solo(), ops))
    assert found is not None and [e.rows for e in found] == [500, 1500]

    rows = torch.cat([rows for rows, _ in source.heldout(700)]).double() / member.normalizer.scale
    mean = source.statistics(False).mean / member.normalizer.scale
    run = forward(member.sae, member.params, member.params, rows, runtime(Solo(), ops))
    error = run.residual.square().sum()
    assert found[1].fvu == pytest.approx(float(error / (rows - mean).square().sum()), rel=1e-12)
    assert found[1].mse == pytest.approx(float(error) / 1500 * member.normalizer.scale**2, rel=1e-6)


def test_standard_error_is_that_of_a_bootstrap_over_documents() -> None:
    config = small_config(train__precision="fp64")
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(Solo(), ops))
    documents = torch.arange(1500) // 10

    class Clustered:
        """The same rows, ten to a document, made alike within each."""

        def __getattr__(self, name: str):
            return getattr(source, name)

        def heldout(self, batch_rows: int):
            for rows, _ in source.heldout(1500):
                yield rows[documents * 10], documents

    found = evaluate(
        member.sae, member.params, cast(Any, Clustered()), member.normalizer, (1500,), runtime(Solo(), ops)
    )
    assert found is not None
    rows = next(iter(Clustered().heldout(0)))[0].double() / member.normalizer.scale
    run = forward(member.sae, member.params, member.params, rows, runtime(Solo(), ops))
    mean = source.statistics(False).mean / member.normalizer.scale
    error = run.squared.view(150, 10).sum(1).numpy()
    base = (rows - mean).square().sum(1).view(150, 10).sum(1).numpy()
    draws = np.random.default_rng(0).integers(0, 150, (4000, 150))
    bootstrap = (error[draws].sum(1) / base[draws].sum(1)).std()
    assert found[0].fvu_se == pytest.approx(bootstrap, rel=0.1)


def test_evaluation_stops_when_asked() -> None:
    config = small_config()
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(Solo(), ops))
    stop = StopFlag()
    stop.request()
    assert (
        evaluate(member.sae, member.params, source, member.normalizer, (500,), runtime(Solo(), ops, stop=stop)) is None
    )


def test_pca_anchor_is_the_best_rank_k_reconstruction() -> None:
    config = small_config()
    source = source_of(config)
    member = make_state(config, source, runtime(Solo(), choose_ops("reference")))
    rows = torch.cat([rows for rows, _ in source.heldout(700)]).double() / member.normalizer.scale
    centred = rows - source.statistics(False).mean / member.normalizer.scale
    spectrum = torch.linalg.svdvals(centred).square()
    for rank in (1, 4, 16):
        assert pca_fvu(source, member.normalizer, rank) == pytest.approx(
            float(spectrum[rank:].sum() / spectrum.sum()), abs=1e-10
        )


@pytest.mark.parametrize(("documents", "most"), [(1, 8192), (7, 8192), (150, 8192), (150, 40), (150, 149)])
def test_sums_by_document(documents: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_GROUPS", most)
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(5, 900, dtype=torch.float64, generator=generator)
    document = 3 + 2 * torch.randint(documents, (900,), generator=generator)
    sums = HeldOutErrors(table, document, layernorm=False).by_document()
    present = document.unique()
    assert len(sums["document"]) == min(len(present), most)
    assert sums["documents"].sum() == len(present) and sums["rows"].sum() == 900
    assert max(sums["documents"]) - min(sums["documents"]) <= 1
    ends = [*sums["document"].tolist()[1:], 10**9]
    for i, (first, end) in enumerate(zip(sums["document"].tolist(), ends, strict=True)):
        mine = (document >= first) & (document < end)
        assert int(mine.sum()) == sums["rows"][i] and len(document[mine].unique()) == sums["documents"][i]
        assert sums["error"][i] == pytest.approx(float(table[0, mine].sum()), rel=1e-12)
        assert sums["variance"][i] == pytest.approx(float(table[1, mine].sum()), rel=1e-12)


def test_held_out_rows_that_all_equal_the_mean_are_refused() -> None:
    table = torch.zeros(5, 3, dtype=torch.float64)
    table[0] = 1.0
    with pytest.raises(UserError, match="all held-out rows equal the mean"):
        evaluation._summary(table, torch.arange(3), False)
