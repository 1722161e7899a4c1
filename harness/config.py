"""The schema of a run: the settings, their meaning, the values that are refused, and which settings are science.

The values are in `conf/`; this module declares the keys. A field whose metadata says `science=False` (paths, logging,
mesh …) does not enter `run_id`: it may change how a result is reached, never the result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from harness.architectures import ARCHITECTURES, Traits
from harness.files import user_path

INITS = ("tied", "untied")
NORMALIZATIONS = ("scale", "layernorm", "none")
ROUTINGS = ("learned", "random", "hash")
OBJECTIVES = ("local", "e2e", "e2e_downstream")
SCHEDULES = ("wsd", "constant", "linear", "cosine")
PRECISIONS = ("auto", "fp32", "bf16", "fp64")
HOOKS = ("resid_post", "mlp_out", "attn_out")
TEXTS = ("stdlib", "files", "tokens", "hub")
TEXT_SETTINGS = ("text", "text_paths", "text_field", "dataset", "dataset_config", "dataset_revision", "split")
"""What each text of `activations.mixture` may set."""
STORE_DTYPES = ("bf16", "fp16", "fp32")
STATISTICS_ROWS = 131_072
"""With windows: the mean, the variance and the initial values come from so many rows at the beginning of the text (from
the rows of a window, if it has fewer)."""

SERVICE = {"science": False}


def _service(default: Any) -> Any:
    """A field that cannot change the result and therefore stays out of `run_id`."""
    return field(default=default, metadata=SERVICE)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name}={value!r} is not known; choose one of: {', '.join(allowed)}")


MOST_TOKENS = 1e15
MOST_SEED = 2**63 - 1
BELOW_ONE = 1 - 1e-9

BOUNDS: dict[str, tuple[float, float]] = {
    "sae.n_latents": (1, 10**9),
    "sae.k": (0, 10**6),
    "sae.k_anneal_fraction": (0, 1),
    "sae.k_anneal_factor": (1, 10**6),
    "sae.n_experts": (1, 10**6),
    "sae.aux_alpha": (0, 1e6),
    "sae.aux_k": (0, 10**9),
    "sae.dead_after_tokens": (1, MOST_TOKENS),
    "sae.aux_refresh_steps": (1, 10**9),
    "sae.balance_weight": (0, 1e9),
    "sae.balance_alpha": (0, 1e9),
    "sae.consistency": (0, 1e6),
    "sae.target_l0": (0, 10**6),
    "sae.sparsity": (0, 1e9),
    "sae.sparsity_warmup_tokens": (0, MOST_TOKENS),
    "sae.prefixes": (1e-9, 1),
    "sae.bandwidth": (1e-9, 1e3),
    "sae.threshold_init": (0, 1e3),
    "sae.preactivation_penalty": (0, 1e9),
    "activations.synthetic.d_model": (1, 10**6),
    "activations.synthetic.n_features": (1, 10**7),
    "activations.synthetic.zipf_exponent": (0, 100),
    "activations.synthetic.active_features": (1e-6, 1e7),
    "activations.synthetic.noise": (0, 1e6),
    "activations.synthetic.manifolds": (0, 1000),
    "activations.layer": (0, 10**5),
    "activations.context": (1, 10**7),
    "activations.window_tokens": (0, 1e12),
    "activations.outlier_factor": (0, 1e6),
    "activations.tokens": (1, MOST_TOKENS),
    "activations.heldout_tokens": (1, 1e12),
    "activations.seed": (0, MOST_SEED),
    "activations.shard_rows": (1, 10**9),
    "activations.lm_batch": (1, 10**6),
    "stream.seed": (0, MOST_SEED),
    "train.tokens": (0, MOST_TOKENS),
    "train.flops": (0, 1e28),
    "train.convergence_epsilon": (1e-9, 1),
    "train.batch_tokens": (1, 10**9),
    "train.lr_factor": (1e-12, 1e12),
    "train.lr": (0, 1e30),
    "train.warmup_tokens": (0, MOST_TOKENS),
    "train.decay_fraction": (0, 1),
    "train.clip_norm": (0, 1e12),
    "train.adam_beta1": (0, BELOW_ONE),
    "train.adam_beta2": (0, BELOW_ONE),
    "train.adam_eps": (1e-30, 1),
    "train.ema": (0, BELOW_ONE),
    "train.signum_beta": (0, BELOW_ONE),
    "train.seed": (0, MOST_SEED),
    "train.mfr_weight": (0, 1e9),
    "train.mfr_seeds": (0, MOST_SEED),
    "train.dead_window_tokens": (1, MOST_TOKENS),
    "train.eval_points": (0, 1000),
    "train.eval_rows": (1, 10**12),
    "train.threads": (0, 1024),
    "train.log_every_steps": (1, 10**12),
    "train.checkpoint_every_s": (0, 1e9),
    "train.checkpoint_every_steps": (0, 10**12),
    "mesh.dp": (1, 4096),
    "mesh.shard": (1, 4096),
    "mesh.lm": (0, 4096),
    "cluster.pack": (0, 10**4),
    "cluster.pack_minutes": (1e-3, 1e6),
    "cluster.tasks_per_node": (0, 1024),
    "cluster.cpus_per_task": (1, 1024),
    "cluster.gpus_per_task": (0, 1),
    "cluster.max_running": (0, 10**6),
    "cluster.lead_s": (0, 10**6),
    "cluster.backoff_s": (0, 1e6),
}
"""Every number of the schema: its smallest and its largest value. Some combinations of values are refused as well."""

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that could end a line of a job script or of the record, and bytes that are not UTF-8."""


def _check_values(section: Any, where: str = "") -> None:
    """Raises `ValueError` for a number outside `BOUNDS` and for a text with control characters, in `section` itself."""
    for name, value in vars(section).items():
        key = f"{where}{name}"
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool):
                lowest, highest = BOUNDS[key]
                # no `_require`: ten thousand cells would format a message for each of their values
                if not lowest <= item <= highest:
                    raise ValueError(f"{key}={value} must be at least {lowest:.12g} and at most {highest:.12g}")
            # `cluster.setup` is lines of a script
            if isinstance(item, str) and UNSAFE.search(item) and key != "cluster.setup":
                raise ValueError(f"{key}={item!r} has control characters, such as a line break; remove them")


@dataclass
class SaeConfig:
    """The model: its architecture, its size and its own terms of the loss."""

    architecture: str = MISSING
    """One of `harness.architectures.ARCHITECTURES`."""
    n_latents: int = MISSING
    """Number of latents n, summed over all experts."""
    k: int = MISSING
    """Active latents per token, for `batchtopk` and `matryoshka` on average; 0 for architectures that choose by
    threshold, which have `target_l0` or `sparsity` instead."""
    n_experts: int = 1
    """Number of experts E; 1 for `topk`. Each expert owns n/E consecutive latents."""
    enc_bias: bool = True
    """Whether the encoder has a bias per latent. The published TopK code has one; the published Switch code has not."""
    normalize: str = "scale"
    """`scale`: divide all rows by one constant of the store so that E‖x‖² = d. `layernorm`: per token, subtract the
    mean over d and scale to unit norm (Gao et al.). `none`: leave rows unchanged."""
    init: str = "tied"
    """Initial encoder: `tied`, equal to the decoder and free to leave it, or `untied`, random directions of its own
    with norm 1 (the dead-latent ablation of Gao et al., Fig. 15)."""
    match_init_norm: bool = False
    """Scale the initial encoder so that reconstructions have the same norm as the inputs (Gao et al. §A.1)."""
    aux_alpha: float = 1 / 32
    """Weight α of AuxK in the loss; 0 turns AuxK off."""
    aux_k: int = 0
    """Number of dead latents that AuxK uses per token; 0: the power of two nearest to d_model/2."""
    dead_after_tokens: float = 10e6
    """AuxK treats a latent as dead if it has not fired for this many tokens, counted over the whole mesh."""
    aux_refresh_steps: int = 8
    """Number of steps between updates of the list of dead latents."""
    balance_weight: float = 0.0
    """Switch: weight λ of E·Σ f_i·P_i in a loss in units of fvu."""
    balance_alpha: float = 0.0
    """Switch: the published α, in raw units. If positive, it replaces `balance_weight` by λ = α·d/V."""
    routing: str = "learned"
    """Switch: how the expert of a token is chosen. `learned`: by the router. Two controls of it, without balance term
    and without the factor p: `random`, drawn anew in every step; `hash`, by random directions that never change, so
    that similar rows go to the same expert."""
    consistency: float = 0.0
    """`routing=random`: weight α of the consistency term of THOR. If positive, every token trains two experts, and the
    loss is the mean of their errors + α·½‖x̂₁ − x̂₂‖²/V; a finished SAE uses one."""
    k_anneal_fraction: float = 0.0
    """Share of the steps, at their beginning, over which the number of active latents falls linearly to `k`."""
    k_anneal_factor: float = 8.0
    """With `k_anneal_fraction`: times `k`, the number at the first step; at most all latents of an expert."""
    target_l0: float = 0.0
    """Architectures with a penalty: L0 that its coefficient is steered to; 0: `sparsity` is the coefficient."""
    sparsity: float = 0.0
    """Architectures with a penalty: its coefficient λ in a loss in units of fvu. A published coefficient belongs to a
    loss that is not divided by V: divide it by V."""
    sparsity_warmup_tokens: float = 0.0
    """Tokens over which the coefficient grows linearly from 0."""
    prefixes: list[float] = field(default_factory=lambda: [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0])
    """`matryoshka`: shares of the latents whose reconstructions enter the loss; the whole is always one of them."""
    bandwidth: float = 0.001
    """`jumprelu`: width ε of the kernel around a threshold, in units of the rows' root mean squared norm."""
    threshold_init: float = 0.001
    """`jumprelu`: initial threshold θ, in the same units; 0: such that L0 begins at `target_l0`."""
    preactivation_penalty: float = 3e-6
    """`jumprelu_tanh`: coefficient λ_P of the penalty on pre-activations below their threshold."""
    prolu: str = "ste"
    """`prolu`: rule for the gradient, `ste` (straight-through) or `relu`."""

    @property
    def traits(self) -> Traits:
        return ARCHITECTURES[self.architecture]

    @property
    def first_k(self) -> int:
        """k at the first step."""
        most = min(round(self.k_anneal_factor * self.k), self.n_latents // self.n_experts)
        return most if self.k_anneal_fraction else self.k

    @property
    def visits(self) -> int:
        """Experts that a token trains."""
        return 2 if self.consistency else 1

    @property
    def active(self) -> float:
        """Active latents per token as far as they are known before training: k, or the target of L0, or n/2."""
        return self.k or self.target_l0 or self.n_latents / 2

    def __post_init__(self) -> None:
        _check_values(self, "sae.")
        _one_of("sae.architecture", self.architecture, tuple(ARCHITECTURES))
        _one_of("sae.normalize", self.normalize, NORMALIZATIONS)
        _one_of("sae.init", self.init, INITS)
        name = self.architecture
        _require(self.k >= 1 or bool(self.traits.penalty), f"sae.k={self.k} must be at least 1 for a {name} SAE")
        n, k, experts = self.n_latents, self.k, self.n_experts
        _require(
            self.traits.routed or experts == 1,
            f"sae.n_experts={experts} needs sae=switch; a {name} SAE has one expert",
        )
        self._check_routing()
        self._check_sparsity()
        _require(k <= n, f"sae.k={k} is larger than sae.n_latents={n}; lower k or raise n_latents")
        _require(
            n % experts == 0,
            f"sae.n_latents={n} is not divisible by sae.n_experts={experts}; choose a multiple of {experts}",
        )
        _require(
            k <= n // experts,
            f"sae.k={k} is larger than one expert's latents n_latents/n_experts={n // experts}; "
            f"lower k or n_experts, or raise n_latents",
        )
        _require(
            not self.traits.penalty or self.aux_alpha == 0,
            f"sae.aux_alpha={self.aux_alpha:g}: AuxK is not defined for {name}; set sae.aux_alpha=0",
        )
        _require(self.enc_bias or self.traits.per_token, f"a {name} SAE needs sae.enc_bias=true")
        _require(
            self.traits.per_token or not self.match_init_norm,
            f"sae.match_init_norm=true is for architectures with k active latents per token, not for {name}",
        )
        _one_of("sae.prolu", self.prolu, ("ste", "relu"))
        _require(bool(self.prefixes), "sae.prefixes is empty; give shares of the latents, e.g. [0.25,1]")
        _require(
            self.threshold_init > 0 or self.target_l0 > 0 or "log_threshold" not in self.traits.vectors,
            "sae.threshold_init=0 takes the first threshold from sae.target_l0; with sae.sparsity set it, e.g. to 0.05",
        )

    def _check_routing(self) -> None:
        _one_of("sae.routing", self.routing, ROUTINGS)
        _require(
            self.traits.routed or self.routing == "learned",
            f"sae.routing={self.routing} needs sae=switch; a {self.architecture} SAE has no router",
        )
        _require(
            self.consistency == 0 or (self.routing == "random" and self.n_experts > 1),
            f"sae.consistency={self.consistency:g} needs sae.routing=random and two experts or more",
        )

    def _check_sparsity(self) -> None:
        """k for some architectures, a penalty for the others."""
        name, target, fixed = self.architecture, self.target_l0, self.sparsity
        if not self.traits.penalty:
            _require(
                target == 0 and fixed == 0,
                f"sae.target_l0 and sae.sparsity are for architectures with a penalty; for {name} set sae.k",
            )
            return
        _require(self.k == 0, f"sae.k={self.k}: a {name} SAE has no fixed number; set sae.target_l0={self.k} instead")
        _require(
            (target > 0) != (fixed > 0),
            f"a {name} SAE needs either sae.target_l0=NUMBER or sae.sparsity=COEFFICIENT, and not both",
        )
        _require(target <= self.n_latents, f"sae.target_l0={target:g} is larger than sae.n_latents={self.n_latents}")


@dataclass
class SyntheticConfig:
    """A known sparse dictionary, against which recovered features can be checked."""

    d_model: int = 64
    """Dimension d of the rows."""
    n_features: int = 256
    """Number G of true features. With more than d_model, features are in superposition."""
    zipf_exponent: float = 1.0
    """Feature i fires with a probability proportional to i^−exponent."""
    active_features: float = 8.0
    """Expected number of active features in a row."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise on every coordinate, relative to that of the signal."""
    manifolds: list[int] = field(default_factory=list[int])
    """Features that are points on spheres: the dimension of the sphere of feature 1, 2, … (1: a circle; 0: one
    direction, as without this), repeated over all features. Frequencies are those of `zipf_exponent`. A row has a
    uniformly random point of the sphere of each feature that is active, times its magnitude."""

    def __post_init__(self) -> None:
        _check_values(self, "activations.synthetic.")
        widest = max(self.manifolds, default=0) + 1
        _require(
            widest <= self.d_model,
            f"activations.synthetic.manifolds={self.manifolds}: a sphere of dimension {widest - 1} needs d_model of "
            f"{widest} or more, not {self.d_model}",
        )
        _require(
            self.active_features <= self.n_features,
            f"activations.synthetic.active_features={self.active_features} must be at most "
            f"n_features={self.n_features}",
        )


@dataclass
class ActivationsConfig:
    """Where activations come from: a language model at a hook point on some text, or a synthetic dictionary."""

    kind: str = "lm"
    """`lm` (harvested from a language model) or `synthetic`."""
    model: str = ""
    """Name of a `transformers` model, a local directory or GGUF file, or `package:NAME` for the model in the pip
    package NAME."""
    revision: str = ""
    """Hub revision of the model (commit, tag or branch); empty: the default one."""
    hook: str = "resid_post"
    """`resid_post` (residual stream after the block), `mlp_out`, or `attn_out`."""
    layer: int = 0
    """Index of the block, from 0; `resid_post` of layer L is `hidden_states[L + 1]`."""
    text: str = "stdlib"
    """`stdlib` (the sources and docs of the running Python), `files`, `tokens` (files of token ids, which the model
    sees as they are), or `hub` (a Hugging Face dataset)."""
    text_paths: list[str] = field(default_factory=list)
    """For `files`: paths or globs of .txt, .jsonl or .parquet files; for `tokens`: of .parquet or .arrow files."""
    text_field: str = "text"
    """Name of the text column in .jsonl, .parquet and hub datasets. For `tokens`, `text` means `input_ids`."""
    dataset: str = ""
    """For `hub`: name of the dataset."""
    dataset_config: str = ""
    """For `hub`: name of the configuration, if the dataset has several."""
    dataset_revision: str = ""
    """For `hub`: revision of the dataset; empty: the default one."""
    split: str = "train"
    """For `hub`: name of the split."""
    mixture: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Several texts as one: for each the settings of `TEXT_SETTINGS` in which it differs from the ones here, and its
    `weight`, in proportion to which characters are taken from it. The text ends where the first of them ends."""
    context: int = 64
    """Tokens per context, including special tokens."""
    drop_first_position: bool = True
    """Drop position 0 of every context. In most models its norm is far from that of the others."""
    outlier_factor: float = 0.0
    """Drop rows whose norm is above this many times the median (massive activations), both of training and held-out
    rows. The store counts them. 0: drop none."""
    tokens: float = 1e6
    """Number of training rows to harvest; fewer if the text ends first."""
    keep: str = "store"
    """`store`: all rows are on the disk before training begins. `window`: two windows of them are, and the language
    model computes the next one while this one is trained on."""
    window_tokens: float = 0.0
    """With `keep=window`: training rows of a window. Rows are shuffled inside a window; the disk holds two."""
    heldout_tokens: float = 65536
    """Number of rows to harvest from held-out documents. They are never trained on."""
    seed: int = 0
    """Seed of the order of documents and of the shuffle of the store."""
    dtype: str = "bf16"
    """Type of the stored rows: `bf16`, `fp16` or `fp32`."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    shard_rows: int = _service(131072)
    """Rows per file of the store."""
    lm_batch: int = _service(32)
    """Contexts per forward pass of the language model."""
    lm_dtype: str = "fp32"
    """Type of the language model's weights: `fp32`, or `bf16` for half the memory and a residual stream in bf16."""
    lm_precision: str = _service("auto")
    """Precision of the language model's products: `auto` (bf16 if the processor supports it), `fp32` or `bf16`."""
    rows_precision: str = _service("")
    """The launcher sets it, to `lm_precision`, where that is asked for and a store of the same recipe exists whose rows
    were computed in another one: the name of the store then holds it."""
    device_map: str = _service("")
    """`auto`: `accelerate` spreads a language model that is larger than one GPU over all of them and the host's
    memory. Empty: one device holds it."""
    dir: str = _service("")
    """Directory of the stores; empty: `<out>/_activations`."""
    store: str = _service("")
    """Name of the store, a hash of its recipe. The launcher sets it, so that a node without a hub finds the store."""

    @property
    def stored_tokens(self) -> float:
        """Training rows of the store: all, or with windows the first ones, which give the statistics."""
        return self.tokens if self.keep == "store" else min(self.tokens, self.window_tokens, STATISTICS_ROWS)

    @property
    def texts(self) -> list[tuple[ActivationsConfig, float]]:
        """Every text with its weight: those of `mixture`, or the only one."""
        if not self.mixture:
            return [(self, 1.0)]
        own = [{key: value for key, value in part.items() if key != "weight"} for part in self.mixture]
        texts = [dataclasses.replace(self, mixture=[], **settings) for settings in own]
        return list(zip(texts, (part["weight"] for part in self.mixture), strict=True))

    def _check_mixture(self) -> None:
        for part in self.mixture:
            unknown = sorted({*part} - {*TEXT_SETTINGS, "weight"})
            _require(not unknown, f"activations.mixture: {unknown} cannot be set; {', '.join(TEXT_SETTINGS)} can")
            weight = part.get("weight")
            _require(
                isinstance(weight, int | float) and 0 < weight < 1e9,
                f"activations.mixture: weight={weight} of a text is no positive number; write {{text: …, weight: 2}}",
            )
        _require(
            all((text.text == "tokens") == (self.text == "tokens") for text, _ in self.texts),
            "activations.mixture mixes token ids with text; tokenize all of it, or none",
        )

    def __post_init__(self) -> None:
        _check_values(self, "activations.")
        self._check_mixture()
        self.dir = user_path(self.dir)
        _one_of("activations.kind", self.kind, ("lm", "synthetic"))
        if self.kind == "lm":
            _require(bool(self.model), "activations.model is empty; name a transformers model or directory")
        _one_of("activations.hook", self.hook, HOOKS)
        _one_of("activations.text", self.text, TEXTS)
        _one_of("activations.dtype", self.dtype, STORE_DTYPES)
        _one_of("activations.lm_precision", self.lm_precision, ("auto", "fp32", "bf16"))
        _one_of("activations.lm_dtype", self.lm_dtype, ("fp32", "bf16"))
        _require(
            (self.lm_dtype, self.lm_precision) != ("bf16", "fp32"),
            "activations.lm_dtype=bf16 computes in bf16; leave activations.lm_precision alone or set lm_dtype=fp32",
        )
        _one_of("activations.device_map", self.device_map, ("", "auto"))
        _require(
            self.text not in ("files", "tokens") or bool(self.text_paths),
            f"activations.text={self.text} needs activations.text_paths=[…]",
        )
        _one_of("activations.keep", self.keep, ("store", "window"))
        _require(
            (self.keep == "window") == (self.window_tokens > 0),
            f"activations.keep={self.keep} with activations.window_tokens={self.window_tokens:g}: "
            f"a window needs keep=window and window_tokens=ROWS",
        )
        _require(self.kind == "lm" or self.keep == "store", "activations.keep=window needs activations.kind=lm")
        _require(self.text != "hub" or bool(self.dataset), "activations.text=hub needs activations.dataset=NAME")
        _require(
            self.context > 1 or not self.drop_first_position or self.kind == "synthetic",
            "activations.context=1 with activations.drop_first_position=true leaves no row; raise activations.context",
        )


@dataclass
class StreamConfig:
    """The order of the training rows."""

    seed: int = 0
    """Seed of the order in which rows are read (a store) or of the rows themselves (synthetic). With 0 the first epoch
    reads a store in its own, shuffled order; any other seed permutes every epoch. Cells that are packed must share it;
    repeats that measure noise vary it together with `train.seed`."""

    def __post_init__(self) -> None:
        _check_values(self, "stream.")


@dataclass
class TrainConfig:
    """Budget, optimiser, precision, evaluations and checkpoints."""

    tokens: float = 0.0
    """Budget in tokens; with `until=convergence` it is the cap. 0: no limit on tokens."""
    flops: float = 0.0
    """Budget in FLOPs, counted by the closed form in `harness.budget`. 0: no limit on FLOPs."""
    until: str = "budget"
    """`budget`: stop at the end of the budget. `convergence`: stop when the relative improvement of held-out fvu over
    the last doubling of tokens is below `convergence_epsilon`."""
    convergence_epsilon: float = 0.01
    """Relative improvement of fvu below which a run has converged."""
    batch_tokens: int = 1024
    """Tokens per step, summed over all replicas."""
    lr_factor: float = 1.0
    """Factor c of the learning rate c·2e-4/√(n/2¹⁴)."""
    lr: float = 0.0
    """Learning rate; 0: the rule with `lr_factor`."""
    warmup_tokens: float = 0.0
    """Tokens of linear warm-up of the learning rate."""
    decay_fraction: float = 0.0
    """Fraction of the budget, at its end, over which the learning rate decays linearly to zero. Must be 0 with
    `until=convergence`."""
    schedule: str = "wsd"
    """Learning rate after the warm-up. `wsd`: stable, then the decay of `decay_fraction`. `constant`: no decay.
    `linear`, `cosine`: decay to zero over the whole rest of the budget. All but `wsd` need decay_fraction=0."""
    optimizer: str = "adam"
    """`adam`, or `signum`: the sign of the gradient with the schedule-free average (Defazio et al. 2024), which is what
    is evaluated and saved."""
    clip_norm: float = 0.0
    """Limit of the global gradient norm, for a loss in units of fvu; 0: no clipping."""
    adam_beta1: float = 0.9
    """Adam: decay of the mean of the gradients."""
    adam_beta2: float = 0.999
    """Adam: decay of the mean of the squared gradients."""
    adam_eps: float = 6.25e-10
    """Adam: ε in the denominator."""
    signum_beta: float = 0.95
    """Signum: share of the average in the weights at which gradients are taken."""
    cuda_graph: bool = _service(False)
    """Replay the step as a CUDA graph, one for each length of the list of dead latents. For small batches, whose
    kernels take less time to run than to launch: docs/performance.md has figures. Needs one process and ops=triton."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights (bias-corrected); 0: no average. If there is an average,
    it is evaluated and saved instead of the weights."""
    seed: int = 0
    """Seed of the initial weights."""
    mfr_weight: float = 0.0
    """Weight λ of mutual feature regularisation (arXiv 2411.01220) in a loss in units of fvu: + λ·w(t)·(1 − the mean,
    over the peers and over the own latents, of the largest cosine of the latent's decoder row with a row of the peer).
    w rises from 0 to 1 along a cosine over 100 steps. A published coefficient belongs to a squared error that is
    averaged over the d dimensions: multiply it by d/V, V of the rows of that loss. 0: none."""
    mfr_seeds: list[int] = field(default_factory=list[int])
    """With `mfr_weight`: the values of `train.seed` of the SAEs that are each other's peers, in any order. They differ
    in nothing else, and one job trains all of them, so a launch asks for all. Without `mfr_weight` it means nothing."""
    init_from: str = _service("")
    """An SAE whose weights are the initial ones: a run directory, or FORMAT:PATH of an SAE that another tool wrote
    (`saelens:DIR`, `sparsify:DIR`, `dictionary_learning:DIR`). Architecture, n_latents and d_model must be its own."""
    objective: str = "local"
    """What a step minimises beside AuxK and penalties. `local`: the error of x̂, in units of fvu. End to end (Braun et
    al., arXiv 2405.12241), for x̂ in place of x in the language model: `e2e`, the KL of its next-token probabilities,
    nats per row; `e2e_downstream`, half of that + 2.5·the mean over later blocks of the error of their values, each
    in units of its fvu. End-to-end batches are whole contexts; `train.init_from` is the usual start."""
    init_hash: str = ""
    """SHA-256 of these weights. The launcher sets it: the content, not the path, decides the result."""
    precision: str = "auto"
    """Precision of the products: `auto` (bf16 on a GPU, fp32 elsewhere), `fp32`, `bf16` or `fp64`. Master weights are
    fp32, or fp64 with `fp64`."""
    dead_window_tokens: float = 1e6
    """`dead_frac` is the fraction of latents that did not fire in the last `dead_window_tokens` tokens; null if the run
    is shorter."""
    eval_points: int = 12
    """Number of held-out evaluations during the run, evenly spaced in log tokens; the final one is not counted."""
    eval_rows: int = 16384
    """Held-out rows of an evaluation during the run; the final one uses all rows."""
    device: str = _service("auto")
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""
    threads: int = _service(0)
    """CPU threads; 0: torch chooses."""
    log_every_steps: int = _service(50)
    """Steps between lines of metrics."""
    checkpoint_every_s: float = _service(300.0)
    """Seconds between checkpoints; 0: no checkpoints by time."""
    checkpoint_every_steps: int = _service(0)
    """Steps between checkpoints; 0: no checkpoints by steps."""
    keep_checkpoints: bool = _service(False)
    """Keep the last checkpoint of a finished run. It holds the state of the optimiser; `sae/` holds the weights."""

    def __post_init__(self) -> None:
        _check_values(self, "train.")
        _one_of("train.until", self.until, ("budget", "convergence"))
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.device", self.device, ("auto", "cpu", "cuda"))
        self.init_from = user_path(self.init_from)
        _require(
            not self.init_hash or bool(self.init_from),
            "train.init_hash without train.init_from: leave it to the launcher",
        )
        _one_of("train.schedule", self.schedule, SCHEDULES)
        _one_of("train.objective", self.objective, OBJECTIVES)
        _one_of("train.optimizer", self.optimizer, ("adam", "signum"))
        _require(
            self.schedule == "wsd" or self.decay_fraction == 0,
            f"train.schedule={self.schedule} has no train.decay_fraction={self.decay_fraction:g}; set it to 0, or "
            f"train.schedule=wsd",
        )
        _require(
            self.until == "budget" or not self.decays,
            "train.until=convergence needs a constant learning rate: set train.schedule=constant and "
            "train.decay_fraction=0",
        )
        _require(
            self.optimizer == "adam" or not self.ema,
            f"train.ema={self.ema:g}: train.optimizer=signum has an average of its own; set train.ema=0",
        )
        _require(
            self.tokens > 0 or self.flops > 0,
            "no budget: set train.tokens or train.flops (with train.until=convergence it is the cap)",
        )
        _require(
            not 0 < self.tokens < self.batch_tokens,
            f"train.tokens={self.tokens:g} is less than one step of train.batch_tokens={self.batch_tokens}; "
            f"raise train.tokens or lower train.batch_tokens",
        )

        self._check_mfr()

    def _check_mfr(self) -> None:
        # what means nothing, or an order that means nothing, must not give a run another name
        self.mfr_seeds = sorted(self.mfr_seeds) if self.mfr_weight else []
        if not self.mfr_weight:
            return
        seeds = self.mfr_seeds
        _require(
            len(seeds) > 1 and len({*seeds}) == len(seeds),
            f"train.mfr_seeds={seeds}: train.mfr_weight={self.mfr_weight:g} needs the different seeds of two SAEs or "
            f"more, e.g. train.mfr_seeds=[0,1] train.seed=0,1",
        )
        _require(
            self.seed in seeds,
            f"train.seed={self.seed} is not among train.mfr_seeds={seeds}; add it there, or set train.mfr_weight=0",
        )
        _require(
            self.until == "budget",
            "train.mfr_weight needs train.until=budget, since its SAEs end at the same step",
        )
        _require(
            not self.init_from,
            "train.mfr_weight with train.init_from: all its SAEs would begin as the same one; leave out one of the two",
        )

    @property
    def peers(self) -> int:
        """SAEs that this one is drawn to by mutual feature regularisation."""
        return max(0, len(self.mfr_seeds) - 1)

    @property
    def decays(self) -> bool:
        """Whether the learning rate ends at zero."""
        return self.decay_fraction > 0 or self.schedule in ("linear", "cosine")


@dataclass
class MeshConfig:
    """The ranks of a job: dp × shard train one SAE, and with windows `lm` more may run the language model."""

    dp: int = 1
    """Number of replicas. Each sees its own part of the batch."""
    shard: int = 1
    """Number of ranks in a replica. Each holds its own part of the latents."""
    lm: int = 0
    """With `activations.keep=window`: ranks of their own, each with a device, that compute the windows together; 0: one
    process beside the first rank computes them, on its device."""

    def __post_init__(self) -> None:
        _check_values(self, "mesh.")

    @property
    def ranks(self) -> int:
        """All processes of a job."""
        return self.training_ranks + self.lm

    @property
    def training_ranks(self) -> int:
        return self.dp * self.shard


@dataclass
class ClusterConfig:
    """Where cells run, and the resources of a job there. Nothing here is science: it may change with every launch."""

    name: str = "local"
    """`local`: on this machine, or in the `srun` step that the launcher runs in. `slurm`: in submitted jobs."""
    pack: int = 0
    """Number of cells that one job trains together on one stream; 1: no packing, 0: the plan chooses."""
    pack_minutes: float = 60.0
    """With `pack=0` on a cluster, the plan packs cells until it expects the job to take this many minutes."""
    time: str = "04:00:00"
    """Time limit of a job in Slurm's notation. A cell that needs longer resumes in another allocation."""
    partition: str = ""
    """Value of `--partition`; empty: the site's default. The same holds for the next three."""
    account: str = ""
    """Value of `--account`."""
    qos: str = ""
    """Value of `--qos`."""
    constraint: str = ""
    """Value of `--constraint`."""
    tasks_per_node: int = 0
    """Ranks per node; 0: all ranks of a job on one node."""
    cpus_per_task: int = 4
    """CPUs per rank."""
    gpus_per_task: int = 1
    """GPUs per rank: 1, or 0 for a partition without GPUs."""
    gpu_type: str = ""
    """The site's name of the GPU type, e.g. `a100`. The plan estimates times for this type."""
    gpu_bind: str = ""
    """Value of `--gpu-bind`, e.g. `none` or `closest`; empty: the site's default."""
    mem: str = ""
    """Memory per node, e.g. `64G`; empty: the site's default."""
    max_running: int = 0
    """Maximum number of jobs of one launch that train at the same time; 0: no limit."""
    requeue: bool = True
    """Requeue a job that was stopped before its end. False, for a site that forbids it: submit the job again."""
    lead_s: int = 0
    """Seconds before the time limit at which a job begins to save; 0: derived from the duration of a save."""
    backoff_s: float = 20.0
    """Seconds to wait after the first failure of a job before it starts again; three times as long after the second.
    Slurm adds a delay of its own."""
    harvest_time: str = "04:00:00"
    """Time limit of a job that harvests a store."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of the job script, e.g. `module load cuda`."""
    container: list[str] = field(default_factory=list)
    """Words put before every command of the harness on a compute node, e.g. `[apptainer, exec, --nv, image.sif]`."""
    python: str = ""
    """Python interpreter on the compute nodes; empty: the one that runs the launcher."""
    flags: list[str] = field(default_factory=list)
    """Further flags of `sbatch`, e.g. `--exclude=n7`."""
    srun_flags: list[str] = field(default_factory=list)
    """Further flags of `srun`."""
    master_addr: str = ""
    """Address at which ranks find rank 0; empty: the first node of the job."""
    network_interface: str = ""
    """Network interface for gloo and NCCL, e.g. `ib0`; empty: they choose."""
    stage_dir: str = ""
    """Node-local directory into which the store is copied before training; empty: no copy. It may contain a variable of
    the job, e.g. `$TMPDIR`."""

    def __post_init__(self) -> None:
        _check_values(self, "cluster.")
        self.python = user_path(self.python)
        _one_of("cluster", self.name, ("local", "slurm"))
        for name in ("time", "harvest_time"):
            value = getattr(self, name)
            _require(
                re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", value) is not None,
                f"cluster.{name}={value!r} is not a time limit; write MINUTES, HH:MM:SS or DAYS-HH:MM:SS, in quotes",
            )


@dataclass
class TrackerConfig:
    """The service that shows copies of the record."""

    name: str = "wandb"
    """Where the record is copied to: `wandb` (offline without a key), `tensorboard`, `trackio` or `none`. The record in
    the run directory is always complete."""
    project: str = ""
    """Project at W&B or trackio; empty: WANDB_PROJECT if it is set (for W&B), else sae-scaling."""
    entity: str = ""
    """W&B entity; empty: WANDB_ENTITY if it is set, else the account's default."""
    tags: list[str] = field(default_factory=list)
    """W&B tags of every run; empty: those of WANDB_TAGS, separated by commas."""

    def __post_init__(self) -> None:
        _check_values(self, "tracker.")
        _one_of("tracker", self.name, ("wandb", "tensorboard", "trackio", "none"))


@dataclass
class Config:
    """One cell: the complete configuration of one run."""

    sae: SaeConfig = MISSING
    activations: ActivationsConfig = MISSING
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = MISSING
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=SERVICE)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=SERVICE)
    tracker: TrackerConfig = field(default_factory=TrackerConfig, metadata=SERVICE)
    ops: str = _service("auto")
    """Kernels: `auto` (those of the checkpoint if a run resumes, else the fastest on the device), `reference`, `cpu`
    or `triton` (for GPUs)."""
    sweep: str = _service("default")
    """Name of the sweep: the directory under `out` that holds the runs, and the W&B group."""
    out: str = _service("runs")
    """Output directory. Nothing is written outside it."""

    def __post_init__(self) -> None:
        _check_values(self)
        self.out = user_path(self.out)
        _require(
            "/" not in self.sweep and not self.sweep.startswith((".", "_")) and self.sweep != "",
            f"sweep={self.sweep!r} is not a plain name; a sweep is a directory inside out=, and out= may be any path",
        )
        shard, sae = self.mesh.shard, self.sae
        if sae != MISSING:
            cut, name = (sae.n_experts, "n_experts") if sae.traits.routed else (sae.n_latents, "n_latents")
            _require(
                cut % shard == 0,
                f"sae.{name}={cut} cannot be cut over mesh.shard={shard} ranks; choose a mesh.shard that divides it",
            )
        if self.activations != MISSING:
            _require(
                self.mesh.lm == 0 or self.activations.keep == "window",
                f"mesh.lm={self.mesh.lm} ranks compute windows; set activations.keep=window or mesh.lm=0",
            )
        if MISSING not in (self.train, self.activations) and self.activations.keep == "window":
            _require(
                self.train.batch_tokens <= self.activations.window_tokens,
                f"train.batch_tokens={self.train.batch_tokens} is more than a window of "
                f"activations.window_tokens={self.activations.window_tokens:g}; raise window_tokens",
            )
        if MISSING not in (self.train, self.activations, sae) and self.train.objective != "local":
            self._check_end_to_end()
        if self.train != MISSING:
            _require(
                self.train.batch_tokens % self.mesh.dp == 0,
                f"train.batch_tokens={self.train.batch_tokens} cannot be cut over mesh.dp={self.mesh.dp} replicas; "
                f"choose a mesh.dp that divides it",
            )
        _one_of("ops", self.ops, ("auto", "reference", "cpu", "triton"))

    def _check_end_to_end(self) -> None:
        """What an end-to-end objective is defined for."""
        objective, sae, activations, train = self.train.objective, self.sae, self.activations, self.train
        said = f"train.objective={objective}"
        _require(self.mesh.ranks == 1, f"{said} trains in one process; set mesh.dp=1, mesh.shard=1 and mesh.lm=0")
        _require(
            activations.kind == "lm" and activations.hook == "resid_post",
            f"{said} needs the residual stream of a causal language model; set activations.hook=resid_post, and "
            "activations=smollm2 or another model",
        )
        _require(
            activations.keep == "store" and not activations.outlier_factor,
            f"{said} needs activations.keep=store and activations.outlier_factor=0",
        )
        _require(
            sae.architecture not in ("multi_topk", "matryoshka", "gated") and not sae.consistency,
            f"{said} is for SAEs with one reconstruction, not for {sae.architecture}"
            + (" with sae.consistency" if sae.consistency else ""),
        )
        _require(
            train.until == "budget" and not train.flops,
            f"{said}: the budget is train.tokens; unset train.flops and train.until",
        )


def _literal(value: Any) -> Any:
    """`value` with all interpolations in its texts escaped."""
    if isinstance(value, dict):
        return {key: _literal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_literal(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1]}{found[1]}\\${{", value)
    return value


@functools.cache
def nested_sections(cls: type) -> dict[str, type]:
    """Fields of a schema dataclass that are schema dataclasses themselves."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}


def from_container(container: Any) -> Config:
    """Build and check a `Config` from a DictConfig or from a plain nested dict (a frozen `config.yaml`).

    Texts of a plain dict mean themselves: `${…}` in it is not an interpolation.

    Raises `omegaconf.errors.OmegaConfBaseException` for unknown keys and wrong types, and `ValueError` for missing and
    impossible values.
    """
    if not OmegaConf.is_config(container):
        container = _literal(container)
    merged = OmegaConf.merge(OmegaConf.structured(Config), container)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; set it on the command line, e.g. {missing[0]}=…")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def to_container(config: Any) -> dict[str, Any]:
    """The configuration, or a section of it, as a plain nested dict for YAML or JSON."""
    # dataclasses.asdict copies deeply: seconds for ten thousand cells
    values = vars(config).items()
    return {
        name: to_container(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, list)
        else value
        for name, value in values
    }


def science(config: Any) -> dict[str, Any]:
    """The settings that decide the result and differ from their default in this module.

    Defaults are left out so that a new field does not change the ids of runs that were made before it. In return, a
    default in this module must never change once it is released. Values in `conf/` may change.
    """
    settings: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        if not spec.metadata.get("science", True):
            continue
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            if nested := science(value):
                settings[spec.name] = nested
            continue
        default = spec.default_factory() if callable(spec.default_factory) else spec.default
        if value != default:
            settings[spec.name] = value
    return settings


def run_id(config: Config, store_id: str) -> str:
    """The name of a run: its size, readable, then a hash of its science.

    `store_id` names the activation store and stands for the whole `activations` group. `train.precision` must be
    resolved, because a bf16 run and an fp32 run are different runs.
    """
    assert config.train.precision != "auto", "resolve train.precision before naming a run"
    settings = science(config)
    settings["activations"] = store_id
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    sae = config.sae
    experts = f"-e{sae.n_experts}" if sae.traits.routed else ""
    active = f"k{sae.k}" if not sae.traits.penalty else f"l{sae.target_l0:g}" if sae.target_l0 else f"c{sae.sparsity:g}"
    return f"{sae.architecture}-n{sae.n_latents}-{active}{experts}-s{config.train.seed}-{digest}"
