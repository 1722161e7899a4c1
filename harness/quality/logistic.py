"""Logistic regressions by Newton's method: one column at a time for many columns at once, and all columns together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

RIDGE = 1e-3
STEPS = 50
_CONVERGED = 1e-7
"""Largest gradient of a finished fit."""
_RIDGES = (1e-2, 1e-1, 1.0)
"""Of a probe on all channels; the best on a quarter of the training rows is taken."""
_CHOOSING = 2048
"""Most rows on which the ridge is chosen."""


class Probe(NamedTuple):
    weight: Float64[Tensor, " probes"]
    bias: Float64[Tensor, " probes"]


def fit(z: Float[Tensor, "rows probes"], y: Bool[Tensor, " rows"], ridge: float = RIDGE) -> Probe:
    """One logistic regression per column, by damped Newton with the whole 2 × 2 Hessian.

    Columns are standardised, and the ridge is on the standardised weight. Steps are cut to ±3. Converged columns leave
    the iteration.
    """
    z = z.double()
    centre, scale = z.mean(dim=0), z.std(dim=0).clamp_min(1e-12)
    x, target = (z - centre) / scale, y.double()[:, None]
    w, b = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    left = torch.arange(x.shape[1])
    for _ in range(STEPS):
        part = x[:, left]
        p = torch.sigmoid(part * w[left] + b[left])
        s = p * (1 - p)
        error = p - target
        gradient_w, gradient_b = (part * error).mean(dim=0) + ridge * w[left], error.mean(dim=0)
        ww, wb, bb = (part.square() * s).mean(dim=0) + ridge, (part * s).mean(dim=0), s.mean(dim=0).clamp_min(1e-12)
        determinant = (ww * bb - wb * wb).clamp_min(1e-12)
        step_w = ((bb * gradient_w - wb * gradient_b) / determinant).clamp(-3, 3)
        step_b = ((ww * gradient_b - wb * gradient_w) / determinant).clamp(-3, 3)
        w[left] -= step_w
        b[left] -= step_b
        left = left[(gradient_w.abs() > _CONVERGED) | (gradient_b.abs() > _CONVERGED)]
        if not len(left):
            break
    return Probe(w / scale, b - w * centre / scale)


def cross_entropy(
    probe: Probe, z: Float[Tensor, "rows probes"], y: Bool[Tensor, " rows"]
) -> Float64[Tensor, " probes"]:
    """Mean over rows of −log p(label), nats, per probe."""
    return _losses(z.double() * probe.weight + probe.bias, y[:, None]).mean(dim=0)


def loss_of(logits: Float[Tensor, " rows"], y: Bool[Tensor, " rows"]) -> float:
    """Mean over rows of −log p(label), nats."""
    return float(_losses(logits, y).mean())


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.softplus(torch.where(y, -logits, logits))


def logistic(x: Float[Tensor, "rows d"], y: Bool[Tensor, " rows"], ridge: float) -> Float64[Tensor, " d_plus_1"]:
    """Weights and, last, the bias that minimise mean −log p(label) + ridge/2·‖weights‖²; the bias is free.

    Newton with halved steps where the loss would rise. `ridge` = 1/(C·rows) is scikit-learn's regression with C.
    """
    inputs = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    target = y.double()
    penalty = torch.full((inputs.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 0

    def loss(weight: Tensor) -> float:
        return loss_of(inputs @ weight, y) + float((penalty * weight.square()).sum()) / 2

    weight = torch.zeros(inputs.shape[1], dtype=torch.float64)
    current = loss(weight)
    for _ in range(STEPS):
        p = torch.sigmoid(inputs @ weight)
        gradient = inputs.T @ (p - target) / len(inputs) + penalty * weight
        if float(gradient.abs().max()) <= _CONVERGED:
            break
        s = p * (1 - p)
        hessian = (inputs * s[:, None]).T @ inputs / len(inputs) + (penalty + 1e-9).diag()
        step = torch.linalg.solve(hessian, gradient)
        while (new := loss(weight - step)) > current and float(step.abs().max()) > 1e-12:
            step = step / 2
        weight, current = weight - step, min(new, current)
    return weight


def fit_all(x: Float[Tensor, "rows d"], y: Bool[Tensor, " rows"]) -> Callable[[Tensor], Tensor]:
    """A logistic probe on all channels; returns rows → logits. Channels are standardised; the ridge is chosen on every
    fourth row."""
    x = x.double()
    centre, scale = x.mean(dim=0), x.std(dim=0).clamp_min(1e-12)

    def logits(weight: Tensor, rows: Tensor) -> Tensor:
        return ((rows.double() - centre) / scale) @ weight[:-1] + weight[-1]

    few, labels = (x[:_CHOOSING] - centre) / scale, y[:_CHOOSING]
    aside = torch.arange(len(few)) % 4 == 0
    ridge = min(
        _RIDGES,
        key=lambda ridge: loss_of(
            logits(logistic(few[~aside], labels[~aside], ridge), x[:_CHOOSING][aside]), labels[aside]
        ),
    )
    weight = logistic((x - centre) / scale, y, ridge)
    return lambda rows: logits(weight, rows)
