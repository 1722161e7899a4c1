"""Ranks that meet: what one of them raises, all raise, so that they stay in step."""

from __future__ import annotations

import pytest
import torch

from harness.errors import UserError
from harness.parallel import Solo
from harness.process.signals import Interrupted
from harness.process.together import together

REFUSED, STOPPED, FAILED = UserError("rows are equal"), Interrupted(), OSError("no space")


class OneOfTwo(Solo):
    """A rank beside another one, which has raised an exception of the given kind (its number in `together`)."""

    size = 2

    def __init__(self, kind: int) -> None:
        self._kind = kind

    def sum_(self, tensor: torch.Tensor, over: str, kind: str) -> torch.Tensor:
        tensor[self._kind] += 1
        return tensor

    def texts(self, own: str) -> list[str]:
        return [own, "rows are equal" if self._kind == 1 else ""]


@pytest.mark.parametrize("other", range(4))
@pytest.mark.parametrize("own", [None, REFUSED, STOPPED, FAILED])
def test_every_rank_raises_the_gravest_kind(own: Exception | None, other: int) -> None:
    kinds = [None, UserError, Interrupted, OSError]
    expected = kinds[max(other, kinds.index(own and type(own)))]

    def meet() -> None:
        with together(OneOfTwo(other)):
            if own is not None:
                raise own

    if expected is None:
        meet()
        return
    with pytest.raises(expected) as raised:
        meet()
    assert expected is not UserError or str(raised.value) == "rows are equal"
