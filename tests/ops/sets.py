"""The kernel sets under test, as the tests call them: on CPU tensors, wherever the kernels run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.ops import Groups, Hyper, Ops, choose_ops

GPU = pytest.param("triton-gpu", marks=pytest.mark.gpu)
FAST = ["cpu", GPU]
"""Sets that take any test."""

KERNELS = ["cpu", "triton", GPU]
"""All sets; `triton` runs in the interpreter, thousands of times slower than on a GPU: for small cases."""


class OnGpu:
    """A kernel set whose arguments come from the CPU and whose results, those in place included, go back there."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if not callable(operation):
            return operation

        def moved(*args: Any, **kwargs: Any) -> Any:
            pairs: list[tuple[Tensor, Tensor]] = []
            result = operation(*_mapped(args, pairs), **_mapped(kwargs, pairs))
            for here, there in pairs:
                here.copy_(there)
            return _back(result)

        return moved


def _mapped(value: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """`value` with every tensor on the GPU; `pairs` collects (original, copy)."""
    if isinstance(value, Tensor):
        pairs.append((value, value.cuda()))
        return pairs[-1][1]
    if isinstance(value, Groups | Hyper):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _mapped(part, pairs) for name, part in fields.items()})
    if isinstance(value, dict):
        return {name: _mapped(part, pairs) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [_mapped(part, pairs) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _back(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, tuple):
        parts = [_back(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def kernel_set(name: str) -> Any:
    """A set of `KERNELS`. Skips the test where it cannot run."""
    if name == "triton-gpu":
        return OnGpu(choose_ops("triton", torch.device("cuda")))
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles where there is a GPU; the same tests run there")
    return choose_ops(name)
