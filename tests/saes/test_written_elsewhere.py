"""SAEs that other tools have written through their own API compute the same with us. Needs INTEROP_PYTHON."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.saes.foreign import load_foreign
from tests.saes.test_foreign import dense

pytestmark = pytest.mark.slow

WRITERS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

out = Path(sys.argv[1])
torch.manual_seed(0)
size = dict(d_in=16, d_sae=64)
x = 3 * torch.randn(200, 16)
found = {"x": x}


def fill(sae):
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            torch.nn.init.normal_(parameter, std=0.5)
            if name == "threshold":
                parameter.abs_()


saes = {}
for apply in (True, False):
    common = dict(size, apply_b_dec_to_input=apply)
    saes[f"topk-{apply}"] = TopKSAE(TopKSAEConfig(k=5, **common))
    saes[f"standard-{apply}"] = StandardSAE(StandardSAEConfig(**common))
    saes[f"jumprelu-{apply}"] = JumpReLUSAE(JumpReLUSAEConfig(**common))
    saes[f"gated-{apply}"] = GatedSAE(GatedSAEConfig(**common))
saes["topk-rescaled"] = TopKSAE(TopKSAEConfig(k=5, rescale_acts_by_decoder_norm=True, **size))
for name, sae in saes.items():
    fill(sae)
    sae.save_model(out / name)
    found[f"saelens:{name}/codes"] = sae.encode(x).detach()
    found[f"saelens:{name}/out"] = sae(x).detach()
for rescaled in (True, False):
    config = BatchTopKTrainingSAEConfig(k=5, rescale_acts_by_decoder_norm=rescaled, **size)
    training = BatchTopKTrainingSAE(config)
    fill(training)
    training.topk_threshold = torch.tensor(1.5, dtype=torch.double)
    name = f"batchtopk-{rescaled}"
    training.save_inference_model(out / name)
    sae = SAE.load_from_disk(out / name)
    found[f"saelens:{name}/codes"] = sae.encode(x).detach()
    found[f"saelens:{name}/out"] = sae(x).detach()
coder = SparseCoder(16, SparseCoderConfig(num_latents=64, k=5))
fill(coder)
coder.save_to_disk(out / "coder")
answer = coder.encode(x)
codes = torch.zeros(200, 64).scatter(1, answer.top_indices, answer.top_acts)
found["sparsify:coder/codes"] = codes.detach()
found["sparsify:coder/out"] = coder(x).sae_out.detach()
save_file({name: value.contiguous() for name, value in found.items()}, out / "found.safetensors")
"""


def test_they_compute_the_same(tmp_path: Path) -> None:
    python = os.environ.get("INTEROP_PYTHON")
    if not python:
        pytest.skip("INTEROP_PYTHON names no Python with sae-lens 6.54.12 and eai-sparsify 1.3.3")
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1"}
    command = [python, "-W", "ignore", "-c", WRITERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    x = found.pop("x")
    targets = sorted({name.rpartition("/")[0] for name in found})
    assert len(targets) == 12
    for target in targets:
        kind, _, name = target.partition(":")
        sae = load_foreign(f"{kind}:{tmp_path / name}")
        torch.testing.assert_close(sae.forward(x), found[f"{target}/out"], atol=1e-5, rtol=1e-5, msg=target)
        torch.testing.assert_close(dense(sae, x), found[f"{target}/codes"], atol=1e-5, rtol=1e-5, msg=target)
