"""Shape annotations are checks while the tests run."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from harness.ops import Groups, choose_ops
from harness.parallel import Solo
from tests import checked_modules


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_an_argument_of_the_wrong_shape_is_refused(name: str) -> None:
    groups = Groups(torch.tensor([0, 3]), (0, 5))
    with pytest.raises(TypeCheckError, match="W_enc"):
        choose_ops(name).select(torch.zeros(3, 4), torch.zeros(5, 6), None, 2, groups)


def test_a_field_of_the_wrong_dtype_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="token_offsets"):
        Groups(torch.tensor([0.0, 3.0]), (0, 5))


def test_a_result_of_the_wrong_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "new_full", lambda tensor, size, value: torch.zeros(*size, 1))
    with pytest.raises(TypeCheckError, match="return"):
        Solo().keep(torch.zeros(3, 4), 2, "selection")


def test_modules_that_state_shapes_are_checked_and_kernels_are_not() -> None:
    names = checked_modules()
    expected = {"harness.ops.reference", "harness.parallel.mesh", "harness.saes.step"}
    expected |= {"harness.activations.stream", "harness.training.state", "harness.cost.speed"}
    assert expected <= set(names)
    assert not [name for name in names if name.endswith("_kernels")]
