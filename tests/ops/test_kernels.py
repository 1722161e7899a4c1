"""Every kernel set against `reference`, which is itself held against dense autograd in tests/saes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.ops import AdamState, Codes, Groups, Hyper, choose_ops, reference
from tests.ops.sets import FAST, KERNELS, kernel_set

EXAMPLES = 8 if torch.cuda.is_available() else 60
"""A GPU compiles a kernel for every new layout, which takes a second."""


def assert_close(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """Equal but for the order of float32 sums of numbers up to `size`."""
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5 * size)


def small_integers(generator: torch.Generator, *shape: int, largest: int = 3) -> Tensor:
    """Numbers whose products and sums are exact in float32, so that implementations must agree to the bit; many tie."""
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def even_groups(tokens: int, rows: int, count: int) -> Groups:
    return Groups(torch.arange(count + 1) * tokens // count, tuple(rows * g // count for g in range(count + 1)))


def assert_same_codes(actual: Codes, expected: Codes) -> None:
    torch.testing.assert_close(actual.index, expected.index)
    torch.testing.assert_close(actual.values, expected.values, rtol=0, atol=0)


@st.composite
def selections(draw) -> tuple[int, int, int, int, int, bool, int]:
    rows = draw(st.integers(1, 700))
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    k = draw(st.one_of(st.just(1), st.just(rows), st.integers(1, min(rows, 40))))
    d = draw(st.sampled_from([1, 2, 3, 16, 33]))
    return draw(st.integers(1, 40)), d, rows, k, groups, draw(st.booleans()), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=selections())
def test_selection_is_exact_to_the_last_tie(
    name: str, dtype: torch.dtype, case: tuple[int, int, int, int, int, bool, int]
) -> None:
    assert_selects_exactly(name, dtype, case)


def assert_selects_exactly(name: str, dtype: torch.dtype, case: tuple[int, int, int, int, int, bool, int]) -> None:
    tokens, d, rows, k, groups, biased, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = (small_integers(generator, count, d, largest=1) for count in (tokens, rows))
    bias = small_integers(generator, rows) if biased else None
    layout = even_groups(tokens, rows, groups)
    # integers below 256 are exact in bfloat16 too
    actual = kernel_set(name).select(x.to(dtype), weight.to(dtype), bias, k, layout)
    assert_same_codes(actual, reference.select(x, weight, bias, k, layout))


def positive(codes: Codes, rows: int) -> Tensor:
    """The codes after ReLU, spread over all latents."""
    return torch.zeros(codes.values.shape[0], rows).scatter_add_(1, codes.index, codes.values.float().relu())


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=selections())
def test_selection_without_order_keeps_the_same_positive_latents(
    name: str, dtype: torch.dtype, case: tuple[int, int, int, int, int, bool, int]
) -> None:
    tokens, d, rows, k, groups, biased, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = (small_integers(generator, count, d, largest=1) for count in (tokens, rows))
    bias = small_integers(generator, rows) if biased else None
    layout = even_groups(tokens, rows, groups)
    actual = kernel_set(name).select(x.to(dtype), weight.to(dtype), bias, k, layout, ordered=False)
    assert torch.equal(positive(actual, rows), positive(reference.select(x, weight, bias, k, layout), rows))
    for span, own in layout.spans:
        inside = (actual.index[span] >= own.start) & (actual.index[span] < max(own.stop, own.start + 1))
        assert inside.all() or own.start == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    case=selections(),
    share=st.floats(0, 1),
    wanted=st.floats(0, 1),
    spoiled=st.sampled_from([0.0, torch.inf, torch.nan]),
)
def test_cpu_selects_from_a_subset_of_the_same_product(
    dtype: torch.dtype, case: tuple[int, int, int, int, int, bool, int], share: float, wanted: float, spoiled: float
) -> None:
    from harness.ops import cpu

    tokens, d, rows, k, _, biased, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = (small_integers(generator, count, d, largest=1) for count in (tokens, rows))
    x[0, 0] += spoiled
    bias = small_integers(generator, rows) if biased else None
    subset = torch.randperm(rows, generator=generator)[: max(1, round(share * rows))].sort().values
    few, whole = max(1, round(wanted * len(subset))), even_groups(tokens, rows, 1)
    low, low_weight = x.to(dtype), weight.to(dtype)
    codes, chosen = cpu.select_with_subset(low, low_weight, bias, k, whole, subset, few)
    alone = cpu.select(low, low_weight, bias, k, whole)
    assert torch.equal(codes.index, alone.index) and torch.equal(codes.values.nan_to_num(), alone.values.nan_to_num())
    own_bias, own = None if bias is None else bias[subset], even_groups(tokens, len(subset), 1)
    expected = cpu.select(low, low_weight[subset], own_bias, few, own, ordered=False)
    assert torch.equal(positive(chosen, len(subset)).nan_to_num(-1.0), positive(expected, len(subset)).nan_to_num(-1.0))
    # the caller adds up the whole form as it is
    assert not (chosen.values < 0).any()


def preactivation_rows(width: int, generator: torch.Generator) -> Tensor:
    """Rows that a selection by thresholds finds hard."""
    rows = [
        torch.randn(width, generator=generator),
        torch.zeros(width),
        -torch.rand(width, generator=generator) - 1,
        -torch.zeros(width),
        torch.where(torch.arange(width) % 2 == 0, 0.0, -0.0),
        torch.full((width,), -torch.inf),
        torch.arange(width).float(),
        -torch.arange(width).float(),
        torch.arange(width).float() % 5,
        torch.randn(width, generator=generator) * 1e-42,
        torch.randn(width, generator=generator).sign() * 3e38,
        torch.where(torch.arange(width) == width // 2, torch.inf, 1.0),
        torch.where(torch.rand(width, generator=generator) < 0.3, -torch.inf, 0.0),
        torch.randn(width, generator=generator).exp() * torch.logspace(-30, 30, width),
    ]
    rows.append(rows[0].clone())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "k"), [(1, 1), (17, 17), (128, 1), (1000, 16), (1000, 512), (4097, 32), (8192, 512), (2048, 2048)]
)
def test_cpu_selects_from_given_preactivations(width: int, k: int, dtype: torch.dtype) -> None:
    from harness.ops import cpu

    given_rows = preactivation_rows(width, torch.Generator().manual_seed(width + k)).to(dtype)
    expected = reference.select_preactivations(given_rows.float(), k)
    assert_same_codes(cpu.select_preactivations(given_rows, k), expected)
    unordered = cpu.select_preactivations(given_rows, k, ordered=False)
    assert torch.equal(positive(unordered, width), positive(expected, width))


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
def test_cpu_puts_nan_first_so_that_the_loss_shows_it(bad: float) -> None:
    from harness.ops import cpu

    rows = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    rows[1, 500] = bad
    rows[2] = bad
    actual = cpu.select_preactivations(rows, 8)
    assert_same_codes(Codes(actual.values[:1], actual.index[:1]), reference.select_preactivations(rows[:1], 8))
    assert actual.index[1, 0] == 500
    assert actual.values[1].isnan().tolist() == [True] + 7 * [False]
    unordered = cpu.select_preactivations(rows, 8, ordered=False)
    assert unordered.values[1].isnan().sum() == 1 and unordered.values[2].isnan().all()
    assert actual.values[2].isnan().all()
    assert actual.index[2].tolist() == list(range(8))


def random_codes(generator: torch.Generator, tokens: int, k: int, groups: Groups) -> Codes:
    """Distinct latents of each token's group, values ≥ 0 with zeros among them, padded where the group is narrow."""
    values, index = torch.zeros(tokens, k), torch.zeros(tokens, k, dtype=torch.int64)
    for span, rows in groups.spans:
        width = rows.stop - rows.start
        index[span] = min(rows.start, groups.row_offsets[-1] - 1)
        shape, kept = (span.stop - span.start, width), min(k, width)
        index[span, :kept] = rows.start + torch.rand(shape, generator=generator).argsort(dim=1)[:, :kept]
        values[span, :kept] = torch.randn(shape, generator=generator)[:, :kept].relu()
    return Codes(values, index)


def nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def assert_products_equal(name: str, codes: Codes, d: int, rows: int, groups: Groups, scaled: bool, seed: int) -> None:
    """`reconstruct`, with and without `reduce`, `latent_grads`, `weight_grads` and `fired`."""
    ops, generator = kernel_set(name), torch.Generator().manual_seed(seed)
    tokens = codes.values.shape[0]
    x, weight = (torch.randn(count, d, generator=generator) for count in (tokens, rows))
    weight /= weight.norm(dim=1, keepdim=True)
    scale = torch.rand(tokens, generator=generator) if scaled else None
    for reduce in (None, lambda partial: partial.mul_(2)):
        actual = ops.reconstruct(codes, weight, x, scale, groups, reduce)
        expected = reference.reconstruct(codes, weight, x, scale, groups, reduce)
        for actual_part, expected_part in zip(actual, expected, strict=True):
            assert_close(actual_part, expected_part)
    residual, dz, _ = expected
    assert_close(
        ops.latent_grads(codes, weight, residual, groups), reference.latent_grads(codes, weight, residual, groups)
    )
    out, expected_grads = ((nan(rows, d), nan(rows, d), nan(rows)) for _ in range(2))
    ops.weight_grads(codes, dz, x, residual, groups, out)
    reference.weight_grads(codes, dz, x, residual, groups, expected_grads)
    largest = max(1.0, *(float(grad.abs().max()) for grad in expected_grads if grad.numel()))
    for grad, expected_grad in zip(out, expected_grads, strict=True):
        assert_close(grad, expected_grad, largest)
    torch.testing.assert_close(ops.fired(codes, rows), reference.fired(codes, rows))


@st.composite
def layouts(draw) -> tuple[list[int], list[int], int, int]:
    """Tokens of each group, latents of each group, k, seed."""
    count = draw(st.integers(1, 5))
    token_counts = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    row_counts = draw(st.lists(st.integers(0, 120), min_size=count, max_size=count))
    row_counts[0] += 1
    k = draw(st.sampled_from([1, 2, 3, 5, 8, 30]))
    return token_counts, row_counts, k, draw(st.integers(0, 2**31))


def assert_random_products_equal(name: str, case: tuple[list[int], list[int], int, int], d: int, scaled: bool) -> None:
    token_counts, row_counts, k, seed = case
    token_offsets, row_offsets = (torch.tensor([0, *counts]).cumsum(0) for counts in (token_counts, row_counts))
    groups = Groups(token_offsets, tuple(row_offsets.tolist()))
    codes = random_codes(torch.Generator().manual_seed(seed), sum(token_counts), k, groups)
    assert_products_equal(name, codes, d, sum(row_counts), groups, scaled, seed)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=layouts(), d=st.integers(1, 40), scaled=st.booleans())
def test_products_equal_reference(name: str, case: tuple[list[int], list[int], int, int], d: int, scaled: bool) -> None:
    assert_random_products_equal(name, case, d, scaled)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    ("tokens", "d", "rows", "k"), [(70, 4096, 300, 1), (50, 384, 6400, 512), (33, 1, 900, 3), (9000, 3, 200, 2)]
)
def test_products_equal_reference_at_the_edges(name: str, tokens: int, d: int, rows: int, k: int) -> None:
    groups = even_groups(tokens, rows, 1)
    codes = random_codes(torch.Generator().manual_seed(1), tokens, k, groups)
    assert_products_equal(name, codes, d, rows, groups, False, 2)


def codes_with_a_latent_in_every_token(tokens: int, groups: Groups) -> Codes:
    codes = random_codes(torch.Generator().manual_seed(3), tokens, 2, groups)
    codes.index[:, 0], codes.index[:, 1] = 5, torch.where(codes.index[:, 1] == 5, 6, codes.index[:, 1])
    codes.values[:, 0] += 0.1
    return codes


@pytest.mark.parametrize("name", FAST)
def test_a_latent_active_in_every_token_is_summed_in_pieces(name: str) -> None:
    groups = even_groups(10_000, 64, 1)
    assert_products_equal(name, codes_with_a_latent_in_every_token(10_000, groups), 4, 64, groups, True, 4)


@pytest.mark.parametrize("name", FAST)
def test_kernels_give_the_same_bits_twice_and_on_any_number_of_threads(name: str) -> None:
    ops, generator = kernel_set(name), torch.Generator().manual_seed(7)
    tokens, d, rows, k = 3000, 24, 640, 3
    groups = even_groups(tokens, rows, 2)
    x, W_enc, W_dec = (torch.randn(count, d, generator=generator) for count in (tokens, rows, rows))

    def everything() -> list[Tensor]:
        selected = ops.select(x, W_enc, None, k, groups)
        codes = Codes(selected.values.relu(), selected.index)
        codes.index[: tokens // 2, 0] = 4
        residual, dz, squared = ops.reconstruct(codes, W_dec, x, None, groups)
        out = nan(rows, d), nan(rows, d), nan(rows)
        ops.weight_grads(codes, dz, x, residual, groups, out)
        return [*codes, residual, dz, squared, *out]

    threads = torch.get_num_threads()
    first, second = everything(), everything()
    try:
        torch.set_num_threads(1)
        alone = everything()
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(first, second, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", [(50, 33), (7,), (1, 1), (0, 5)])
def test_updates_equal_reference(name: str, shape: tuple[int, ...], low: bool) -> None:
    ops, generator = kernel_set(name), torch.Generator().manual_seed(11)
    matrix = len(shape) == 2
    for step, (clipped, unit) in enumerate(((False, False), (True, matrix), (False, matrix), (True, False)), start=1):
        param, grad, mean = (torch.randn(shape, generator=generator) for _ in range(3))
        square = torch.rand(shape, generator=generator)
        if unit:
            param /= param.norm(dim=1, keepdim=True)
        scale = torch.tensor(0.37) if clipped else None
        hyper = Hyper(1e-2, 0.9, 0.999, 6.25e-10, step, scale, unit, unit)
        for ok in (True, False):
            results = []
            for kernels in (ops, reference):
                state = AdamState(mean.clone(), square.clone())
                copy = param.bfloat16() if low else None
                tensors = param.clone(), grad.clone(), *state, *([] if copy is None else [copy])
                kernels.update(tensors[0], tensors[1], AdamState(*tensors[2:4]), hyper, torch.tensor(ok), copy)
                results.append([tensors[0], *tensors[2:]])
            for actual, expected, before in zip(*results, [param, mean, square, param.bfloat16()], strict=False):
                if not ok:
                    assert torch.equal(actual, before)
                elif actual.dtype is torch.bfloat16:
                    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
                else:
                    assert_close(actual, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_a_withheld_update_survives_nan_gradients(name: str) -> None:
    param, grad = torch.ones(4, 3), nan(4, 3)
    state = AdamState(torch.ones(4, 3), torch.ones(4, 3))
    hyper = Hyper(1e-2, 0.9, 0.999, 1e-8, 1, None, True, True)
    kernel_set(name).update(param, grad, state, hyper, torch.tensor(False))
    assert all(torch.equal(tensor, torch.ones(4, 3)) for tensor in (param, *state))


@pytest.mark.parametrize("name", KERNELS)
def test_the_low_precision_copy_is_rounded_to_nearest_even(name: str) -> None:
    bits = torch.arange(0x3F800000, 0x3F800000 + 0x40000, 0x1111, dtype=torch.int32)
    param = torch.cat([bits.view(torch.float32), torch.tensor([-1.00390625, 1.01171875, 3e38, 0.0])])[None]
    still = AdamState(torch.zeros_like(param), torch.zeros_like(param))
    copy = torch.zeros_like(param, dtype=torch.bfloat16)
    hyper = Hyper(0.0, 0.9, 0.999, 1e-8, 1)
    kernel_set(name).update(param, torch.zeros_like(param), still, hyper, torch.tensor(True), copy)
    assert torch.equal(copy, param.bfloat16())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("tokens", "d"), [(1, 1), (9, 70), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_centred_in_their_order(name: str, tokens: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # whole numbers: the interpreter truncates to bfloat16
    x, offset = (torch.randint(-40, 40, size, generator=generator).float() for size in ((tokens, d), (d,)))
    before = x.clone()
    for order in (None, torch.randperm(tokens, generator=generator)[: tokens // 2]):
        centred, low = kernel_set(name).centred(x, order, offset, dtype)
        expected = (x if order is None else x[order]) - offset
        assert torch.equal(centred, expected) and torch.equal(low, expected.to(dtype)) and low.dtype is dtype
        assert (low is centred) == (dtype is torch.float32) and torch.equal(x, before)


@pytest.mark.parametrize("name", KERNELS)
def test_project_equals_reference(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    param, grad = torch.randn(40, 70, generator=generator), torch.randn(40, 70, generator=generator)
    param /= param.norm(dim=1, keepdim=True)
    expected = grad.clone()
    reference.project(param, expected)
    kernel_set(name).project(param, grad)
    assert_close(grad, expected)


def test_auto_takes_the_compiled_kernels_on_a_cpu() -> None:
    assert choose_ops("auto") is choose_ops("cpu", torch.device("cpu"))
    assert choose_ops("reference") is reference
    with pytest.raises(ValueError, match=r"train\.device=cpu"):
        choose_ops("cpu", torch.device("cuda"))


def test_kernels_compile_where_nothing_can_be_cached() -> None:
    from harness.ops.cpu.compile import compiled

    namespace: dict = {}
    exec("def double(x):\n    return 2 * x\n", namespace)  # no file, so no place for a cache
    assert compiled(namespace["double"])(21) == 42


@pytest.mark.parametrize("offsets", [(0, 7), (0, 4, 8, 12), (0, 3, 3, 10), (0, 0, 5), (0, 0)])
def test_groups_know_where_they_begin_on_the_device(offsets: tuple[int, ...]) -> None:
    starts = Groups(torch.zeros(len(offsets), dtype=torch.int64), offsets).row_starts
    assert starts.tolist() == list(offsets) and starts.dtype is torch.int32
