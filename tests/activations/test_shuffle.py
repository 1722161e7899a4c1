import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.activations.shuffle import digest64, permutation, permute


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    assert sorted(permutation(n, seed)) == list(range(n))


@given(st.integers(1, 10**12), st.integers(0, 100))
def test_an_element_moves_to_the_same_place_whatever_is_asked_beside_it(n: int, seed: int) -> None:
    index = np.unique(np.linspace(0, n - 1, 7).astype(np.int64))
    together = permute(index, n, seed)
    alone = [int(permute(index[i : i + 1], n, seed)[0]) for i in range(len(index))]
    assert together.tolist() == alone
    assert (together >= 0).all() and (together < n).all()


def test_permutations_of_different_keys_are_unrelated_and_look_uniform() -> None:
    n = 10_000
    first, second = permutation(n, "a"), permutation(n, "b")
    assert (first == second).sum() < 20  # expected 1
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    tenth = np.histogram(first[: n // 10], bins=10, range=(0, n))[0]
    assert tenth.min() > 60 and tenth.max() < 140  # expected 100 ± 10


def test_values_are_pinned() -> None:
    """Stores and streams on disk depend on these numbers: a change orphans them."""
    assert permutation(10, "pinned").tolist() == [2, 3, 5, 9, 6, 0, 4, 1, 8, 7]
    assert digest64("pinned", 1) == 8115304016230524263
