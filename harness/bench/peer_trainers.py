"""Somebody else's trainers, unmodified. Runs in the peers' own environment and imports nothing of ours.

`python harness/bench/peer_trainers.py saelens|dictionary_learning`: the first line of standard input is a JSON object
with `data` (rows, initial weights) and what all SAEs share; each further line asks for one SAE and is answered by a
line of JSON. `peer_worker` times single steps of the same trainers.
"""

# pyright: reportMissingImports=false, reportUnknownVariableType=false
# (the peers live in another environment)
from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

Task = dict[str, Any]
"""`architecture`, `lr`, `seed`, `l0` (an L0 to aim at) or `sparsity` (a coefficient), and what all SAEs share."""
Coded = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows -> activations and reconstructions, as at inference."""

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)


class Trainer(NamedTuple):
    step: Callable[[torch.Tensor], Any]
    """Train on one batch."""
    fit: Callable[[], Coded]
    """Train on all batches of the task."""
    optimizer: torch.optim.Optimizer


def batches(data: dict[str, torch.Tensor], task: Task) -> Iterator[torch.Tensor]:
    """The batches of every trainer, in the same order."""
    for step in range(task["steps"]):
        yield data["train"][step * task["batch"] : (step + 1) * task["batch"]].float() * task["scale"]


def saelens(task: Task, data: dict[str, torch.Tensor]) -> Trainer:
    """SAELens, whose settings are made for rows of mean squared norm d."""
    from sae_lens import SAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n, d = task["n"], task["d"]
    common = {"d_in": d, "d_sae": n, "device": "cpu", "dtype": "float32"}
    name, warmup = task["architecture"], task["sparsity_warmup_steps"]
    widths = [round(share * n) for share in PREFIXES]
    torch.manual_seed(task["seed"])
    if name == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=task["l0"], **common))
    elif name == "matryoshka":
        config = MatryoshkaBatchTopKTrainingSAEConfig(k=task["l0"], matryoshka_widths=widths, **common)
        sae = MatryoshkaBatchTopKTrainingSAE(config)
    elif name == "jumprelu":
        mode = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": task["l0"], "l0_warm_up_steps": warmup}
        # theta begins at 0.01 by default, and would need thousands of steps to where it is of use
        mode["jumprelu_init_threshold"] = task["first_threshold"][str(task["l0"])]
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**mode, **common))
    elif name == "relu":
        penalty = {"l1_coefficient": task["sparsity"], "l1_warm_up_steps": warmup}
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**penalty, **common))
    else:
        penalty = {"l1_coefficient": task["sparsity"], "l1_warm_up_steps": warmup}
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(**penalty, **common))
    if not task["own_init"]:
        directions = data[f"directions.{task['seed']}"]
        with torch.no_grad():
            sae.W_dec.copy_(directions)
            sae.W_enc.copy_(directions.T)
            sae.b_dec.copy_(data["center"])
    config = SAETrainerConfig(
        total_training_samples=task["steps"] * task["batch"],
        train_batch_size_samples=task["batch"],
        lr=task["lr"],
        lr_end=0.0,
        lr_warm_up_steps=task["warmup_steps"],
        lr_decay_steps=task["decay_steps"],
        dead_feature_window=task["dead_steps"],
    )
    trainer = SAETrainer(config, sae, batches(data, task))

    def fit() -> Coded:
        with tempfile.TemporaryDirectory() as folder:
            trainer.fit().save_inference_model(folder)  # BatchTopK becomes a threshold
            trained = SAE.load_from_disk(folder, device="cpu")

        def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = trained.encode(x)
            return z, trained.decode(z)

        return coded

    return Trainer(trainer.step, fit, trainer.optimizer)


def dictionary_learning(task: Task, data: dict[str, torch.Tensor]) -> Trainer:
    """dictionary_learning, whose settings are made for rows of mean squared norm 1."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer

    name, steps = task["architecture"], task["steps"]
    common = {
        "steps": steps,
        "activation_dim": task["d"],
        "dict_size": task["n"],
        "layer": 0,
        "lm_name": "none",
        "lr": task["lr"],
        "warmup_steps": task["warmup_steps"],
        "decay_start": steps - task["decay_steps"] if task["decay_steps"] else None,
        "seed": task["seed"],
        "device": "cpu",
    }
    # by default the threshold is a mean over 1,000 steps from step 1,000 on
    threshold = {"threshold_start_step": task["warmup_steps"], "threshold_beta": 0.99}
    warmup = {"sparsity_warmup_steps": task["sparsity_warmup_steps"]}
    if name == "batchtopk":
        trainer = BatchTopKTrainer(k=task["l0"], **threshold, **common)
    elif name == "matryoshka":
        fractions = [PREFIXES[0], *(b - a for a, b in itertools.pairwise(PREFIXES))]
        trainer = MatryoshkaBatchTopKTrainer(k=task["l0"], group_fractions=fractions, **threshold, **common)
    elif name == "jumprelu":
        trainer = JumpReluTrainer(target_l0=task["l0"], **warmup, **common)
    elif name == "relu":
        trainer = StandardTrainer(l1_penalty=task["sparsity"], **warmup, **common)
    else:
        trainer = GatedSAETrainer(l1_penalty=task["sparsity"], **warmup, **common)
    if not task["own_init"]:
        _set_weights(trainer.ae, data[f"directions.{task['seed']}"], data["center"] * task["scale"])

    def fit() -> Coded:
        for step, x in enumerate(batches(data, task)):
            trainer.update(step, x)

        def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = trainer.ae.encode(x)
            return z, trainer.ae.decode(z)

        return coded

    # step 0 would compute a median
    return Trainer(lambda x: trainer.update(1, x), fit, trainer.optimizer)


def _set_weights(ae: Any, directions: torch.Tensor, center: torch.Tensor) -> None:
    """Our initial weights under the names that each of their dictionaries has for them."""
    with torch.no_grad():
        if hasattr(ae, "W_enc"):
            ae.W_enc.copy_(directions.T)
            ae.W_dec.copy_(directions)
        else:
            ae.encoder.weight.copy_(directions)
            ae.decoder.weight.copy_(directions.T)
        bias = next(getattr(ae, name) for name in ("b_dec", "decoder_bias", "bias") if hasattr(ae, name))
        bias.copy_(center)
        if hasattr(ae, "apply_b_dec_to_input"):  # JumpReLU's encoder sees x, ours x - b_dec: the same at first
            ae.b_enc.copy_(-directions @ center)


@torch.no_grad()
def judge(coded: Coded, data: dict[str, torch.Tensor], scale: float) -> dict[str, float]:
    """fvu and L0 of the held-out rows."""
    error = variance = active = 0.0
    for rows in data["heldout"].split(4096):
        x = rows.float() * scale
        z, reconstruction = coded(x)
        error += float((x - reconstruction).double().square().sum())
        variance += float((x - data["mean"].float() * scale).double().square().sum())
        active += float((z > 0).sum())
    return {"fvu": error / variance, "l0": active / len(data["heldout"])}


TRAINERS: dict[str, Callable[[Task, dict[str, torch.Tensor]], Trainer]] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
}


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what a peer prints is not an answer
    build = TRAINERS[sys.argv[1]]
    common = json.loads(sys.stdin.readline())
    torch.set_num_threads(common["threads"])
    data = load_file(common["data"])
    for line in sys.stdin:
        task = common | json.loads(line)
        if "l0" in task:
            task["l0"] = round(task["l0"])  # dictionary_learning wants a whole number
        # the rows on file have mean squared norm d
        task["scale"] = 1.0 if sys.argv[1] == "saelens" else task["d"] ** -0.5
        out.write(json.dumps(judge(build(task, data).fit(), data, task["scale"])) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
