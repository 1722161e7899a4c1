"""Triton kernels of `sparse_decoder`. All sums are float32; `index` is int64; all inputs are contiguous."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 1024
"""Elements of a row that one program holds."""


@triton.jit
def _decode(values, index, weight, out, d, k, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(k):
        row = tl.load(index + token * k + place)
        value = tl.load(values + token * k + place).to(tl.float32)
        total += value * tl.load(weight + row * d + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * d + column, total, mask=inside)


@triton.jit
def _token_gradients(gradient, index, weight, out, d, k, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    row = tl.load(index + token * k + place)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        left = tl.load(gradient + token * d + column, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(weight + row * d + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * k + place, tl.sum(total, axis=0))


@triton.jit
def _weight_gradient(values, index, gradient, out, d, k, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    own = tl.load(gradient + token * d + column, mask=inside, other=0.0).to(tl.float32)
    for place in range(k):
        row = tl.load(index + token * k + place)
        value = tl.load(values + token * k + place).to(tl.float32)
        if value != 0:
            tl.atomic_add(out + row * d + column, value * own, mask=inside, sem="relaxed")


def _block(d: int) -> int:
    return min(triton.next_power_of_2(d), WIDEST)


def decode(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    (tokens, k), d, block = index.shape, weight.shape[1], _block(weight.shape[1])
    out = torch.empty(tokens, d, device=values.device)
    _decode[(tokens, triton.cdiv(d, block))](values.contiguous(), index, weight, out, d, k, BLOCK=block)
    return out


def token_gradients(gradient: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    (tokens, k), d = index.shape, weight.shape[1]
    out = torch.empty(tokens, k, device=gradient.device)
    _token_gradients[(tokens, k)](gradient, index, weight, out, d, k, BLOCK=_block(d))
    return out


def weight_gradient(values: Tensor, index: Tensor, gradient: Tensor, rows: int) -> Tensor:
    (tokens, k), d, block = index.shape, gradient.shape[1], _block(gradient.shape[1])
    out = torch.zeros(rows, d, device=gradient.device)
    _weight_gradient[(tokens, triton.cdiv(d, block))](values.contiguous(), index, gradient, out, d, k, BLOCK=block)
    return out
