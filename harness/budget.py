"""Parameters, FLOPs, bytes and tokens of a cell: pure formulas, each with its reason. No torch.

A multiply-add counts as 2 FLOPs. `flops_per_token` is the closed form of the scientific configuration: the sparse
algorithm with a nominal AuxK, whatever kernels run and however many latents are dead, so that it can serve as an axis.
`flops_executed_per_token` counts what our step really computes. Harvesting is accounted for apart.
"""

from __future__ import annotations

import math

from harness.config import Config, SaeConfig, TrainConfig

OPTIMIZER_FLOPS = {"adam": 12, "signum": 9}
"""Per parameter. Adam: two moments (3 + 4), bias-corrected step with a square root and a division (5). Signum: a step
against the sign (3), the average (3), the point between both (3)."""

EVALUATION_BATCH = 4096
"""Held-out rows that are reconstructed at a time."""

HARVEST_COPIES = 2.05
"""A store takes this many times its size while it is made: units, and the shards made of them."""

KEPT_BYTES = 1 << 28
"""Freed memory that a process on a CPU keeps, at most (`ops.cpu.arrays`)."""

CHECKPOINT_FILE_BYTES = 256e6
"""A rank begins another file of a checkpoint when one has so much: a file is put together in memory before it is
written."""

WEIGHTS_FILE_BYTES = 4e9
"""Larger final weights are cut into several files."""

SAVE_BYTES_PER_S = 1e8
"""How fast a checkpoint is assumed to be written before a save has been timed: a slow network disk."""

NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""dtype of a store -> bytes of a number."""

MATCHED_ROWS = 2048
"""Mutual feature regularisation compares so many decoder rows with so many of a peer at a time."""

BIAS_ROWS = 1024
"""The first biases of JumpReLU with the tanh penalty come from the pre-activations of so many latents on the whole
sample at a time, and from as many sorted ones."""

PLANNED_DEAD = 0.25
"""Share of dead latents that the memory of AuxK is planned for."""

UNIT_NORM_FLOPS = {"adam": 7, "signum": 10}
"""Per decoder weight, unless it is free: removing the parallel gradient (4) and renormalising the row (3, Signum of two
sequences)."""


def word_bytes(train: TrainConfig) -> int:
    """Size of a number of the weights that the optimiser updates, of its moments and of gradients."""
    return 8 if train.precision == "fp64" else 4


def aux_k(sae: SaeConfig, d_model: int) -> int:
    """k_aux as configured, or the power of two nearest to d_model/2 (Gao et al. 2024, appendix A.2)."""
    return sae.aux_k or 2 ** round(math.log2(max(1.0, d_model / 2)))


def params(sae: SaeConfig, d_model: int) -> int:
    """Number of parameters: two matrices, biases, and the router of a Switch SAE, which hash routing does not train."""
    router = (sae.n_experts + 1) * d_model if _has_router(sae) else 0
    vectors = (1 if sae.enc_bias else 0) + len(sae.traits.vectors)
    threshold = 1 if sae.traits.has_threshold else 0
    return 2 * sae.n_latents * d_model + vectors * sae.n_latents + d_model + router + threshold


def _has_router(sae: SaeConfig) -> bool:
    return sae.traits.routed and sae.routing != "random"


def active(sae: SaeConfig) -> float:
    """Latents of a token that a step handles, on average over the training: k (4k with Multi-TopK), more while k is
    annealed, the target of L0, or n/2 without either."""
    annealed = (sae.first_k - sae.k) * sae.k_anneal_fraction / 2
    return (sae.active + annealed) * sae.traits.passes


def most_active(sae: SaeConfig) -> float:
    """The same at the step with most of them."""
    first = min(sae.n_latents / 2, sae.traits.first_active)
    return max(sae.active, sae.first_k, first) * sae.traits.passes


def _optimizer(sae: SaeConfig, d_model: int, batch_tokens: int, name: str) -> float:
    unit_norm = UNIT_NORM_FLOPS[name] * sae.n_latents * d_model if sae.traits.unit_decoder else 0
    per_step = OPTIMIZER_FLOPS[name] * params(sae, d_model) + unit_norm
    return per_step / batch_tokens


def _router(sae: SaeConfig, d_model: int) -> float:
    # logits, and their gradient with respect to W_r if it learns
    return (4.0 if sae.routing == "learned" else 2.0) * d_model * sae.n_experts if _has_router(sae) else 0.0


def _uses(sae: SaeConfig) -> int:
    """`Traits.uses`, and two of the term that draws both reconstructions of a token together."""
    return sae.traits.uses + (2 if sae.consistency else 0)


def _mutual(sae: SaeConfig, d_model: int, batch_tokens: int, peers: int) -> dict[str, float]:
    """The cosines of every decoder row with every row of each peer, once per step; empty without peers. What is linear
    in n is left out."""
    return {"mutual": peers * 2.0 * sae.n_latents**2 * d_model / batch_tokens} if peers else {}


def flops_per_token(
    sae: SaeConfig, d_model: int, batch_tokens: int, optimizer: str = "adam", peers: int = 0
) -> dict[str, float]:
    """Closed-form training FLOPs per token, by part. `peers`: `TrainConfig.peers`.

    Only the routed expert's n/E latents are encoded. Each use of the k active latents costs 2·k·d: decode once, and
    three times for the gradients (dz, W_dec, W_enc), or more often (`Traits.uses`). AuxK uses min(k_aux, n/E) latents
    four times in the same way; their pre-activations come with the encoder. With two experts per token all of this
    counts twice.
    """
    width = sae.n_latents // sae.n_experts
    aux = min(aux_k(sae, d_model), width) if sae.aux_alpha else 0
    return {
        "encoder": sae.visits * 2.0 * d_model * width,
        "selection": sae.visits * float(width),
        "decode": sae.visits * 2.0 * active(sae) * d_model,
        "gradients": sae.visits * 2.0 * (_uses(sae) - 1) * active(sae) * d_model,
        "auxk": sae.visits * 8.0 * aux * d_model,
        "router": _router(sae, d_model),
        "optimizer": _optimizer(sae, d_model, batch_tokens, optimizer),
        **_mutual(sae, d_model, batch_tokens, peers),
    }


def suffix_flops(weights: int, blocks: int, d_model: int, context: int) -> float:
    """FLOPs per token of what an end-to-end objective asks of the language model after the hook: the clean forward, the
    spliced one, and the gradient of that with respect to its input.

    `weights`: of the later blocks and the head. Each has 2 FLOPs in a forward, and 2 in the gradient, since none is for
    the weight itself. Attention over a context has 4·context·d per block in a forward, and twice that in the gradient.
    """
    return 3 * 2.0 * weights + 4 * 4.0 * context * d_model * blocks


def _per_use(width: float, k: float, d_model: int, dense_rows_per_k: int) -> float:
    """FLOPs per token of one product over the active latents: dense over a narrow group, else sparse."""
    return 2.0 * d_model * (width if width <= dense_rows_per_k * k else k)


def flops_executed_per_token(
    sae: SaeConfig,
    d_model: int,
    batch_tokens: int,
    n_dead: float,
    dense_rows_per_k: int,
    optimizer: str = "adam",
    peers: int = 0,
    encodes_dead: bool = True,
) -> dict[str, float]:
    """What a step computes when `n_dead` latents are dead, by part; per token, averaged over experts.

    `dense_rows_per_k` belongs to the kernel set (`harness.ops.Ops.dense_rows_per_k`): a group of at most this many
    latents per active one is computed as dense products. AuxK encodes the dead latents of the token's group again,
    unless it has `encodes_dead` false (`harness.saes.dead.encoded_with_all`), and is free when nothing is dead.
    """
    width = sae.n_latents // sae.n_experts
    use = _per_use(width, active(sae), d_model, dense_rows_per_k)
    dead = n_dead / sae.n_experts
    aux = 0.0
    if sae.aux_alpha and n_dead:
        chosen = min(aux_k(sae, d_model), dead)
        aux = 2.0 * d_model * dead * encodes_dead + 4 * _per_use(dead, chosen, d_model, dense_rows_per_k)
    return {
        "encoder": sae.visits * 2.0 * d_model * width,
        "selection": sae.visits * float(width),
        "decode": sae.visits * use,
        "gradients": sae.visits * (_uses(sae) - 1) * use,
        "auxk": sae.visits * aux,
        "router": _router(sae, d_model),
        "optimizer": _optimizer(sae, d_model, batch_tokens, optimizer),
        **_mutual(sae, d_model, batch_tokens, peers),
    }


def total_steps(config: Config, d_model: int) -> int:
    """Steps that the budget buys (with `until=convergence`: at most): whole batches, at least one."""
    train = config.train
    parts = flops_per_token(config.sae, d_model, train.batch_tokens, train.optimizer, train.peers)
    per_token = sum(parts.values())
    tokens = min(train.tokens or math.inf, train.flops / per_token if train.flops else math.inf)
    return max(1, int(tokens // train.batch_tokens))


def schedule_problem(config: Config, tokens: float | None = None) -> str:
    """Why warm-up and decay of the learning rate do not fit into the budget; empty if they do, or if it is unknown.

    `tokens`: the budget, where it comes from `train.flops`.
    """
    train = config.train
    budget = tokens or train.tokens
    decay = train.decay_fraction * budget
    if not budget or train.warmup_tokens + decay <= budget * (1 + 1e-9):
        return ""
    return (
        f"train.warmup_tokens={train.warmup_tokens:g} and the decay over {decay:g} tokens "
        f"(train.decay_fraction={train.decay_fraction:g}) exceed the budget of {budget:g} tokens; "
        "lower them or raise train.tokens"
    )


def memory_bytes(config: Config, d_model: int, tile_bytes: float, kernel_bytes: float) -> dict[str, int]:
    """Bytes of one rank on a CPU by part, beside its process. Compared with real runs in docs/lab-log.md.

    weights: with gradients, moments, low-precision copies, average. counters: since when each latent is silent, how
    often it fired, and in this batch. step: what a step (with AuxK over `PLANNED_DEAD` of the latents, though it needs
    nothing while nothing is dead) or an evaluation holds in addition, whichever is more. `tile_bytes`: pre-activations
    that the kernels hold at a time, at most; `kernel_bytes`: what else they hold.
    """
    train, sae, mesh = config.train, config.sae, config.mesh
    word = word_bytes(train)
    copies = 2 if train.precision == "bf16" else 0
    average = word if train.ema else 0
    rows = params(sae, d_model) // mesh.shard
    tokens, width = sae.visits * train.batch_tokens // mesh.dp, sae.n_latents // sae.n_experts
    # normalised, in the experts' order, centred, residual and one in passing; values, indices and gradients of codes
    entry = (2 * word + 8) * (3 if sae.traits.penalty else 2)
    per_token = 5 * d_model * word + round(most_active(sae)) * entry
    aux = min(aux_k(sae, d_model), width) * (5 * word + 8) + 2 * d_model * word if sae.aux_alpha else 0
    # copies of the dead rows of both matrices, and their gradients
    dead = 4 * word * d_model * PLANNED_DEAD * sae.n_latents / mesh.shard if sae.aux_alpha else 0
    # the bias-corrected average that is evaluated is a copy of its own
    training = tokens * (per_token + aux) + dead + mutual_bytes(config, d_model)
    step = kernel_bytes + max(training, EVALUATION_BATCH * per_token + rows * average)
    tile = min(tile_bytes, max(tokens, EVALUATION_BATCH) * width * word)
    return {
        "weights": rows * (4 * word + copies + average),
        "counters": 3 * 8 * sae.n_latents // mesh.shard,
        "step": round(step + tile),
    }


def mutual_bytes(config: Config, d_model: int) -> float:
    """What mutual feature regularisation holds on one rank during a step: four times the decoder rows that this replica
    compares, two blocks of a peer's rows, and the cosines of two blocks."""
    if not config.train.peers:
        return 0.0
    word = word_bytes(config.train)
    rows = config.sae.n_latents // config.mesh.shard
    own, block = -(-rows // config.mesh.dp), min(rows, MATCHED_ROWS)
    return word * ((4.0 * own + 2 * block) * d_model + min(own, MATCHED_ROWS) * block)


def checkpoint_bytes(config: Config, d_model: int) -> int:
    """Size of one checkpoint over all ranks: parameters, two moments, the average; counters of the latents."""
    word = word_bytes(config.train)
    copies = 3 + (1 if config.train.ema else 0)
    return copies * word * params(config.sae, d_model) + 17 * config.sae.n_latents


def largest_file(config: Config, d_model: int) -> float:
    """Bytes of the largest file of a checkpoint, which holds at least a matrix. Twice as much memory is needed to put
    it together."""
    word = word_bytes(config.train)
    ranks = config.mesh.training_ranks
    matrix = word * config.sae.n_latents * d_model / config.mesh.shard
    return max(matrix, min(CHECKPOINT_FILE_BYTES, checkpoint_bytes(config, d_model) / ranks))


def weights_bytes(config: Config, d_model: int) -> int:
    """Size of the final weights of a run, with their counters."""
    word = word_bytes(config.train)
    return word * params(config.sae, d_model) + 16 * config.sae.n_latents


def floor_bytes(sae: SaeConfig, d_model: int, tokens: float, element_bytes: int, shard: int = 1) -> float:
    """The least that one rank's step must move through memory beside the encoder product (docs/performance.md): three
    gathers of k rows per token, one pass of Adam over both matrices, and a twentieth of the pre-activations.

    `tokens` are those of a replica's batch, `element_bytes` the size of a number in products.
    """
    gathers = 3.0 * sae.visits * tokens * active(sae) * d_model * element_bytes
    # parameter and two moments, read and written in float32; and the low-precision copy
    adam = (24.0 + (2.0 if element_bytes == 2 else 0.0)) * 2 * sae.n_latents * d_model
    latents = 0.05 * sae.visits * tokens * sae.n_latents / sae.n_experts * element_bytes
    return (gathers + adam + latents) / shard


def bytes_sent_per_step(config: Config, d_model: int) -> dict[str, float]:
    """Bytes that one rank sends per step while no latent is dead, by kind, on an ideal network: an all-reduce of a
    buffer over g ranks sends 2·(g−1)/g of it, an all-to-all (g−1)/g.

    selection: every shard's k candidates to the token's owner, and its answers, an int32 per token and shard.
    reconstruction: the partial sums of a TopK replica. gradients: latent rows over dp, the rest over all ranks.
    counters: how often each latent fired. mutual: the decoder rows of all peers. scalars: loss and statistics.
    """
    sae, mesh = config.sae, config.mesh
    word = word_bytes(config.train)
    tokens, ranks = config.train.batch_tokens // mesh.dp, mesh.dp * mesh.shard
    rows, routed = sae.n_latents // mesh.shard, sae.traits.routed

    def sent(count: float, width: int, group: int, passes: int) -> float:
        return passes * count * width * (group - 1) / group

    owned = -(-tokens // mesh.shard) * mesh.shard
    exchanged = 0 if routed else mesh.shard
    latent_rows = rows * (2 * d_model + (1 if sae.enc_bias else 0))
    replicated = d_model + ((sae.n_experts + 1) * d_model if _has_router(sae) else 0)
    sums = 2 + (sae.n_experts if routed and sae.routing == "learned" else 0)
    scalars = sent(sums, word, ranks if routed else mesh.dp, 2) + sent(1, 8, ranks, 2)
    if routed:
        scalars += sent(sae.n_experts, word, mesh.dp, 2)
    if config.train.clip_norm:
        scalars += sent(1, word, mesh.shard, 2)
    if sae.consistency:
        scalars += sent(1, word, ranks, 2)
    peers = config.train.peers
    if peers:
        scalars += sent(1, word, ranks, 2)
    # both residuals of each token, for THOR's consistency term
    whole = sent(2 * tokens * d_model, word, mesh.shard, 2) if sae.consistency else 0.0
    parts = {
        "selection": sent(owned * sae.k, word, exchanged, 1) + sent(owned, 4, exchanged, 1) if exchanged else 0.0,
        "reconstruction": sent(tokens * d_model, word, exchanged, 2) if exchanged else whole,
        "gradients": sent(latent_rows, word, mesh.dp, 2) + sent(replicated, word, ranks, 2),
        "counters": sent(rows, 8, mesh.dp, 2),
        "mutual": sent(peers * sae.n_latents * d_model, word, mesh.shard, 2),
        "scalars": scalars,
    }
    return {kind: count for kind, count in parts.items() if count}


def learning_rate(config: Config) -> float:
    """Peak learning rate: `train.lr` if it is set, else by `learning_rate_rule`."""
    train = config.train
    return train.lr or learning_rate_rule(config.sae.n_latents, train.lr_factor)


def learning_rate_rule(n_latents: float, factor: float) -> float:
    """c·2e-4/√(n/2¹⁴) with n = `n_latents` in all and c = `factor`."""
    return factor * 2e-4 / math.sqrt(n_latents / 2**14)
