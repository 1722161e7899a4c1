"""TopK by a·‖d‖: who is chosen, the threshold that training measures, and k while it is annealed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness import budget
from harness.config import SaeConfig
from harness.parallel import Solo
from harness.saes import step
from harness.saes.step import forward
from harness.saes.trained import load
from harness.training.schedule import k_at
from tests.saes.test_catalogue import make_sae, random_params
from tests.saes.test_trained import heldout_rows
from tests.tiny import train_tiny
from tests.training.members import runtime, small_config

NAME = "topk_decoder_norm"


def test_what_counts_is_what_a_latent_adds() -> None:
    """Scaling a decoder row up and its encoder row down changes nothing: neither the choice nor x̂."""
    generator = torch.Generator().manual_seed(0)
    sae = make_sae(NAME)
    params = random_params(sae, generator)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    factor = torch.rand(32, generator=generator, dtype=torch.float64) * 9 + 0.1
    scaled = params | {"W_dec": params["W_dec"] * factor[:, None], "W_enc": params["W_enc"] / factor[:, None]}
    scaled["b_enc"] = params["b_enc"] / factor
    both = [forward(sae, p, p, x, runtime(Solo()), training=True, done=1) for p in (params, scaled)]
    torch.testing.assert_close(both[0].residual, both[1].residual)
    assert torch.equal(both[0].codes.index, both[1].codes.index)
    assert int((both[0].codes.values > 0).sum()) == 60 * sae.k


def test_at_inference_k_latents_of_a_training_token_are_active_on_average() -> None:
    generator = torch.Generator().manual_seed(1)
    sae = make_sae(NAME, d_model=24, n_latents=256, k=8)
    params = random_params(sae, generator)
    x = torch.randn(16_000, 24, generator=generator, dtype=torch.float64)
    grads = {name: torch.zeros_like(value) for name, value in params.items()}
    for done in (0, 1):  # the second step measures nothing
        step(sae, params, params, x[: 8000 - 4000 * done], runtime(Solo()), None, grads, done=done)
    on_training, run = (forward(sae, params, params, part, runtime(Solo())) for part in x.split(8000))
    # all but the smallest of k·B, which the threshold equals
    assert int((on_training.codes.values > 0).sum()) == 8 * 8000 - 1
    assert float((run.codes.values > 0).sum(dim=1).double().mean()) == pytest.approx(8, rel=0.03)
    alone = torch.cat([forward(sae, params, params, row[None], runtime(Solo())).residual for row in x[8000:8010]])
    torch.testing.assert_close(run.residual[:10], alone)


def test_k_falls_linearly_over_its_share_of_the_steps() -> None:
    config = small_config(sae__k=4, sae__k_anneal_fraction=0.1, sae__k_anneal_factor=8.0)
    assert [k_at(config, step, 1000) for step in (0, 25, 50, 99, 100, 999)] == [32, 25, 18, 4, 4, 4]
    assert k_at(small_config(sae__k=4), 0, 1000) == 4
    # at most all latents
    assert k_at(small_config(sae__k=16, sae__k_anneal_fraction=0.1), 0, 1000) == 64


def test_flops_count_the_mean_of_k_and_memory_the_most() -> None:
    sae = SaeConfig(architecture=NAME, n_latents=1024, k=16, k_anneal_fraction=0.1)
    assert budget.active(sae) == pytest.approx(16 * (1 + 0.1 * 7 / 2)) and budget.most_active(sae) == 128
    config = small_config(sae__k=4, sae__k_anneal_fraction=0.1)
    mean = sum(k_at(config, step, 1000) for step in range(1000)) / 1000
    assert budget.active(config.sae) == pytest.approx(mean, rel=0.01)


def test_a_finished_sae_has_the_recorded_error_and_sparsity(tmp_path: Path) -> None:
    settings = ["sae=llama_scope", "train.tokens=40960", "train.lr_factor=8"]
    run_dir = train_tiny(tmp_path, *settings, "activations.synthetic.active_features=2", "sae.n_latents=64")
    result, trained, x = json.loads((run_dir / "result.json").read_text()), load(run_dir), heldout_rows(run_dir)
    codes = trained.encode(x)
    assert float((codes.values > 0).sum(dim=1).double().mean()) == pytest.approx(result["l0"], rel=1e-6)
    assert result["l0"] == pytest.approx(2, rel=0.1)
    assert torch.equal(codes.values, codes.values.sort(dim=1, descending=True).values)
    error = (x - trained.decode(codes)).double().square().sum(dim=1)
    assert float(error.mean()) == pytest.approx(result["mse"], rel=1e-5)
    assert result["fvu"] < 0.5
