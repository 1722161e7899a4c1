"""Mutual feature regularisation: planted dictionaries, dense autograd, blocks and no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from harness.parallel import Solo
from harness.saes import Sae, initial_params, mutual, step
from harness.saes.mutual import Peers, draw_to_peers
from tests.training.members import runtime
from tests.training.test_syncs import Waits

D = 12


def rows(count: int, seed: int, d: int = D) -> Tensor:
    """Rows of different norms, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator, dtype=torch.float64)


def drawn(own: Tensor, peers: list[Tensor], weight: float = 1.0) -> tuple[float, Tensor]:
    """(penalty, its weighted gradient)."""
    grad = torch.zeros_like(own)
    return float(draw_to_peers(own, Peers(peers, weight), Solo(), grad)), grad


def dense(own: Tensor, peers: list[Tensor]) -> Tensor:
    """The definition, on matrices of all cosines."""
    unit = own / own.norm(dim=1, keepdim=True)
    largest = [(unit @ (peer / peer.norm(dim=1, keepdim=True)).T).max(dim=1).values.mean() for peer in peers]
    return 1 - torch.stack(largest).mean()


def test_equal_dictionaries_cost_nothing_and_orthogonal_ones_one() -> None:
    own = rows(9, 0)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    penalty, grad = drawn(own, [own[order] * 3, own])
    assert abs(penalty) < 1e-14 and float(grad.abs().max()) < 1e-15
    directions = torch.linalg.qr(rows(D, 2))[0]
    assert drawn(directions[:5], [directions[5:]])[0] == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("block", [4, 1000])
def test_the_gradient_is_that_of_dense_autograd(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pairs with the largest cosine alone, at rows of any norm, with blocks that do not divide the rows."""
    monkeypatch.setattr(mutual, "MATCHED_ROWS", block)
    own, peers = rows(11, 0).requires_grad_(), [rows(11, 1), rows(11, 2)]
    expected = dense(own, peers)
    (1.7 * expected).backward()
    penalty, grad = drawn(own.detach(), peers, 1.7)
    assert penalty == pytest.approx(float(expected.detach()), rel=1e-13)
    assert own.grad is not None
    torch.testing.assert_close(grad, own.grad, rtol=1e-12, atol=1e-16)


class Largest(TorchFunctionMode):
    """Remembers the most numbers of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(r.numel() for r in (result,) if isinstance(r, Tensor))])
        return result


def test_no_matrix_of_all_cosines_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual, "MATCHED_ROWS", 16)
    own, peers = rows(150, 0, 2), [rows(150, 1, 2)]
    with Largest() as largest, Waits() as waits:
        drawn_grad = torch.zeros_like(own)
        draw_to_peers(own, Peers(peers, 1.0), Solo(), drawn_grad)
    assert 256 <= largest.numbers <= 150 * 2
    assert not waits.counted


def test_a_step_adds_the_penalty_and_its_gradient_and_nothing_to_the_peers() -> None:
    sae = Sae("topk", D, 24, 3, 1, True, 2.0, 0.0, 3, 0.0)
    x, device = rows(40, 5), torch.device("cpu")
    own, peer = (initial_params(sae, x, seed, Solo(), device, torch.float64) for seed in (0, 1))
    before = peer["W_dec"].clone()
    plain, grads = ({name: torch.zeros_like(value) for name, value in own.items()} for _ in range(2))
    alone = step(sae, own, own, x, runtime(), None, plain)
    drawn_to = step(sae, own, own, x, runtime(), None, grads, peers=Peers([peer["W_dec"]], 0.3))
    penalty, pull = drawn(own["W_dec"], [peer["W_dec"]], 0.3)
    assert float(drawn_to.loss - alone.loss) == pytest.approx(0.3 * penalty) and float(drawn_to.mutual) == penalty
    assert 0 < penalty < 1 and float(pull.abs().max()) > 0
    for name, grad in grads.items():
        expected = plain[name] + pull if name == "W_dec" else plain[name]
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-16)
    assert torch.equal(peer["W_dec"], before)
