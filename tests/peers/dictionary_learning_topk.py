"""`python -m tests.peers.dictionary_learning_topk`: our TopK against dictionary_learning 0.1.0's own TopKTrainer.

1. *Matched*: everything equal but the code, 3 paired seeds. Their loss is Σ‖x − x̂‖² per token where ours is divided by
   V, so one is V times the other: our Adam ε is theirs/V, our clipping norm theirs/V, their AuxK weight ours·V. Their
   learning rate begins at 0 and ours one step later, so their schedule is moved on by a step. Their latent counts the
   batch it is in before it is called dead, so their threshold is one batch larger. What cannot be matched: of the
   latents that were dead, theirs leaves out those that fire in the very batch, and calls a latent of value 0 fired when
   fewer than k are positive.
2. *Each at its own best learning rate*: ours with the settings of `train=quick`; theirs with its own (clipping at 1, ε,
   AuxK weight and k), the dead threshold excepted, which at 10M tokens is longer than the run. Theirs gets two input
   scales, E‖x‖² = d as ours and 1 as its own `normalize_activations`, and the better one counts. The learning rate is
   chosen at a seed of its own. Batches, initial weights and schedule stay equal.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from harness.activations.source import ActivationSource
from harness.budget import learning_rate
from harness.config import Config
from harness.ops import Ops, choose_ops
from harness.saes import Params
from harness.training.evaluate import Evaluation
from harness.training.state import TrainState
from tests.peers import paired

CLIP_NORM = 1.0
"""Fixed in their `update`."""
ADAM_EPS = 1e-8
"""torch's default, which their constructor takes."""
CHOOSING_SEED = 1000


def installed() -> bool:
    return importlib.util.find_spec("dictionary_learning") is not None


def their_module() -> Any:
    """dictionary_learning's TopK module as it is installed."""
    with warnings.catch_warnings():
        # its package imports nnsight, whose own imports warn
        warnings.simplefilter("ignore")
        return importlib.import_module("dictionary_learning.trainers.top_k")


def matched_to_them(config: Config, variance: float, d_model: int) -> Config:
    """Our settings, where theirs cannot be changed; `variance` is V in the units they see."""
    return dataclasses.replace(
        config,
        sae=dataclasses.replace(config.sae, aux_k=d_model // 2, aux_refresh_steps=1),
        train=dataclasses.replace(config.train, adam_eps=ADAM_EPS / variance, clip_norm=CLIP_NORM / variance),
    )


def copy_params(params: Params, autoencoder: Any, scale: float) -> None:
    """Our weights into theirs, whose inputs are ours divided by `scale`."""
    with torch.no_grad():
        autoencoder.encoder.weight.copy_(params["W_enc"])
        autoencoder.encoder.bias.copy_(params["b_enc"] / scale)
        autoencoder.decoder.weight.copy_(params["W_dec"].T)
        autoencoder.b_dec.copy_(params["b_dec"] / scale)


def their_params(autoencoder: Any, scale: float) -> Params:
    """Their weights as ours: latent rows, biases in the units of our normalised input."""
    return {
        "W_enc": autoencoder.encoder.weight.detach().clone(),
        "W_dec": autoencoder.decoder.weight.detach().T.contiguous(),
        "b_enc": autoencoder.encoder.bias.detach() * scale,
        "b_dec": autoencoder.b_dec.detach() * scale,
    }


def make_trainer(member: TrainState, scale: float = 1.0, matched: bool = True) -> Any:
    """Their trainer with our initial weights, learning rate and schedule; `matched`: with our AuxK too."""
    config, steps = member.config, member.last
    decay = round(config.train.decay_fraction * steps)
    trainer = their_module().TopKTrainer(
        # one step more, as the schedule is moved on by one below
        steps=steps + 1,
        decay_start=steps + 1 - decay if decay else None,
        warmup_steps=round(config.train.warmup_tokens / config.train.batch_tokens),
        activation_dim=member.sae.d_model,
        dict_size=member.sae.n_latents,
        k=member.sae.k,
        layer=config.activations.layer,
        lm_name=config.activations.model,
        lr=learning_rate(config),
        device="cpu",
        **({"auxk_alpha": member.sae.aux_alpha * member.sae.variance / scale**2} if matched else {}),
    )
    trainer.dead_feature_threshold = config.sae.dead_after_tokens + config.train.batch_tokens
    trainer.optimizer.step()  # without gradients nothing moves; the schedule wants to see a step first
    trainer.scheduler.step()
    copy_params(member.params, trainer.ae, scale)
    return trainer


def train_theirs(
    config: Config, source: ActivationSource, ops: Ops, scale: float = 1.0, matched: bool = True
) -> tuple[TrainState, Params]:
    member = paired.new_member(config, source, ops)
    trainer = make_trainer(member, scale, matched)
    for number, x in enumerate(paired.normalised_batches(member, source)):
        # from 1: their step 0 would put another b_dec in the place of ours
        trainer.update(number + 1, x / scale)
    return member, their_params(trainer.ae, scale)


Runner = Callable[[Config], Evaluation]


def runner_ours(source: ActivationSource, ops: Ops) -> Runner:
    def run(config: Config) -> Evaluation:
        member = paired.train_ours(config, source, ops)
        return paired.judge(member, member.params, source, ops)

    return run


def runner_theirs(source: ActivationSource, ops: Ops, scale: float, matched: bool) -> Runner:
    def run(config: Config) -> Evaluation:
        return paired.judge(*train_theirs(config, source, ops, scale, matched), source, ops)

    return run


def compare_matched(base: Config, source: ActivationSource, ops: Ops, seeds: list[int], clock: paired.Clock) -> bool:
    sae = paired.new_member(base, source, ops).sae
    matched = matched_to_them(base, sae.variance, sae.d_model)
    run_ours, run_theirs = runner_ours(source, ops), runner_theirs(source, ops, 1.0, True)
    ours, theirs = [], []
    for seed in seeds:
        config = paired.with_seed(matched, seed)
        ours.append(clock.line(f"matched, ours, seed {seed}", run_ours(config)))
        theirs.append(clock.line(f"matched, theirs, seed {seed}", run_theirs(config)))
    ratio, _ = paired.pairs_table("TopK, matched", "dictionary_learning", seeds, ours, theirs)
    return paired.verdict("mean fvu within 1 % of dictionary_learning", abs(ratio - 1) <= paired.WITHIN)


def best_lr_factor(name: str, run: Runner, base: Config, factors: list[float], clock: paired.Clock) -> float:
    fvu_by_factor = {}
    for factor in factors:
        config = paired.with_lr_factor(paired.with_seed(base, CHOOSING_SEED), factor)
        fvu_by_factor[factor] = clock.line(f"choosing, {name}, c = {factor:g}", run(config))
    best = min(fvu_by_factor, key=lambda factor: fvu_by_factor[factor])
    if best in (min(factors), max(factors)):
        print(f"note: the best c of {name} lies at the edge of the grid")
    return best


def compare_best(
    base: Config,
    source: ActivationSource,
    ops: Ops,
    seeds: list[int],
    factors: list[float],
    clock: paired.Clock,
) -> bool:
    sides = {
        "ours": runner_ours(source, ops),
        "theirs at E‖x‖² = d": runner_theirs(source, ops, 1.0, False),
        "theirs at E‖x‖² = 1": runner_theirs(source, ops, math.sqrt(source.d_model), False),
    }
    best, fvu = {}, {}
    for name, run in sides.items():
        best[name] = best_lr_factor(name, run, base, factors, clock)
        chosen = paired.with_lr_factor(base, best[name])
        label = f"own best, {name}, c = {best[name]:g}"
        fvu[name] = [clock.line(f"{label}, seed {seed}", run(paired.with_seed(chosen, seed))) for seed in seeds]
    rivals = [name for name in sides if name != "ours"]
    comparisons = {}
    for name in rivals:
        title = f"TopK, each at its best: ours at c = {best['ours']:g}, {name} at c = {best[name]:g}"
        comparisons[name] = paired.pairs_table(title, name, seeds, fvu["ours"], fvu[name])
    ratio, error = comparisons[min(rivals, key=lambda name: sum(fvu[name]))]
    no_worse = ratio <= 1 + min(2 * error, paired.WITHIN)
    return paired.verdict("own best: ours no worse, to two standard errors of the pairs and 1 %", no_worse)


def main() -> None:
    parser = paired.command_line("Our TopK against dictionary_learning's TopKTrainer.")
    parser.add_argument("--part", choices=("both", "matched", "best"), default="both")
    parser.add_argument("--lr-factors", default="2,4,8,16,32", help="grid of c for the second comparison")
    arguments = parser.parse_args()
    if not installed():
        raise SystemExit("dictionary_learning is not installed here; how to get it is in tests/peers/__init__.py")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    base = paired.base_config(["sae=topk", "sae.n_latents=1024", "sae.k=16"], arguments)
    source, ops = paired.activations(base, arguments.activations, arguments.out), choose_ops(arguments.ops)
    clock, seeds = paired.Clock(), paired.seeds(arguments.seeds)
    print(paired.heading(base, source, ops), flush=True)
    verdicts = []
    if arguments.part != "best":
        verdicts.append(compare_matched(base, source, ops, seeds, clock))
    if arguments.part != "matched":
        factors = [float(part) for part in arguments.lr_factors.split(",")]
        verdicts.append(compare_best(base, source, ops, seeds, factors, clock))
    paired.finish(verdicts)


if __name__ == "__main__":
    main()
