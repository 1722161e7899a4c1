"""The Triton kernels in the interpreter: the cases of `test_kernels`, as small as it needs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.ops import Codes, Groups, choose_ops, is_whole, reference
from harness.ops.sizes import padded
from tests.ops.sets import kernel_set
from tests.ops.test_kernels import (
    assert_products_equal,
    assert_random_products_equal,
    assert_same_codes,
    assert_selects_exactly,
    codes_with_a_latent_in_every_token,
    even_groups,
    layouts,
    nan,
    preactivation_rows,
    random_codes,
    selections,
)

MOST_SHARED_BYTES = 227 << 10
"""Of a program on capability 9.0."""


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """Skips where the kernels are compiled, or cannot be imported."""
    kernel_set("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, deadline=None)
@given(case=selections())
def test_selection_is_exact_to_the_last_tie(
    dtype: torch.dtype, case: tuple[int, int, int, int, int, bool, int]
) -> None:
    assert_selects_exactly("triton", dtype, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "k"),
    [(1, 1), (17, 17), (128, 1), (1000, 16), (1000, 512), (4097, 32), pytest.param(2048, 2048, marks=pytest.mark.slow)],
)
def test_selects_from_given_preactivations(width: int, k: int, dtype: torch.dtype) -> None:
    rows = preactivation_rows(width, torch.Generator().manual_seed(width + k)).to(dtype)
    actual = kernel_set("triton").select_preactivations(rows, k)
    assert_same_codes(actual, reference.select_preactivations(rows.float(), k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, deadline=None)
@given(st.integers(2, 9), st.integers(1, 150), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_without_order_the_positive_ones_stay_a_matrix(
    dtype: torch.dtype, tokens: int, width: int, k: int, tied: bool, seed: int
) -> None:
    """The products from it are those from lists; NaN shows."""
    ops, generator = kernel_set("triton"), torch.Generator().manual_seed(seed)
    k, d, groups = min(k, width), 6, even_groups(tokens, width, 1)
    # small whole numbers: every product is exact
    x, W_enc, W_dec = (
        torch.randint(-3, 4, (count, d), generator=generator).to(dtype) for count in (tokens, width, width)
    )
    bias = None if tied else torch.randint(-9, 10, (width,), generator=generator) / 8
    codes = ops.select(x, W_enc, bias, k, groups, ordered=False)
    assert is_whole(codes.index) == (width <= ops.dense_rows_per_k("bf16" if dtype is torch.bfloat16 else "fp32") * k)
    expected = reference.select(x, W_enc, bias, k, groups)
    lists = Codes(expected.values.relu(), expected.index)
    matrix = torch.zeros(tokens, width).scatter_(1, lists.index, lists.values)
    if not is_whole(codes.index):
        return
    assert torch.equal(codes.values.float(), matrix)
    residual, dz, squared = ops.reconstruct(codes, W_dec, x.float(), None, groups)
    other, other_dz, other_squared = reference.reconstruct(lists, W_dec.float(), x.float(), None, groups)
    torch.testing.assert_close((residual, squared), (other, other_squared))
    other_dz = torch.zeros(tokens, width).scatter_(1, lists.index, other_dz)
    # the residual was rounded, and each of d products with a weight of at most 3 may be off by that
    off = 3 * d * torch.finfo(dtype).eps * float(residual.abs().max() + 1)
    for actual in (dz, ops.latent_grads(codes, W_dec, residual, groups)):
        assert ((actual > 0) <= (matrix > 0)).all()
        torch.testing.assert_close(actual.float(), other_dz, rtol=0, atol=off)
    out, others = ((nan(width, d), nan(width, d), nan(width)) for _ in range(2))
    ops.weight_grads(codes, dz, x, residual, groups, out)
    reference.weight_grads(
        Codes(matrix, codes.index), dz.float(), x.float(), residual.to(dtype).float(), groups, others
    )
    for grad, other_grad in zip(out, others, strict=True):
        torch.testing.assert_close(grad, other_grad, rtol=1e-5, atol=1e-3)
    x[0, 0] = torch.nan
    assert ops.select(x, W_enc, bias, k, groups, ordered=False).values[0].isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
def test_nan_comes_first_so_that_the_loss_shows_it(bad: float) -> None:
    rows = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    rows[1, 500] = bad
    rows[2] = bad
    actual = kernel_set("triton").select_preactivations(rows, 8)
    assert_same_codes(Codes(actual.values[:1], actual.index[:1]), reference.select_preactivations(rows[:1], 8))
    assert actual.index[1, 0] == 500
    assert actual.values[1].isnan().tolist() == [True] + 7 * [False]
    assert actual.values[2].isnan().all()
    assert actual.index[2].tolist() == list(range(8))


def test_a_selection_too_wide_for_the_kernels_is_the_reference_s() -> None:
    from harness.ops.triton import selection

    width, k = 1 << 17, 1 << 14
    assert not selection.fits(width, k) and selection.fits(1 << 20, 512)
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    assert_same_codes(selection.select_preactivations(row, k), reference.select_preactivations(row, k))


@given(width=st.integers(1, 1 << 22), k=st.integers(1, 1 << 13))
def test_any_row_is_cut_into_pieces_that_a_program_holds(width: int, k: int) -> None:
    from harness.ops.triton import selection
    from harness.ops.triton.sizes import power_of_2

    k = min(k, width)
    if not selection.fits(width, k):
        return
    cut, slots = selection.layout(width, k), power_of_2(k)
    assert cut.segment_width * cut.segments >= width > cut.segment_width * (cut.segments - 1)
    assert cut.lanes <= selection.MOST_PICKED and cut.lanes * cut.block <= selection.MOST_NUMBERS
    if cut.block * cut.chunks > 1:
        assert cut.lanes >= min(k, -(-width // cut.block)), "each of the k largest may have a lane of its own"
        assert slots * cut.block * power_of_2(cut.chunks) <= selection.MOST_PICKED
    if cut.segments > 1:
        assert selection.MOST_PICKED // slots >= 2, "a merge must leave fewer segments"


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(case=layouts(), d=st.integers(1, 40), scaled=st.booleans())
def test_products_equal_reference(case: tuple[list[int], list[int], int, int], d: int, scaled: bool) -> None:
    assert_random_products_equal("triton", case, d, scaled)


@pytest.mark.parametrize(
    ("tokens", "d", "rows", "k"),
    [(9, 4096, 60, 1), (6, 24, 700, 512), (33, 1, 200, 3), pytest.param(50, 384, 11_000, 512, marks=pytest.mark.slow)],
)
def test_products_equal_reference_at_the_edges(tokens: int, d: int, rows: int, k: int) -> None:
    groups = even_groups(tokens, rows, 1)
    codes = random_codes(torch.Generator().manual_seed(1), tokens, k, groups)
    assert_products_equal("triton", codes, d, rows, groups, False, 2)


@pytest.mark.slow
def test_a_latent_active_in_every_token_is_summed_in_pieces() -> None:
    tokens, groups = 600, even_groups(600, 64, 1)
    codes = codes_with_a_latent_in_every_token(tokens, groups)
    assert_products_equal("triton", codes, 4, 64, groups, True, 4)


def test_tiles_of_tokens_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.ops.triton import products

    ops, generator = kernel_set("triton"), torch.Generator().manual_seed(9)
    groups = Groups(torch.tensor([0, 11, 11, 40]), (0, 60, 61, 100))
    x, weight = torch.randn(40, 5, generator=generator), torch.randn(100, 5, generator=generator)
    codes = random_codes(generator, 40, 6, groups)
    results = []
    for tile_bytes in (1 << 20, 60 * 4 * 7):
        monkeypatch.setattr(products, "TILE_BYTES", tile_bytes)
        out = nan(100, 5), nan(100, 5), nan(100)
        selected = ops.select(x, weight, None, 6, groups)
        residual, dz, _ = ops.reconstruct(codes, weight, x, None, groups)
        ops.weight_grads(codes, dz, x, residual, groups, out)
        results.append((selected.index, residual, dz, *out))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(("d", "token_counts"), [(72, [70, 0, 1, 300]), (33, [5, 3, 0, 9])])
def test_dense_products_of_groups(
    monkeypatch: pytest.MonkeyPatch, described: bool, d: int, token_counts: list[int]
) -> None:
    """Groups without tokens or latents, and what stands beside them: none of it may reach another group."""
    from harness.ops.triton import grouped

    monkeypatch.setattr(grouped, "DESCRIPTORS", described)
    token_offsets = torch.tensor([0, *token_counts]).cumsum(0)
    row_starts = torch.tensor([0, 90, 153, 153, 300], dtype=torch.int32)
    if token_counts[2]:
        row_starts[3] = 154
    tokens, rows, widest = int(token_offsets[-1]), 300, 147
    generator = torch.Generator().manual_seed(d)
    x, weight = (torch.randn(count, d, generator=generator).bfloat16() for count in (tokens, rows))
    bias = torch.randn(rows, generator=generator).bfloat16()
    z = torch.zeros(tokens, padded(widest)).bfloat16()[:, :widest]
    actual = torch.full((tokens, padded(widest)), torch.nan)[:, :widest]
    grouped.latent_products(x, weight, bias, token_offsets, row_starts, actual)
    reconstruction, expected = torch.full((tokens, d), torch.nan), torch.zeros(tokens, d)
    grads, sums = torch.zeros(rows, d), torch.zeros(rows)
    for group in range(4):
        span, own = slice(*token_offsets[group : group + 2]), slice(*row_starts[group : group + 2])
        width = own.stop - own.start
        products = x[span].float() @ weight[own].float().T + bias[own].float()
        torch.testing.assert_close(actual[span, :width], products, rtol=1e-5, atol=1e-4)
        z[span, :width] = products.bfloat16()
        expected[span] = z[span, :width].float() @ weight[own].float()
        grads[own], sums[own] = z[span, :width].float().T @ x[span].float(), z[span, :width].float().sum(0)
    grouped.reconstructions(z, weight, token_offsets, row_starts, reconstruction)
    torch.testing.assert_close(reconstruction, expected, rtol=1e-5, atol=1e-2)
    out = nan(rows, d), nan(rows)
    for factor, add in ((1, False), (2, True)):
        grouped.weight_gradients(z, x, token_offsets, row_starts, *out, add=add)
        torch.testing.assert_close(out[0], factor * grads, rtol=1e-5, atol=1e-1)
        torch.testing.assert_close(out[1], factor * sums, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(("width", "k"), [(1, 1), (70, 5), (200, 130)])
def test_codes_become_a_matrix(width: int, k: int) -> None:
    """Padding repeats a column, and a NaN shows; there are zeros between the end of a row and the next one."""
    from harness.ops.triton import dense

    tokens, generator = 67, torch.Generator().manual_seed(width)
    firsts = torch.randint(0, 1000, (tokens,), generator=generator, dtype=torch.int32)
    # the interpreter truncates to bfloat16
    values = torch.randn(tokens, k, generator=generator).bfloat16().float()
    columns = torch.rand(tokens, width, generator=generator).argsort(dim=1)[:, :k]
    padding = torch.rand(tokens, k, generator=generator) < 0.3
    padding[3, 0] = False
    values[padding], columns[padding] = 0.0, 0
    values[3, 0] = torch.nan
    index = columns + firsts[:, None]
    for dtype in (torch.bfloat16, torch.float32):
        matrix = dense.spread(values, index, firsts, width, dtype)
        expected = torch.zeros(tokens, width).scatter_add_(1, columns, values).to(dtype)
        torch.testing.assert_close(matrix, expected, rtol=0, atol=0, equal_nan=True)
        behind = matrix.as_strided((tokens, matrix.stride(0)), matrix.stride())[:, width:]
        assert behind.numel() and not behind.any()


def test_kernels_are_refused_where_they_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_ops("triton").NAME == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="ops=triton needs a GPU"):
        choose_ops("triton", torch.device("cpu"))


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    changes = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_for_hopper"],
        capture_output=True,
        text=True,
        env=os.environ | changes,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert set(kernels) == {
        *("lanes_kernel", "candidates_kernel", "order_kernel", "decode_kernel", "segments_kernel", "combine_kernel"),
        *("latent_products_kernel", "reconstruction_kernel", "gradient_kernel", "column_sums_kernel"),
        *("whole_kernel", "keep_kernel", "merge_kernel", "spread_kernel", "residual_kernel", "centred_kernel"),
        *("adam_kernel", "project_kernel"),
    }
    dense = [name for name in kernels if name.endswith(("products_kernel", "gradient_kernel"))]
    assert all(kernels[name]["matrix_units"] for name in dense)
    for name, used in kernels.items():
        # some kernels keep a stack of 8 bytes without spilling
        assert used["stack"] <= 8 and used["shared"] <= MOST_SHARED_BYTES, (name, used)
