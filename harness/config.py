"""The schema of a run: what can be set, what it means, what is refused, and which settings are science.

Values live in `conf/`; this module only says which keys exist. A field whose metadata says `science=False`
(paths, logging, mesh …) does not enter `run_id`: it may change how a result is reached, never what it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

ARCHITECTURES = ("topk", "switch")
NORMALIZATIONS = ("scale", "layernorm", "none")
PRECISIONS = ("auto", "fp32", "bf16", "fp64")
HOOKS = ("resid_post", "mlp_out", "attn_out")
TEXTS = ("stdlib", "files", "hub")
STORE_DTYPES = ("bf16", "fp16", "fp32")


SERVICE = {"science": False}


def _service(default: Any) -> Any:
    """A field that cannot change the result, and so stays out of `run_id`."""
    return field(default=default, metadata=SERVICE)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name}={value!r} is not known; choose one of: {', '.join(allowed)}")


@dataclass
class SaeConfig:
    """The model: architecture, size, and the parts of the loss that belong to it."""

    architecture: str = MISSING
    """`topk` (Gao et al. 2024) or `switch` (Mudide et al. 2024)."""
    n_latents: int = MISSING
    """Number of latents n, the total over all experts."""
    k: int = MISSING
    """Active latents per token."""
    n_experts: int = 1
    """Number of experts E; 1 for `topk`. Each owns n/E consecutive latents."""
    enc_bias: bool = True
    """Whether the encoder has a bias per latent (published TopK code: yes; published Switch: no)."""
    normalize: str = "scale"
    """`scale`: divide by one constant of the store so that E‖x‖² = d. `layernorm`: per token, subtract the mean
    over d and scale to unit norm (Gao et al.). `none`."""
    match_init_norm: bool = False
    """Scale the encoder at initialisation so that reconstructions have the norm of the inputs (Gao et al. §A.1)."""
    aux_alpha: float = 1 / 32
    """Weight of AuxK in the loss; 0 switches it off."""
    aux_k: int = 0
    """Dead latents used by AuxK per token; 0 means the power of two nearest to d_model/2."""
    dead_after_tokens: float = 10e6
    """A latent is dead for AuxK after this many consecutive global tokens without firing."""
    aux_refresh_steps: int = 8
    """The list of dead latents is renewed every this many steps."""
    balance_weight: float = 0.0
    """Switch: λ, weight of E·Σ f_i·P_i in a loss measured in units of fvu."""
    balance_alpha: float = 0.0
    """Switch: the published α in raw units; when positive it sets λ = α·d/V instead of `balance_weight`."""

    def __post_init__(self) -> None:
        _one_of("sae.architecture", self.architecture, ARCHITECTURES)
        _one_of("sae.normalize", self.normalize, NORMALIZATIONS)
        for name in ("n_latents", "k", "n_experts"):
            value = getattr(self, name)
            _require(value >= 1, f"sae.{name}={value} must be at least 1")
        n, k, experts = self.n_latents, self.k, self.n_experts
        _require(
            self.architecture == "switch" or experts == 1,
            f"sae.n_experts={experts} needs sae=switch; a topk SAE has one expert",
        )
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
        _require(self.aux_alpha >= 0, f"sae.aux_alpha={self.aux_alpha} must not be negative")
        _require(self.aux_k >= 0, f"sae.aux_k={self.aux_k} must not be negative (0 chooses by d_model)")
        _require(self.dead_after_tokens > 0, f"sae.dead_after_tokens={self.dead_after_tokens} must be positive")
        _require(self.aux_refresh_steps >= 1, f"sae.aux_refresh_steps={self.aux_refresh_steps} must be at least 1")
        _require(
            min(self.balance_weight, self.balance_alpha) >= 0,
            "sae.balance_weight and sae.balance_alpha must not be negative",
        )


@dataclass
class SyntheticConfig:
    """A known sparse dictionary: ground truth for recovery."""

    d_model: int = 64
    """Width of the vectors."""
    n_features: int = 256
    """Number G of true features; more than d_model is superposition."""
    zipf_exponent: float = 1.0
    """Feature i fires with probability ∝ i^−exponent."""
    active_features: float = 8.0
    """Expected number of active features per row."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise added to every coordinate, relative to the signal's."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_features"):
            value = getattr(self, name)
            _require(value >= 1, f"activations.synthetic.{name}={value} must be at least 1")
        for name in ("zipf_exponent", "noise"):
            value = getattr(self, name)
            _require(
                value >= 0 and math.isfinite(value),
                f"activations.synthetic.{name}={value} must be finite and not negative",
            )
        _require(
            0 < self.active_features <= self.n_features,
            f"activations.synthetic.active_features={self.active_features} must be above 0 and at most "
            f"n_features={self.n_features}",
        )


@dataclass
class ActivationsConfig:
    """Where x comes from: a language model at a hook point over some text, or a synthetic dictionary."""

    kind: str = "lm"
    """`lm` (harvested from a language model) or `synthetic`."""
    model: str = ""
    """A `transformers` name or local directory; `package:NAME` takes the model that pip package NAME carries."""
    revision: str = ""
    """Hub revision (commit, tag or branch); empty takes the default one."""
    hook: str = "resid_post"
    """`resid_post` (residual stream after the block), `mlp_out`, or `attn_out`."""
    layer: int = 0
    """0-based block; `resid_post` of layer L is `hidden_states[L + 1]`."""
    text: str = "stdlib"
    """`stdlib` (the running Python's own sources and docs), `files`, or `hub` (a Hugging Face dataset)."""
    text_paths: list[str] = field(default_factory=list)
    """For `files`: paths or globs of .txt, .jsonl or .parquet files."""
    text_field: str = "text"
    """The column that holds the text in .jsonl, .parquet and hub datasets."""
    dataset: str = ""
    """For `hub`: dataset name."""
    dataset_config: str = ""
    """For `hub`: configuration name, if the dataset has several."""
    dataset_revision: str = ""
    """For `hub`: revision; empty takes the default one."""
    split: str = "train"
    """For `hub`: which split."""
    context: int = 64
    """Tokens per context, special tokens included."""
    drop_first_position: bool = True
    """Drop position 0 of every context: its norm is far from the rest in most models."""
    tokens: float = 1e6
    """Training rows to harvest (fewer if the text ends first)."""
    heldout_tokens: float = 65536
    """Rows to harvest from held-out documents, never trained on."""
    seed: int = 0
    """Order of documents and shuffle of the store."""
    dtype: str = "bf16"
    """How rows are stored: `bf16`, `fp16` or `fp32`."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    shard_rows: int = _service(131072)
    """Rows per shard file."""
    lm_batch: int = _service(32)
    """Contexts per forward of the language model."""
    lm_precision: str = _service("auto")
    """`auto` (bf16 where the processor computes it), `fp32` or `bf16`: the language model's forward."""
    dir: str = _service("")
    """Where stores live; empty means `<out>/_activations`."""
    store: str = _service("")
    """Recipe hash of the store. Launching fills it in, so that a node without a hub finds the store by name."""

    def __post_init__(self) -> None:
        _one_of("activations.kind", self.kind, ("lm", "synthetic"))
        if self.kind == "lm":
            _require(bool(self.model), "activations.model is empty; name a transformers model or directory")
            _require(self.layer >= 0, f"activations.layer={self.layer} must not be negative (blocks count from 0)")
        _one_of("activations.hook", self.hook, HOOKS)
        _one_of("activations.text", self.text, TEXTS)
        _one_of("activations.dtype", self.dtype, STORE_DTYPES)
        _one_of("activations.lm_precision", self.lm_precision, ("auto", "fp32", "bf16"))
        _require(
            self.text != "files" or bool(self.text_paths),
            "activations.text=files needs activations.text_paths=[…]",
        )
        _require(self.text != "hub" or bool(self.dataset), "activations.text=hub needs activations.dataset=NAME")
        for name in ("tokens", "heldout_tokens", "context", "shard_rows", "lm_batch"):
            value = getattr(self, name)
            _require(value >= 1, f"activations.{name}={value} must be at least 1")


@dataclass
class StreamConfig:
    seed: int = 0
    """Order in which the rows of the store are seen; shared by all cells that are compared or packed."""


@dataclass
class TrainConfig:
    """Budget, optimiser, evaluation schedule."""

    tokens: float = 0.0
    """Budget in tokens; with `until=convergence` the cap. 0: not limited by tokens."""
    flops: float = 0.0
    """Budget in FLOPs of the closed form (`harness.budget`); 0: not limited by FLOPs."""
    until: str = "budget"
    """`budget`, or `convergence`: stop when held-out fvu improved by less than `convergence_epsilon`, relative,
    over the last doubling of tokens."""
    convergence_epsilon: float = 0.01
    batch_tokens: int = 1024
    """Tokens per step, over the whole mesh."""
    lr_factor: float = 1.0
    """c in lr = c·2e-4/√(n/2¹⁴)."""
    lr: float = 0.0
    """The learning rate itself; 0 uses the rule with `lr_factor`."""
    warmup_tokens: float = 0.0
    """Linear warm-up of the learning rate."""
    decay_fraction: float = 0.0
    """Linear decay to zero over this last share of the budget; not with `until=convergence`."""
    clip_norm: float = 0.0
    """Global gradient norm limit, in units of a loss measured in fvu; 0: no clipping."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 6.25e-10
    cuda_graph: bool = _service(False)
    """Replay the step as a CUDA graph while no latent is dead: for small SAEs, whose kernels are shorter than the time
    to start them. One process, ops=triton; not yet measured."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights (bias-corrected); 0: none. With an average, it is
    what is evaluated and saved."""
    seed: int = 0
    """Initialisation."""
    precision: str = "auto"
    """Compute precision: `auto` (bf16 on a GPU, fp32 elsewhere), `fp32`, `bf16`, `fp64`. Master weights are fp32
    (fp64 with `fp64`)."""
    dead_window_tokens: float = 1e6
    """`dead_frac` is the share of latents silent over the last this many tokens; null if the run is shorter."""
    eval_points: int = 12
    """Held-out evaluations along the run, evenly spaced in log tokens, the final one excluded."""
    eval_rows: int = 16384
    """Held-out rows of the periodic evaluations; the final one uses all."""
    device: str = _service("auto")
    """`auto` (a GPU when there is one), `cpu`, or `cuda`."""
    threads: int = _service(0)
    """CPU threads; 0 leaves the choice to torch."""
    log_every_steps: int = _service(50)
    checkpoint_every_s: float = _service(300.0)
    """Seconds between checkpoints; 0: only by steps."""
    checkpoint_every_steps: int = _service(0)
    """Steps between checkpoints; 0: only by time."""
    keep_checkpoints: bool = _service(False)
    """Keep the last checkpoint of a finished run (it holds the optimiser; `sae/` holds the weights)."""

    def __post_init__(self) -> None:
        _one_of("train.until", self.until, ("budget", "convergence"))
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.device", self.device, ("auto", "cpu", "cuda"))
        _require(self.batch_tokens >= 1, f"train.batch_tokens={self.batch_tokens} must be at least 1")
        _require(0 <= self.decay_fraction <= 1, f"train.decay_fraction={self.decay_fraction} must lie between 0 and 1")
        _require(
            self.until == "budget" or self.decay_fraction == 0,
            "train.until=convergence needs a constant learning rate: set train.decay_fraction=0",
        )
        _require(0 <= self.ema < 1, f"train.ema={self.ema} must be at least 0 and below 1")
        _require(
            0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1,
            f"train.adam_beta1={self.adam_beta1} and train.adam_beta2={self.adam_beta2} must lie in [0, 1)",
        )
        for name in ("lr_factor", "convergence_epsilon", "adam_eps"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"train.{name}={value} must be positive and finite")
        for name in ("tokens", "flops", "lr", "warmup_tokens", "clip_norm", "checkpoint_every_s", "threads"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), f"train.{name}={value} must be finite and not negative")
        _require(
            self.tokens > 0 or self.flops > 0,
            "no budget: set train.tokens or train.flops (with train.until=convergence it is the cap)",
        )
        _require(
            not 0 < self.tokens < self.batch_tokens,
            f"train.tokens={self.tokens:g} is less than one step of train.batch_tokens={self.batch_tokens}; "
            f"raise the one or lower the other",
        )
        for name in ("log_every_steps", "eval_rows", "dead_window_tokens"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        for name in ("eval_points", "checkpoint_every_steps", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}={value} must not be negative")


@dataclass
class MeshConfig:
    dp: int = 1
    """Replicas that see different tokens."""
    shard: int = 1
    """Ranks that share the latents of one replica."""

    def __post_init__(self) -> None:
        _require(self.dp >= 1 and self.shard >= 1, f"mesh.dp={self.dp} and mesh.shard={self.shard} must be at least 1")


@dataclass
class ClusterConfig:
    """Where cells run, and what a job there is given: never science, all of it may change from launch to launch."""

    name: str = "local"
    """`local` (this machine, or the `srun` step that the launcher runs in) or `slurm` (submitted)."""
    pack: int = 0
    """Cells trained together on one stream in one job: N of them, 1 for never, 0 lets the plan choose."""
    pack_minutes: float = 60.0
    """With `pack=0` on a cluster, cells are packed until the job is estimated to take this long."""
    time: str = "04:00:00"
    """Time limit of a job, as Slurm writes it; a cell that needs longer goes on in the next allocation."""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    tasks_per_node: int = 0
    """Ranks on one node; 0 puts all ranks of a job on one."""
    cpus_per_task: int = 4
    gpus_per_task: int = 1
    """GPUs of a rank: 1, or 0 for a partition without GPUs."""
    gpu_type: str = ""
    """Type as the site names it, e.g. `a100`; also what the plan estimates times for."""
    gpu_bind: str = ""
    """Value of `--gpu-bind` (e.g. `none`, `closest`); empty leaves it to the site."""
    mem: str = ""
    """Memory per node, e.g. `64G`; empty leaves it to the site."""
    max_running: int = 0
    """At most this many elements of an array at a time; 0: no limit."""
    requeue: bool = True
    """Requeue a job that was stopped before its end; false (where a site forbids it): submit it again."""
    lead_s: int = 0
    """Seconds before the time limit at which a job begins to save; 0 derives them from the time a save takes."""
    backoff_s: float = 20.0
    """Wait after a failure before the next start; three times as long after the second. Slurm adds its own delay."""
    harvest_time: str = "04:00:00"
    """Time limit of the job that harvests a missing store."""
    setup: list[str] = field(default_factory=list)
    """Lines of the job script before anything runs, e.g. `module load cuda`."""
    container: list[str] = field(default_factory=list)
    """Put before every command of ours on the compute node, e.g. `[apptainer, exec, --nv, image.sif]`."""
    python: str = ""
    """Interpreter on the compute nodes; empty: the one that submits."""
    flags: list[str] = field(default_factory=list)
    """Further flags of `sbatch`, e.g. `--exclude=n7`."""
    srun_flags: list[str] = field(default_factory=list)
    """Further flags of `srun`."""
    master_addr: str = ""
    """Where ranks find rank 0; empty: the first node of the job."""
    network_interface: str = ""
    """Network interface of gloo and NCCL, e.g. `ib0`; empty leaves the choice to them."""
    stage_dir: str = ""
    """Node-local directory to copy the store into before training; may name a variable of the job, e.g. `$TMPDIR`."""

    def __post_init__(self) -> None:
        _one_of("cluster", self.name, ("local", "slurm"))
        for name in ("pack", "tasks_per_node", "gpus_per_task", "max_running", "lead_s", "backoff_s"):
            value = getattr(self, name)
            _require(value >= 0, f"cluster.{name}={value} must not be negative")
        _require(self.gpus_per_task <= 1, f"cluster.gpus_per_task={self.gpus_per_task}: a rank uses one GPU, or 0")
        _require(self.cpus_per_task >= 1, f"cluster.cpus_per_task={self.cpus_per_task} must be at least 1")
        _require(self.pack_minutes > 0, f"cluster.pack_minutes={self.pack_minutes} must be positive")
        for name in ("time", "harvest_time"):
            value = getattr(self, name)
            _require(
                re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", value) is not None,
                f"cluster.{name}={value!r} is not a time limit; write MINUTES, HH:MM:SS or DAYS-HH:MM:SS, in quotes",
            )


@dataclass
class TrackerConfig:
    name: str = "wandb"
    """`wandb` (offline without a key) or `none`; the run directory's own record is complete either way."""
    project: str = "sae-scaling"
    entity: str = ""
    """Empty: the account's default."""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _one_of("tracker", self.name, ("wandb", "none"))


@dataclass
class Config:
    """One cell: everything that one run needs to know."""

    sae: SaeConfig = MISSING
    activations: ActivationsConfig = MISSING
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = MISSING
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=SERVICE)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=SERVICE)
    tracker: TrackerConfig = field(default_factory=TrackerConfig, metadata=SERVICE)
    ops: str = _service("auto")
    """Kernels: `auto` (the fastest for the device, or those that the checkpoint was made with), `reference`, `cpu`, or
    `triton` (GPUs)."""
    sweep: str = _service("default")
    """Name of the directory under `out` (and the W&B group) that collects the runs."""
    out: str = _service("runs")
    """Output directory; nothing outside it is written."""

    def __post_init__(self) -> None:
        _require(
            "/" not in self.sweep and not self.sweep.startswith((".", "_")) and self.sweep != "",
            f"sweep={self.sweep!r} is not a plain name; it is a directory under out=, which may be anywhere",
        )
        shard, sae = self.mesh.shard, self.sae
        if sae != MISSING:
            cut, name = (sae.n_experts, "n_experts") if sae.architecture == "switch" else (sae.n_latents, "n_latents")
            _require(
                cut % shard == 0,
                f"sae.{name}={cut} cannot be cut over mesh.shard={shard} ranks; choose a mesh.shard that divides it",
            )
        if self.train != MISSING:
            _require(
                self.train.batch_tokens % self.mesh.dp == 0,
                f"train.batch_tokens={self.train.batch_tokens} cannot be cut over mesh.dp={self.mesh.dp} replicas; "
                f"choose a mesh.dp that divides it",
            )
        _one_of("ops", self.ops, ("auto", "reference", "cpu", "triton"))


def from_container(container: Any) -> Config:
    """Build and check a `Config` from a DictConfig or a plain nested dict (a frozen `config.yaml`).

    Raises `omegaconf.errors.OmegaConfBaseException` for unknown keys, wrong types and missing values, and
    `ValueError` for values that make no sense.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), container)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; set it on the command line, e.g. {missing[0]}=…")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def to_container(config: Any) -> dict[str, Any]:
    """The configuration (or a section of it) as a plain nested dict, ready for YAML or JSON."""
    # dataclasses.asdict copies deeply, which takes seconds for ten thousand cells
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
    """The settings that decide the result and differ from the default they were introduced with.

    Leaving defaults out means that a field added later does not orphan the runs made before it. The price: a
    default in this module, once released, must never change (values in `conf/` may).
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
    """Name of a run: readable size, then a hash of its science (invariant 4).

    `store_id` is the recipe hash of the activation store; it stands for the whole `activations` group.
    `train.precision` must be resolved: a bf16 run and an fp32 run are different runs.
    """
    assert config.train.precision != "auto", "resolve train.precision before naming a run"
    settings = science(config)
    settings["activations"] = store_id
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    sae = config.sae
    experts = f"-e{sae.n_experts}" if sae.architecture == "switch" else ""
    return f"{sae.architecture}-n{sae.n_latents}-k{sae.k}{experts}-s{config.train.seed}-{digest}"
