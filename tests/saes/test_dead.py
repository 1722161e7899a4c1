"""The lists of dead latents that AuxK works on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.ops import choose_ops, sizes
from harness.parallel import Solo
from harness.saes import Sae, find_dead
from tests.ops.sets import kernel_set

TOPK = Sae("topk", 8, 600, 4, 1, True, 1.0, 1 / 32, 16, 0.0)
SWITCH = dataclasses.replace(TOPK, architecture="switch", n_experts=6, balance_weight=0.1)


@pytest.mark.parametrize("sae", [TOPK, SWITCH], ids=["topk", "switch"])
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_lists_name_every_dead_latent_of_a_group_in_order(sae: Sae, share: float, seed: int) -> None:
    """Whether the kernels want them filled up or not."""
    dead = torch.rand(sae.n_latents, generator=torch.Generator().manual_seed(seed)) < share
    for ops in (choose_ops("reference"), kernel_set("triton")):
        found = find_dead(sae, dead, Solo(), ops)
        if found is None:
            assert not dead.any()
            continue
        assert found.total == int(dead.sum()) and found.row_offsets[-1] == len(found.rows)
        barred = torch.zeros(len(found.rows)) if found.barred is None else found.barred
        width = sae.latents_per_expert if sae.routed else sae.n_latents
        for group, (begin, end) in enumerate(zip(found.row_offsets, found.row_offsets[1:], strict=False)):
            rows, own = found.rows[begin:end], dead[group * width : (group + 1) * width].nonzero().squeeze(1)
            named = rows[barred[begin:end] == 0]
            assert torch.equal(named, own + group * width), "all dead latents, ascending, and no other"
            assert torch.equal(rows[: len(named)], named) and len(rows.unique()) == len(rows)
            assert ((rows >= group * width) & (rows < (group + 1) * width)).all()
        assert found.k <= max(1, max(b - a for a, b in zip(found.row_offsets, found.row_offsets[1:], strict=False)))


def test_lists_are_not_filled_up_where_one_expert_has_nearly_all_dead_latents() -> None:
    sae = dataclasses.replace(SWITCH, n_latents=6000)
    dead = torch.zeros(sae.n_latents, dtype=torch.bool)
    dead[:900] = True
    found = find_dead(sae, dead, Solo(), kernel_set("triton"))
    assert found is not None and found.barred is None and len(found.rows) == 900


def test_renewed_lists_stay_where_they_are() -> None:
    ops, dead = kernel_set("triton"), torch.arange(600) % 7 == 0
    before, after = (find_dead(TOPK, marks, Solo(), ops) for marks in (dead, dead.roll(3)))
    assert before is not None and after is not None
    places, rows = (before.rows.data_ptr(), before.barred.data_ptr()), after.rows.clone()  # type: ignore[union-attr]
    now = before.renewed(after)
    assert torch.equal(now.rows, rows) and now.total == after.total
    assert (now.rows.data_ptr(), now.barred.data_ptr()) == places  # type: ignore[union-attr]


@given(st.integers(1, 1 << 22))
def test_lists_have_few_lengths_and_little_to_fill(rows: int) -> None:
    length = sizes.list_length(rows)
    assert rows <= length < rows + max(64, rows // 8 + 1) and length % 64 == 0
    assert sizes.list_length(length) == length
