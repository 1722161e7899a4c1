"""From cells to runs: names, what is done already, what it costs; the table of `--dry-run`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import budget
from harness.config import ActivationsConfig, Config, run_id
from harness.errors import UserError
from harness.jobs.grid import Cell
from harness.jobs.rundir import run_directory
from harness.jobs.state import state_of
from harness.record.progress import duration

UNRESOLVED = "unresolved"
"""Stands for the content hash of a store that cannot be known here, e.g. without the hub that has the model."""

STEP_OVER_GEMM = 2.0
"""A training step takes about this many times as long as matrix products of the same FLOPs would: selection, sparse
gradients and the optimiser are bound by memory. Rough on purpose."""

TABLE_ROWS = 200

KNOWN_WIDTHS = {"gpt2": 768, "openai-community/gpt2": 768}
"""d_model of models that our studies name, so that their plan can be shown where no hub is reachable."""


@dataclass(frozen=True)
class Store:
    """What launch knows of an activation store before it is opened."""

    id: str
    d_model: int | None
    problem: str = ""
    """Why `id` or `d_model` is unknown."""


@dataclass(frozen=True)
class Run:
    """A cell with its name, its place and its price."""

    label: str
    config: Config
    run_id: str
    run_dir: Path
    status: str
    store: Store

    @property
    def flops(self) -> float | None:
        d_model = self.store.d_model
        if d_model is None:
            return None
        per_token = sum(budget.flops_per_token(self.config.sae, d_model, self.config.train.batch_tokens).values())
        return per_token * tokens_of(self.config, d_model)


def tokens_of(config: Config, d_model: int) -> int:
    """Tokens that the budget buys (with `until=convergence`: at most)."""
    return budget.total_steps(config, d_model) * config.train.batch_tokens


def resolve_precision(config: Config) -> Config:
    """Replace `train.precision=auto` by what this machine computes in: a bf16 and an fp32 run are different runs."""
    if config.train.precision != "auto":
        return config
    import torch

    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    train = dataclasses.replace(config.train, precision="bf16" if on_gpu else "fp32")
    return dataclasses.replace(config, train=train)


def find_stores(configs: Sequence[ActivationsConfig], *, tolerant: bool) -> dict[str, Store]:
    """Content hash and width of every distinct store, by `recipe_key`.

    `tolerant`: a hub that cannot be reached leaves the store unresolved instead of raising `UserError`.
    """
    distinct = {id(config): config for config in configs}  # cells share their sections
    return {key: _find_store(config, tolerant) for key, config in {recipe_key(c): c for c in distinct.values()}.items()}


def recipe_key(config: ActivationsConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def _find_store(config: ActivationsConfig, tolerant: bool) -> Store:
    from harness.activations.identity import store_name

    try:
        return Store(store_name(config), model_width(config))
    except (UserError, OSError) as error:
        if not tolerant or not needs_hub(config):
            raise UserError(str(error)) from error
        return Store(UNRESOLVED, KNOWN_WIDTHS.get(config.model), " ".join(str(error).split()))


def model_width(config: ActivationsConfig) -> int:
    """d_model of a store, from the configuration of its model."""
    if config.kind == "synthetic":
        return config.synthetic.d_model
    from harness.activations.model import locate

    location = locate(config)
    if location.is_local:
        settings = json.loads((Path(location.source) / "config.json").read_text(encoding="utf-8"))
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(settings.get(name), int):
                return settings[name]
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(location.source, revision=location.commit or None).hidden_size


def needs_hub(config: ActivationsConfig) -> bool:
    """Whether the model or the text has to come from the Hugging Face hub (or its local cache)."""
    if config.kind == "synthetic":
        return False
    local_model = config.model.startswith("package:") or Path(config.model).is_dir()
    return not local_model or config.text == "hub"


def make_runs(cells: Sequence[Cell], stores: dict[str, Store]) -> list[Run]:
    """Name every cell and see what is done; cells with the same name are one run. Cheap ones first."""
    runs: dict[Path, Run] = {}
    found: dict[int, tuple[Store, ActivationsConfig]] = {}  # cells share their sections
    for cell in cells:
        section = cell.config.activations
        if id(section) not in found:
            store = stores[recipe_key(section)]
            found[id(section)] = (store, dataclasses.replace(section, store=store.id))
        store, named = found[id(section)]
        config = dataclasses.replace(cell.config, activations=named)
        name = run_id(config, store.id)
        run_dir = run_directory(config, name)
        if run_dir not in runs:
            status = "pending" if store.id == UNRESOLVED else state_of(run_dir).status
            runs[run_dir] = Run(cell.label, config, name, run_dir, status, store)
    return sorted(runs.values(), key=lambda run: (run.flops or 0.0, run.run_id))


def matmul_flops_per_second(precision: str) -> float:
    """Speed of this machine at a product of the shape of a small encoder, measured in a fraction of a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    rows, inner, columns = 1024, 384, 2048
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(inner, columns, dtype=dtype, device=device)
    torch.matmul(left, right)  # the first call sets up the library
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < 0.2 or count < 2:
        torch.matmul(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return 2.0 * rows * inner * columns * count / elapsed


def estimated_seconds(run: Run, gemm_rate: float) -> float | None:
    d_model = run.store.d_model
    if d_model is None:
        return None
    config = run.config
    parts = budget.flops_executed_per_token(config.sae, d_model, config.train.batch_tokens, n_dead=0)
    return STEP_OVER_GEMM * sum(parts.values()) * tokens_of(config, d_model) / gemm_rate


def table(runs: Sequence[Run]) -> str:
    """The plan as text: one row per run, cheap ones first, then the sums."""
    rates = {precision: matmul_flops_per_second(precision) for precision in {j.config.train.precision for j in runs}}
    meshes = any(run.config.mesh.dp * run.config.mesh.shard > 1 for run in runs)
    rows = [("run", "params", "tokens", "FLOPs", "memory", *(["sent/step"] if meshes else []), "time", "state")]
    total_flops = total_seconds = 0.0
    for run in runs:
        d_model, tokens_text, params, memory, sent = run.store.d_model, "?", "?", "?", "?"
        seconds = estimated_seconds(run, rates[run.config.train.precision])
        if d_model is not None:
            tokens_text = si(tokens_of(run.config, d_model))
            params = si(budget.params(run.config.sae, d_model))
            memory = f"{si(sum(budget.memory_bytes(run.config, d_model).values()))}B"
            sent = f"{si(sum(budget.bytes_sent_per_step(run.config, d_model).values()))}B"
        if run.status not in ("done", "diverged"):
            total_flops += run.flops or 0.0
            total_seconds += seconds or 0.0
        flops = "?" if run.flops is None else f"{run.flops:.2e}"
        rows.append(
            (
                run.run_id,
                params,
                tokens_text,
                flops,
                memory,
                *([sent] if meshes else []),
                duration(seconds) if seconds is not None else "?",
                run.status,
            )
        )
    shown = rows[: TABLE_ROWS + 1]
    lines = aligned(shown)
    if len(rows) > len(shown):
        lines.append(f"… and {len(rows) - len(shown)} more")
    counts = Counter(run.status for run in runs)
    lines.append(f"{len(runs)} cells: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if any(run.flops is not None for run in runs):
        lines.append(
            f"to do: {total_flops:.2e} FLOPs, about {duration(total_seconds)} one after the other on this machine "
            "(a rough estimate from a short calibration; harvesting not included)"
        )
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest entry: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def si(value: float) -> str:
    """A count in three digits with a decimal prefix: 3.15M."""
    rounded = float(f"{value:.3g}")
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= factor:
            return f"{rounded / factor:.3g}{unit}"
    return f"{rounded:.3g}"
