"""Overrides to cells."""

import time
from collections.abc import Sequence

import pytest

from harness.config import from_container
from harness.errors import UserError
from harness.grid.cells import Cell, Grid, make_cells, narrow_cells
from harness.grid.compose import compose_settings, hydra_session

SYNTHETIC = ("activations=synthetic", "train.precision=fp32")


def cells(*overrides: str) -> list[Cell]:
    return make_cells([Grid((*SYNTHETIC, *overrides))])


def shapes(found: Sequence[Cell]) -> list[tuple[str, int, int]]:
    return [(c.config.sae.architecture, c.config.sae.n_latents, c.config.sae.k) for c in found]


def test_every_combination_once_in_the_order_written() -> None:
    found = cells("sae=topk,switch", "sae.n_latents=64,128", "sae.k=choice(1,2)")
    assert shapes(found) == [(a, n, k) for a in ("topk", "switch") for n in (64, 128) for k in (1, 2)]
    assert found[0].label == "sae=topk sae.n_latents=64 sae.k=1"


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("train.seed=range(0,5)", [0, 1, 2, 3, 4]),
        ("train.seed=range(1,10,3)", [1, 4, 7]),
        ("train.lr=1e-3,2", [1e-3, 2.0]),
        ("tracker.tags=[a],[b,c]", [["a"], ["b", "c"]]),
        ("sweep='a b',c", ["a b", "c"]),
        ("sae=glob(t*)", None),
    ],
)
def test_the_whole_sweep_grammar(sweep: str, values: list[object] | None) -> None:
    found = cells("sae.n_latents=64", "sae.k=2", sweep)
    if values is None:
        assert {c.label for c in found} == {"sae=topk", "sae=topk_gao2024", "sae=topk_decoder_norm"}
        return
    key = sweep.split("=")[0].split(".")
    reached = []
    for cell in found:
        value: object = cell.config
        for name in key:
            value = getattr(value, name)
        reached.append(value)
    assert reached == values


def test_the_short_way_equals_hydra_for_every_cell() -> None:
    sweeps = ("sae=topk,switch", "sae.n_latents=64,128", "train.lr=1e-3,2", "sae.k=2")
    found = cells(*sweeps)
    assert len(found) == 8
    with hydra_session():
        for cell in found:
            assert cell.config == from_container(compose_settings([*SYNTHETIC, "sae.k=2", *cell.label.split()]))


def test_interpolation_refers_to_the_cell() -> None:
    assert shapes(cells("sae.k=1,2", "sae.n_latents=32", "sae.aux_k=${sae.k}")) == [("topk", 32, 1), ("topk", 32, 2)]
    found = cells("sae.k=1,2", "sae.n_latents=32", "sae.aux_k=${sae.k}")
    assert [c.config.sae.aux_k for c in found] == [1, 2]


@pytest.mark.parametrize("seed", ["train.seed=3,4", "train.seed=3", ""])
@pytest.mark.parametrize("other", ["", "train.warmup_tokens=${train.batch_tokens}", "sweep=s${train.seed}"])
def test_a_key_copies_another_in_every_cell(seed: str, other: str) -> None:
    texts = ["sae=topk", "sae.n_latents=32,64", "sae.k=2", seed, other, "stream.seed=${train.seed}"]
    found = cells(*filter(None, texts))
    assert {c.config.stream.seed - c.config.train.seed for c in found} == {0}
    assert len(found) == (4 if "," in seed else 2)
    if "warmup" in other:
        assert {c.config.train.warmup_tokens for c in found} == {float(found[0].config.train.batch_tokens)}


def test_a_copy_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"stream\.seed"):
        cells("sae=topk", "sae.n_latents=32", "sae.k=2", "train.lr=1e-3,2e-3", "stream.seed=${train.lr}")


def test_a_later_override_of_the_copy_counts() -> None:
    copy, texts = "stream.seed=${train.seed}", ("sae=topk", "sae.n_latents=32", "sae.k=2", "train.seed=1,2")
    assert [c.config.stream.seed for c in cells(*texts, copy, "stream.seed=9")] == [9, 9]


def test_the_last_override_of_a_key_counts() -> None:
    assert shapes(cells("sae.n_latents=64", "sae.k=2", "sae.n_latents=128")) == [("topk", 128, 2)]


def test_all_impossible_cells_are_named() -> None:
    with pytest.raises(UserError) as refusal:
        cells("sae=switch", "sae.n_experts=4", "sae.n_latents=16,18,64", "sae.k=2,8,32")
    message = str(refusal.value)
    assert "6 of 9 cells are impossible" in message
    for part in ("not divisible by sae.n_experts=4", "larger than one expert's", "larger than sae.n_latents=16"):
        assert part in message
    assert message.count("\n") == 5 and "(and 1 more)" in message, "cells of one reason share a line"


def test_filters() -> None:
    overrides = (*SYNTHETIC, "sae=switch", "sae.n_experts=8", "sae.n_latents=64,256", "sae.k=2,8")
    assert len(make_cells([Grid(overrides, min_latents_per_expert_over_k=4)])) == 3
    only = {"sae.n_latents": [64], "sae.k": [8]}
    for kept in (make_cells([Grid(overrides, only)]), make_cells([Grid(overrides)], only)):
        assert [(cell.config.sae.n_latents, cell.config.sae.k) for cell in kept] == [(64, 8)]
    with pytest.raises(UserError, match=r"there is no key 'sae\.kk'"):
        make_cells([Grid(overrides)], {"sae.kk": [1]})
    with pytest.raises(UserError, match="no cell is left"):
        make_cells([Grid(overrides)], {"sae.k": [3]})
    with pytest.raises(UserError, match=r"sae\.n_latents=-5 must be"):
        make_cells([Grid((*SYNTHETIC, "sae=topk", "sae.n_latents=-5", "sae.k=8"), min_latents_per_expert_over_k=4)])


def test_narrow_cells_are_told() -> None:
    assert narrow_cells(cells("sae.n_latents=32", "sae.k=8,9")) == ["sae.k=9"]
    assert narrow_cells(cells("sae=switch", "sae.n_experts=2", "sae.n_latents=32", "sae.k=4,5")) == [
        "sae=switch sae.k=5"
    ]


def test_the_work_grows_with_the_number_of_cells_not_its_square() -> None:
    def seconds(latents: str) -> float:
        begin = time.process_time()
        found = cells("sae=topk", f"sae.n_latents={latents}", "sae.k=1,2,3,4,5", "train.seed=range(0,20)")
        assert len(found) in (500, 10_000)
        return time.process_time() - begin

    seconds("range(64,74,2)")  # what is read once
    assert seconds("range(64,264,2)") < 80 * seconds("range(64,74,2)")
