"""Downstream losses beside SAELens' own evaluation, of an SAE that SAELens wrote, on the same tokens."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.quality.downstream import delta_ce, of_rows, spliced_sums
from harness.quality.shared import Shared
from harness.saes.foreign import load_foreign

EVALUATE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sae_lens.evals import get_recons_loss
from sae_lens.load_model import load_model
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler

root, model_dir, hook = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
sae = TopKSAE(TopKSAEConfig(k=6, d_in=16, d_sae=48))
sae.cfg.metadata.hook_name = hook
with torch.no_grad():
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
sae.save_model(root / "sae")
model = load_model("AutoModelForCausalLM", model_dir, device="cpu")
ids = load_file(root / "ids.safetensors")["ids"]
with torch.no_grad():
    found = get_recons_loss(sae, model, ActivationScaler(), ids, True, True)
save_file({name: value.contiguous() for name, value in found.items()}, root / "found.safetensors")
"""


@pytest.mark.slow
def test_losses_are_those_of_saelens(shared: Shared, causal: Path, tmp_path: Path) -> None:
    """Everything is spliced, as SAELens does; both give values per token, so the same ones are averaged."""
    python = os.environ.get("INTEROP_PYTHON")
    if not python:
        pytest.skip("INTEROP_PYTHON names no Python with sae-lens 6.54.12")
    text = shared.text
    save_file({"ids": text.ids}, tmp_path / "ids.safetensors")
    command = [python, "-W", "ignore", "-c", EVALUATE, str(tmp_path), str(causal), "model.layers.1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "found.safetensors")
    sae = load_foreign(f"saelens:{tmp_path / 'sae'}")
    sums = spliced_sums(shared, {"sae": of_rows(sae.forward), "zero": of_rows(torch.zeros_like)}, everything=True)
    targets = text.content[:, 1:]
    for ours, name in (("sae", "sae"), ("zero", "ablation")):
        kl = float(theirs[f"kl_div_with_{name}"][text.content].double().mean())
        assert float(sums[ours]["kl"].sum() / sums[ours]["positions"].sum()) == pytest.approx(kl, rel=1e-4)
        ce = (theirs[f"ce_loss_with_{name}"] - theirs["ce_loss_without_sae"])[targets].double().mean()
        assert delta_ce(sums[ours], sums["clean"]).value == pytest.approx(float(ce), rel=1e-4)
