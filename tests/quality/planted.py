"""SAEs whose parameters are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.config import SaeConfig
from harness.ops import choose_ops
from harness.quality.shared import Rows, Shared
from harness.saes.normalize import Normalizer
from harness.saes.sae import Sae
from harness.saes.trained import Origin, TrainedSae


def planted(
    W_dec: Tensor,
    *,
    k: int = 0,
    architecture: str = "topk",
    W_enc: Tensor | None = None,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    scale: float = 1.0,
    fire_counts: Tensor | None = None,
    **further: Tensor,
) -> TrainedSae:
    n, d = W_dec.shape
    settings: dict[str, Any] = {"k": k} if k else {"k": 0, "target_l0": 1.0, "aux_alpha": 0.0}
    config = SaeConfig(architecture=architecture, n_latents=n, **settings)
    sae = Sae(architecture, d, n, k, 1, True, 1.0, 0.0, 0, 0.0)
    params = {
        "W_enc": W_dec.clone() if W_enc is None else W_enc,
        "W_dec": W_dec,
        "b_enc": torch.zeros(n) if b_enc is None else b_enc,
        "b_dec": torch.zeros(d) if b_dec is None else b_dec,
        **further,
    }
    origin = Origin("planted", "", 1, {"kind": "synthetic"}, False)
    counts = torch.ones(n, dtype=torch.int64) if fire_counts is None else fire_counts
    ops = choose_ops("reference", torch.device("cpu"))
    return TrainedSae(sae, params, Normalizer("scale", scale), config, origin, counts, ops)


def rows(x: Tensor, documents: int = 8) -> Rows:
    return Rows(x, torch.arange(len(x)) % documents, x.mean(dim=0), 1.0)


def orthonormal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def sparse(rows: int, n: int, active: int, seed: int = 0) -> Tensor:
    """Non-negative codes with `active` entries in each row, no two of a size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(rows, n)
    place = torch.rand(rows, n, generator=generator).argsort(dim=1)[:, :active]
    return codes.scatter(1, place, torch.rand(rows, active, generator=generator) + 0.5)


def planted_words(shared: Shared) -> TrainedSae:
    """An SAE of a model whose values at the hook are the embeddings of its tokens: latent 0 is active on the word w7
    alone, latent 1 on w3, latent 2 where latent 0 is, latent 3 never."""
    words = [shared.tokenizer.convert_tokens_to_ids(word) for word in ("w7", "w3", "w7", "w3")]
    rows = shared.model.hooked.model.get_input_embeddings().weight.detach()[words].float()  # pyright: ignore
    bias = torch.tensor([-0.97, -0.97, -0.97, -2.0])
    return planted(rows, architecture="relu", b_enc=bias)
