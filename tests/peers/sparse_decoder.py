"""A sparse decoder with autograd: Triton kernels on a GPU, the same sums in plain torch on a CPU.

Own code, in the manner of public sparse decoders: one program per token gathers the decoder rows of its k latents, and
the backward pass adds each token's share to the weight gradient with atomics. `token_gradients` is also used alone.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _kernels() -> Any:
    """Triton is imported only for a GPU: without one it need not be installed."""
    return importlib.import_module("tests.peers.sparse_decoder_kernels")


def decode(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Σ_j values[t, j]·weight[index[t, j]] in float32; [tokens, k], [tokens, k], [n, d] -> [tokens, d]."""
    if values.is_cuda:
        return _kernels().decode(values, index, weight)
    return torch.nn.functional.embedding_bag(index, weight, per_sample_weights=values.to(weight.dtype), mode="sum")


def token_gradients(gradient: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """gradient[t]·weight[index[t, j]], the gradient of `values`; [tokens, d], [tokens, k], [n, d] -> [tokens, k]."""
    if gradient.is_cuda:
        return _kernels().token_gradients(gradient, index, weight)
    return torch.stack([(weight[column] * gradient).sum(dim=1) for column in index.T], dim=1)


def weight_gradient(values: Tensor, index: Tensor, gradient: Tensor, rows: int) -> Tensor:
    """Row i: Σ of values[t, j]·gradient[t] where index[t, j] = i; [tokens, k] twice, [tokens, d] -> [rows, d]."""
    if gradient.is_cuda:
        return _kernels().weight_gradient(values, index, gradient, rows)
    out = gradient.new_zeros(rows, gradient.shape[1])
    for place in range(index.shape[1]):
        out.index_add_(0, index[:, place], values[:, place, None].to(gradient.dtype) * gradient)
    return out


class SparseDecoder(torch.autograd.Function):
    """`decode` with gradients of the values and of the weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, index, weight)
        return decode(values, index, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        values, index, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        by_token = token_gradients(gradient, index, weight).to(values.dtype)
        return by_token, None, weight_gradient(values, index, gradient, weight.shape[0])
