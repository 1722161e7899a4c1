"""An SAE as a contender finds it: of any architecture, with about k active latents per token, as after training."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harness.architectures import ARCHITECTURES
from harness.config import SaeConfig
from harness.parallel import Solo
from harness.saes import Params, Sae, resolve_sae
from harness.saes.catalogue import ACTIVATIONS
from harness.saes.start import Start

AUX_ALPHA = 1 / 32
BALANCE = 0.03
BANDWIDTH = 0.05
"""As in `conf/sae/jumprelu.yaml`."""
SAMPLE = 512
"""Rows that the threshold is taken from."""


def settled(task: dict[str, Any], tensors: Params, x: Float[Tensor, "tokens d"]) -> tuple[Sae, Params]:
    """Settings and parameters. `tensors` are weights of `measure.random_data`.

    Where a threshold decides, it is one for all latents, so that L0 is k on average; with a `task["variant"]` biases
    are zero instead, as at the start of training, and half of the latents are active.
    """
    name = task["architecture"]
    traits, d, n = ARCHITECTURES[name], task["d"], task["n"]
    by_threshold = bool(traits.penalty)
    config = SaeConfig(
        name,
        n,
        0 if by_threshold else task["k"],
        task["experts"],
        target_l0=task["k"] if by_threshold else 0.0,
        aux_alpha=AUX_ALPHA if not traits.penalty else 0.0,
        balance_weight=BALANCE,
        bandwidth=BANDWIDTH,
    )
    variance = float((x - x.mean(dim=0)).square().sum(dim=1).mean())
    sae = resolve_sae(config, d, variance, variance, float(x.square().sum(dim=1).mean()))
    params = {key: tensors[key] for key in sae.layout() if key in tensors}
    start = Start(sae, params, x.double().cpu(), tensors["W_dec"], Solo())
    params |= ACTIVATIONS[name].parameters(start)
    if not traits.per_token:
        sample = x[:SAMPLE]
        values = (sample @ params["W_enc"].T).flatten()
        threshold = float(values.kthvalue(values.numel() - sample.shape[0] * task["k"]).values)
        if "threshold" in params:
            params["threshold"].fill_(threshold)
        elif "log_threshold" in params:
            params["log_threshold"].fill_(threshold).log_()
        else:
            params["b_enc"].fill_(0.0 if task["variant"] else -threshold)
            if "b_mag" in params:
                params["b_mag"].copy_(params["b_enc"])
    return sae, params


def dense_relu_step(params: Params, x: Float[Tensor, "tokens d"], sparsity: float, grads: Params) -> Tensor:
    """Loss and gradients of a ReLU SAE as plain dense products: what our step must not be slower than."""
    W_enc, W_dec = params["W_enc"], params["W_dec"]
    centred = x - params["b_dec"]
    z = torch.addmm(params["b_enc"], centred, W_enc.T).relu_()
    residual = centred - z @ W_dec
    unit = 1 / float((x - x.mean(dim=0)).square().sum())
    dz = (residual @ W_dec.T).mul_(-2 * unit).add_(sparsity * unit).mul_(z > 0)
    torch.mm(z.T, residual, out=grads["W_dec"])
    grads["W_dec"] *= -2 * unit
    torch.mm(dz.T, centred, out=grads["W_enc"])
    torch.sum(dz, dim=0, out=grads["b_enc"])
    grads["b_dec"].copy_(-2 * unit * residual.sum(dim=0) - grads["b_enc"] @ W_enc)
    fired = (z > 0).sum(dim=0)
    return unit * residual.square().sum() + sparsity * unit * z.sum() + 0 * fired.sum()
