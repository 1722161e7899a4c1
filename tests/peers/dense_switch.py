"""`python -m tests.peers.dense_switch`: our Switch against a dense, masked one trained by torch's autograd and Adam.

The peer computes every latent of every expert, masks, differentiates with autograd (`tests.saes.dense`) and updates
with `torch.optim.Adam`; schedule, dead latents, projection, clipping and unit norm are written here once more. It
shares no code with the training loop beyond the numbers of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from harness.budget import learning_rate
from harness.config import Config
from harness.ops import choose_ops
from harness.saes import Params, Sae
from tests.peers import paired
from tests.saes.dense import dense_loss


def schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Factor on the learning rate of a step from 0: linear warm-up, constant, linear decay to zero."""
    train = config.train
    warmup = train.warmup_tokens / train.batch_tokens
    decay = train.decay_fraction * steps

    def factor(step: int) -> float:
        rise = (step + 1) / warmup if warmup else 1.0
        fall = (steps - step) / decay if decay else 1.0
        return min(1.0, rise, fall)

    return factor


def train_dense(
    sae: Sae, config: Config, start: Params, batches: Iterable[Float[Tensor, "tokens d"]], steps: int
) -> tuple[Params, list[float]]:
    """Final weights and the loss of every step, from the weights `start`, over normalised batches."""
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    train = config.train
    adam = torch.optim.Adam(
        leaves.values(), lr=learning_rate(config), betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_eps
    )
    rate = torch.optim.lr_scheduler.LambdaLR(adam, schedule(config, steps))
    silent = torch.zeros(sae.n_latents, dtype=torch.int64)
    dead = torch.zeros(sae.n_latents, dtype=torch.bool)
    losses = []
    for number, x in enumerate(batches):
        if number % config.sae.aux_refresh_steps == 0:
            dead = silent >= config.sae.dead_after_tokens
        out = dense_loss(
            leaves,
            x,
            k=sae.k,
            n_experts=sae.n_experts,
            variance=sae.variance,
            aux_alpha=sae.aux_alpha,
            aux_k=sae.aux_k,
            dead=dead,
            balance_weight=sae.balance_weight,
        )
        adam.zero_grad()
        out["loss"].backward()
        W_dec = leaves["W_dec"]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            if train.clip_norm:
                norm = math.sqrt(sum(float(p.grad.square().sum()) for p in leaves.values() if p.grad is not None))
                for leaf in leaves.values():
                    if leaf.grad is not None:
                        leaf.grad *= min(1.0, train.clip_norm / norm)
            adam.step()
            rate.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            fired = (out["z"] > 0).any(dim=0)
            silent = torch.where(fired, 0, silent + x.shape[0])
        losses.append(float(out["loss"].detach()))
    return {name: leaf.detach() for name, leaf in leaves.items()}, losses


def main() -> None:
    arguments = paired.command_line("Our Switch against a dense one trained by autograd.").parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    overrides = ["sae=switch", "sae.n_latents=1024", "sae.k=16", "sae.n_experts=8"]
    base = paired.base_config(overrides, arguments)
    source, ops = paired.activations(base, arguments.activations, arguments.out), choose_ops(arguments.ops)
    clock, runs, ours, theirs = paired.Clock(), paired.seeds(arguments.seeds), [], []
    print(paired.heading(base, source, ops), flush=True)
    for seed in runs:
        config = paired.with_seed(base, seed)
        member = paired.train_ours(config, source, ops)
        ours.append(clock.line(f"ours, seed {seed}", paired.judge(member, member.params, source, ops)))
        fresh = paired.new_member(config, source, ops)
        params, _ = train_dense(fresh.sae, config, fresh.params, paired.normalised_batches(fresh, source), fresh.last)
        theirs.append(clock.line(f"dense, seed {seed}", paired.judge(fresh, params, source, ops)))
    ratio, _ = paired.pairs_table("Switch, n = 1024, k = 16, E = 8", "dense autograd", runs, ours, theirs)
    paired.finish([paired.verdict("mean fvu within 1 % of dense autograd", abs(ratio - 1) <= paired.WITHIN)])


if __name__ == "__main__":
    main()
