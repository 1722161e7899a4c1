"""TopK and MoE SAEs in the manner of NVIDIA's BioNeMo SAE recipe, written from a description of it.

TopK: dense encoder, `torch.topk`, a Triton sparse decoder; autograd goes back through the dense pre-activations.
MoE: a Python loop over experts, each of which takes its tokens with a boolean mask and so waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.bench.peer_worker import Step
from tests.peers.reference_step import Gradients, fvu, steps, variance
from tests.peers.sparse_decoder import SparseDecoder

BALANCE_WEIGHT = 0.03
"""As our contender's."""


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _active(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values after ReLU and indices of the k largest pre-activations."""
    values, index = torch.topk(torch.nn.functional.linear(x, weight, bias), k, dim=1)
    return values.relu(), index


def build(data: dict[str, Tensor], k: int, steel: bool) -> tuple[Step, Step, Gradients]:
    """A step of the TopK SAE, or of the MoE SAE where `data` has a router."""
    return (_moe if "W_r" in data else _topk)(data, k, steel)


def _topk(data: dict[str, Tensor], k: int, steel: bool) -> tuple[Step, Step, Gradients]:
    x, unit = data["x"], variance(data["x"])
    params = {name: _leaf(data[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}

    def loss() -> Tensor:
        values, index = _active(x - params["b_dec"], params["W_enc"], params["b_enc"], k)
        return fvu(x, SparseDecoder.apply(values, index, params["W_dec"]) + params["b_dec"], unit)

    gradients, whole = steps(loss, list(params.values()), [params["W_dec"]], steel)
    return gradients, whole, lambda: {name: _gradient(leaf) for name, leaf in params.items()}


def _moe(data: dict[str, Tensor], k: int, steel: bool) -> tuple[Step, Step, Gradients]:
    x, unit, experts = data["x"], variance(data["x"]), data["W_r"].shape[0]
    # one parameter per expert: slices of a common one would cost a gradient of full size each
    own = {name: [_leaf(part) for part in data[name].chunk(experts)] for name in ("W_enc", "W_dec", "b_enc")}
    shared = {name: _leaf(data[name]) for name in ("W_r", "b_r", "b_dec")}

    def loss() -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            p = torch.softmax((x - shared["b_r"]) @ shared["W_r"].T, dim=1)
        expert = p.argmax(dim=1)
        chosen = p.gather(1, expert[:, None])
        centred = x - shared["b_dec"]
        decoded = torch.zeros_like(x)
        for number in range(experts):
            mask = expert == number
            if not mask.any():
                continue
            values, index = _active(centred[mask], own["W_enc"][number], own["b_enc"][number], k)
            decoded[mask] = SparseDecoder.apply(values, index, own["W_dec"][number])
        share = torch.nn.functional.one_hot(expert, experts).to(p.dtype).mean(dim=0)
        balance = experts * (share * p.mean(dim=0)).sum()
        return fvu(x, chosen * decoded + shared["b_dec"], unit) + BALANCE_WEIGHT * balance

    leaves = [leaf for parts in own.values() for leaf in parts] + list(shared.values())
    gradients, whole = steps(loss, leaves, own["W_dec"], steel)

    def weight_grads() -> dict[str, Tensor]:
        joined = {name: torch.cat([_gradient(leaf) for leaf in parts]) for name, parts in own.items()}
        return joined | {name: _gradient(leaf) for name, leaf in shared.items()}

    return gradients, whole, weight_grads


def _gradient(leaf: Tensor) -> Tensor:
    """Zero for an expert without tokens."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
