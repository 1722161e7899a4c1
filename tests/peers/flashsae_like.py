"""A TopK SAE in the manner of FlashSAE, written from a description of it: dense encoder, sparse decoder and backward.

Both weight gradients are products of one sparse matrix (latents × tokens, CSR) with a dense one by `torch.sparse.mm`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from harness.bench.peer_worker import Step
from tests.peers.reference_step import Gradients, fvu, steps, variance
from tests.peers.sparse_decoder import decode, token_gradients


def _rows_of_latents(index: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transposes `index` [tokens, k] into CSR: offsets [rows + 1], tokens, and the order of the values."""
    flat, order = index.flatten().sort(stable=True)
    offsets = torch.searchsorted(flat, torch.arange(rows + 1, device=index.device))
    return offsets, order // index.shape[1], order


def _product(offsets: Tensor, tokens: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """CSR [rows, tokens] · [tokens, d] in float32, under autocast too."""
    size = (offsets.shape[0] - 1, dense.shape[0])
    with warnings.catch_warnings(), torch.autocast(dense.device.type, enabled=False):
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        sparse = torch.sparse_csr_tensor(offsets, tokens, values.to(dense.dtype), size, check_invariants=False)
        return torch.sparse.mm(sparse, dense)


class _Reconstruct(torch.autograd.Function):
    """Σ_j relu(z_j)·W_dec[j] over the k largest z = W_enc x + b_enc; x without the bias, the result too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
        values, index = torch.topk(torch.nn.functional.linear(x, W_enc, b_enc), k, dim=1)
        values = values.relu()
        ctx.save_for_backward(x, W_enc, W_dec, values, index)
        return decode(values, index, W_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, values, index = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        dz = token_gradients(gradient, index, W_dec) * (values > 0)
        offsets, tokens, order = _rows_of_latents(index, W_enc.shape[0])
        for_encoder = _product(offsets, tokens, dz.flatten()[order], x)
        for_decoder = _product(offsets, tokens, values.flatten()[order], gradient)
        for_bias = dz.new_zeros(W_enc.shape[0]).index_add_(0, index.flatten(), dz.flatten())
        return decode(dz, index, W_enc), for_encoder, for_bias, for_decoder, None


def build(data: dict[str, Tensor], k: int, steel: bool) -> tuple[Step, Step, Gradients]:
    """A step of the TopK SAE."""
    x, unit = data["x"], variance(data["x"])
    params = {name: data[name].detach().clone().requires_grad_() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}

    def loss() -> Tensor:
        decoded = _Reconstruct.apply(x - params["b_dec"], params["W_enc"], params["b_enc"], params["W_dec"], k)
        return fvu(x, decoded + params["b_dec"], unit)

    gradients, whole = steps(loss, list(params.values()), [params["W_dec"]], steel)

    def weight_grads() -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in params.items() if leaf.grad is not None}

    return gradients, whole, weight_grads
