"""SAEs that other tools have written through their own API compute the same with us.

Needs INTEROP_PYTHON (sae-lens 6.54.12, eai-sparsify 1.3.3) and DICTIONARY_PYTHON (dictionary_learning 0.1.0).
"""

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


DICTIONARIES = """
import sys
from pathlib import Path
import torch
from dictionary_learning import dictionary
from dictionary_learning.training import trainSAE
from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, standard, top_k
from safetensors.torch import save_file

out, steps = Path(sys.argv[1]), 30
torch.manual_seed(0)
x = 3 * torch.randn(200, 16)
found = {"x": x}
common = dict(activation_dim=16, dict_size=64, steps=steps, lr=0.01, warmup_steps=0)
common.update(layer=4, lm_name="m", submodule_name="mlp.4", device="cpu")
late = dict(k=5, threshold_start_step=5)
trained = {
    "topk": (top_k.TopKTrainer, top_k.AutoEncoderTopK, dict(k=5)),
    "batchtopk": (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE, late),
    "matryoshka": (
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
        dict(late, group_fractions=[0.25, 0.75]),
    ),
    "jumprelu": (
        jumprelu.JumpReluTrainer, dictionary.JumpReluAutoEncoder, dict(target_l0=5, sparsity_warmup_steps=2)
    ),
    "standard": (standard.StandardTrainer, dictionary.AutoEncoder, dict(l1_penalty=0.01, sparsity_warmup_steps=2)),
}


def note(name, sae):
    found[f"{name}/codes"] = sae.encode(x).detach()
    found[f"{name}/out"] = sae(x).detach()


for name, (trainer, kind, settings) in trained.items():
    config = dict(common, trainer=trainer, dict_class=kind, **settings)
    data = (torch.randn(32, 16) + 1 for _ in range(steps + 5))
    trainSAE(data=data, trainer_configs=[config], steps=steps, use_wandb=False, save_dir=str(out / name))
    note(f"{name}/trainer_0", kind.from_pretrained(str(out / name / "trainer_0" / "ae.pt")))
for kind in (dictionary.GatedAutoEncoder, dictionary.AutoEncoderNew):
    sae = kind(16, 64)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = out / kind.__name__
    folder.mkdir()
    torch.save(sae.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text("{}")
    note(kind.__name__, sae)
save_file({name: value.contiguous() for name, value in found.items()}, out / "found.safetensors")
"""


def written(variable: str, script: str, out: Path) -> dict[str, torch.Tensor]:
    """What a script in another Python wrote: inputs `x`, and `TARGET/codes` and `TARGET/out` of each SAE."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with the packages that this file names")
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1"}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", script, str(out)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return load_file(out / "found.safetensors")


def compare(kind: str, place: Path, name: str, found: dict[str, torch.Tensor]) -> None:
    sae, x = load_foreign(f"{kind}:{place}"), found["x"]
    torch.testing.assert_close(sae.forward(x), found[f"{name}/out"], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(dense(sae, x), found[f"{name}/codes"], atol=1e-5, rtol=1e-5, msg=name)


def targets(found: dict[str, torch.Tensor]) -> list[str]:
    return sorted({name.rpartition("/")[0] for name in found if "/" in name})


def test_saelens_and_sparsify(tmp_path: Path) -> None:
    found = written("INTEROP_PYTHON", WRITERS, tmp_path)
    assert len(targets(found)) == 12
    for target in targets(found):
        kind, _, name = target.partition(":")
        compare(kind, tmp_path / name, target, found)


def test_dictionary_learning(tmp_path: Path) -> None:
    found = written("DICTIONARY_PYTHON", DICTIONARIES, tmp_path)
    assert len(targets(found)) == 7
    for target in targets(found):
        compare("dictionary_learning", tmp_path / target, target, found)
