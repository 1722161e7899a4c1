"""What `harness.bench.gpu` does on a GPU, most valuable first. Each check records figures as soon as it has them."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from harness.activations.open import open_source
from harness.activations.synthetic import Synthetic
from harness.bench.command import installed_peers
from harness.bench.flashinfer_topk import TopK, flashinfer_top_k
from harness.bench.measure import entry, measure, random_data
from harness.bench.ours import Contender
from harness.bench.shapes import SHAPES, Shape
from harness.config import Config, from_container
from harness.cost.estimate import rank_memory
from harness.ops import Codes, Groups, Ops, choose_ops, reference
from harness.parallel import Shards, Solo
from harness.parallel.mesh import Ranks, mesh
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.training.state import TrainState, make_state

TOY = {name: Shape(name, 16, 128, 4, 64, min(4, shape.experts)) for name, shape in SHAPES.items()}
"""What `--dry` measures under the names of the real shapes."""
ROUNDS, WARM_UP = 7, 2


@dataclass(frozen=True)
class Setting:
    """Where the checks run and where their figures go."""

    device: torch.device
    dry: bool
    """Toy sizes on the CPU, kernels in Triton's interpreter."""
    out: Path
    record: Callable[[str, Any], None]
    """Keeps a figure under `check.name…`, on disk at once."""

    @property
    def ops(self) -> Ops:
        return choose_ops("triton", self.device)

    def shape(self, name: str) -> Shape:
        return TOY[name] if self.dry else SHAPES[name]

    def milliseconds(self, work: Callable[[], object], repeats: int = 10) -> float:
        """Median time of one call, after one that does not count."""
        work()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - begin)
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def free(setting: Setting) -> None:
    """Return what earlier checks held, so that peaks and limits are those of the next one."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device(setting: Setting) -> None:
    """What the machine is, and the two rates that a floor is made of."""
    about: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    size, numbers = (64, 1 << 10) if setting.dry else (8192, 1 << 30)
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        about |= {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        about["multiprocessors"] = properties.multi_processor_count
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
            about[fields] = answer.stdout.strip()
    setting.record("device.about", about)
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    setting.record("device.gemm_flops", 2 * size**3 / setting.milliseconds(lambda: a @ b) * 1e3)
    source, target = torch.empty(2, numbers, device=setting.device)
    moved = 2 * source.numel() * source.element_size()
    setting.record("device.copy_bytes_per_s", moved / setting.milliseconds(lambda: target.copy_(source)) * 1e3)


EXTREMES = [(2_097_152, 512, 8), (2_097_152, 32, 8), (1_048_576, 128, 16), (131_072, 64, 64), (129_024, 32, 64)]
EXTREMES += [(32_768, 32, 512), (1_638, 384, 64), (6_553, 2048, 16), (8_192, 4096, 4), (512, 1, 64)]
"""(pre-activations, k, rows): the shapes of the studies, of AuxK, and the edges of the layout."""


def kernels(setting: Setting) -> None:
    """Every size is launched; then the tests of the kernels, compiled."""
    failed: list[str] = []
    sizes = [(300, 4, 5), (700, 64, 2)] if setting.dry else EXTREMES
    for width, k, tokens in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"selection of {k} among {width} in {dtype}"
            with noted(failed, name):
                rows = awkward_rows(tokens, width, setting.device).to(dtype)
                found, expected = setting.ops.select_preactivations(rows, k), stable_top_k(rows, k)
                same = torch.equal(found.values.nan_to_num(), expected.values.nan_to_num())
                if not same or not torch.equal(found.index, expected.index):
                    failed.append(f"{name}: other latents than a stable sort")
    for d, rows, k, experts in [(16, 96, 4, 1)] if setting.dry else PRODUCTS:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"products at d={d}, n={rows}, k={k}, {experts} experts in {dtype}"
            with noted(failed, name):
                distance = product_distance(setting, d, rows, k, experts, dtype)
                if not distance < (2e-2 if dtype is torch.bfloat16 else 1e-4):
                    failed.append(f"{name}: relative distance to float64 {distance:.1e}")
    setting.record("kernels.sizes", {"launched": 2 * (len(sizes) + 1), "failed": failed})
    if not setting.dry:
        setting.record("kernels.tests", run_tests(setting))


PRODUCTS = [(768, 4096, 32, 1), (2688, 4096, 32, 1), (4096, 8192, 64, 1), (768, 8192, 32, 8), (768, 2048, 384, 1)]
"""(d, latents, k, experts): gathers, cuBLAS on few latents, groups."""


@contextlib.contextmanager
def noted(failed: list[str], name: str) -> Iterator[None]:
    """An exception becomes a line of `failed`: the next size may run."""
    try:
        yield
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")


def awkward_rows(tokens: int, width: int, device: torch.device) -> Tensor:
    """Gaussian rows; the first few have NaN, infinities, zeros of both signs, few distinct numbers, or none above 0."""
    rows = torch.randn(tokens, width, device=device)
    changes = [
        lambda row: row[::7].fill_(torch.nan),
        lambda row: row[1::5].fill_(-torch.nan),
        lambda row: row[::3].fill_(-torch.inf),
        lambda row: row.sign_().mul_(0.0),
        lambda row: row.round_(),
        lambda row: row.clamp_(max=-1.0),
        lambda row: row.fill_(-torch.inf),
    ]
    for row, change in zip(rows[1:], changes, strict=False):
        change(row)
    return rows


def stable_top_k(rows: Tensor, k: int) -> Codes:
    """The k largest by a stable sort: slow, and plainly right. All NaN are equal, and largest."""
    values, index = rows.float().nan_to_num(torch.nan, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True)
    return Codes(values[:, :k], index[:, :k])


def product_distance(setting: Setting, d: int, n: int, k: int, experts: int, dtype: torch.dtype) -> float:
    """Largest relative distance (Frobenius) of residual, dz and gradients to the reference in float64."""
    tokens, ops = 256, setting.ops
    generator = torch.Generator(setting.device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=setting.device)

    offsets = torch.arange(experts + 1, device=setting.device) * tokens // experts
    groups = Groups(offsets, tuple(n * g // experts for g in range(experts + 1)))
    x, weight = draw(tokens, d).to(dtype), (draw(n, d) / d**0.5).to(dtype)
    codes = ops.select(x, weight, None, k, groups)
    codes = Codes(codes.values.relu(), codes.index)
    results = []
    for kernels, width in ((ops, torch.float32), (reference, torch.float64)):
        exact = kernels is reference
        W, y = (weight.double(), x.double()) if exact else (weight, x)
        own = Codes(codes.values.to(width), codes.index)
        residual, dz, _ = kernels.reconstruct(own, W, y, None, groups)
        empty = functools.partial(torch.full, fill_value=torch.nan, device=setting.device, dtype=width)
        grads = empty((n, d)), empty((n, d)), empty((n,))
        kernels.weight_grads(own, dz, y, residual, groups, grads)
        results.append([residual, dz, *grads])
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def run_tests(setting: Setting) -> dict[str, Any] | str:
    """The tests marked `gpu`, in processes of their own, side by side where pytest-xdist is installed."""
    if not Path("tests/ops").is_dir():
        return "not run: this is no checkout with tests"
    workers = ["-n", "12", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *workers]
    done = subprocess.run([*command, "tests/ops", "tests/training/test_syncs.py"], capture_output=True, text=True)
    (setting.out / "tests.txt").write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "failed": failed}


def measured(setting: Setting, shape: Shape, dead: float = 0.05) -> dict[str, Any]:
    """One shape, our step only: the fields of `harness.bench`."""
    free(setting)
    settings = {"precision": "fp32" if setting.dry else "bf16", "ops": "triton", "device": setting.device.type}
    settings |= {"threads": 0, "clock": "wall", "dead": dead}
    task = settings | {"d": shape.d, "n": shape.n, "k": shape.k, "experts": shape.experts}
    contender = Contender(task, random_data(shape, setting.device))
    samples: dict[str, list[float]] = {}
    warm_up, rounds = (0, 1) if setting.dry else (WARM_UP, ROUNDS)
    for number in range(warm_up + rounds):
        for key, value in contender.round().items() if number >= warm_up else discard(contender.round()):
            samples.setdefault(key, []).append(value)
    peak = 0 if setting.dry else torch.cuda.max_memory_allocated()
    return entry(shape, settings, samples, {"peak_mem_bytes": peak, "ops": contender.ops.NAME}, {}, {})


def discard(_: object) -> list[tuple[str, float]]:
    return []


def shapes(setting: Setting) -> None:
    """Steps by part, at the shapes of the goals."""
    steps: dict[str, float] = {}
    for name in ("S1", "S3-E8", "S3-E32", "S2", "S1-131072", "S3-131072-E32"):
        result = measured(setting, setting.shape(name))
        setting.record(f"shapes.{name}", result)
        steps[name] = min(result["step_ms"], result.get("graph_ms", result["step_ms"]))
    for topk, switch in (("S1", "S3-E8"), ("S1", "S3-E32"), ("S1-131072", "S3-131072-E32")):
        setting.record(f"shapes.topk_over_switch.{switch}", steps[topk] / steps[switch])


def selection(setting: Setting) -> None:
    """Selection alone against torch.topk and FlashInfer, on Gaussian rows and on rows after ReLU."""
    flashinfer = flashinfer_top_k() if setting.device.type == "cuda" else "needs a GPU"
    if isinstance(flashinfer, str):
        setting.record("selection.flashinfer", f"not compared: {flashinfer}")
    for name, (tokens, width, k) in {
        "S1": (8192, 32_768, 32),
        "S2": (16_384, 131_072, 64),
        "S7": (4096, 129_024, 32),
        "gao2024": (512, 2_097_152, 512),
    }.items():
        if setting.dry:
            tokens, width, k = 8, 256, 4
        free(setting)
        rows = torch.randn(tokens, width, device=setting.device, dtype=torch.bfloat16)
        for kind in ("gaussian", "relu"):
            rows = rows if kind == "gaussian" else rows.relu_()
            setting.record(f"selection.{name}.{kind}", selection_figures(setting, rows, k, flashinfer))


def selection_figures(setting: Setting, rows: Tensor, k: int, flashinfer: TopK | str) -> dict[str, float]:
    """Times of our selection and of others, and how much faster ours is."""
    ours = setting.milliseconds(lambda: setting.ops.select_preactivations(rows, k))
    figures = {"ms": ours, "bytes_per_s": 1e3 * rows.numel() * rows.element_size() / ours}
    others: dict[str, Callable[[], object]] = {"torch_topk": lambda: torch.topk(rows, k, dim=1, sorted=False)}
    if not isinstance(flashinfer, str):
        others["flashinfer"] = lambda: flashinfer(rows, k)
    for name, work in others.items():
        figures[f"{name}_ms"] = setting.milliseconds(work, 3)
        figures[f"over_{name}"] = figures[f"{name}_ms"] / ours
    return figures


def small_config(setting: Setting, **changes: Any) -> Config:
    """A TopK cell on synthetic activations at S1, or a toy."""
    shape = setting.shape("S1")
    container: dict[str, Any] = {
        "sae": {"architecture": "topk", "n_latents": shape.n, "k": shape.k, "aux_alpha": 0.0},
        "activations": {
            "kind": "synthetic",
            "heldout_tokens": 1000,
            "synthetic": {"d_model": shape.d, "n_features": 4 * shape.d, "active_features": 8.0},
        },
        "train": {
            "tokens": 1000 * shape.batch,
            "batch_tokens": shape.batch,
            "precision": "fp32" if setting.dry else "bf16",
            **changes,
        },
        "tracker": {"name": "none"},
    }
    return from_container(container)


def prepared(
    setting: Setting, config: Config, source: Synthetic, shards: Shards | None = None
) -> tuple[TrainState, Runtime]:
    runtime = Runtime(setting.device, shards or Solo(), setting.ops, StopFlag())
    return make_state(config, source, runtime), runtime


def loop(setting: Setting) -> None:
    """The training step itself: CUDA graph against eager, waits for the device, memory against the plan, NCCL."""
    config = small_config(setting)
    source = open_source(config.activations, setting.out, progress=False, stop=StopFlag())
    assert isinstance(source, Synthetic)
    batch_tokens, steps = config.train.batch_tokens, 3 if setting.dry else 12
    with source.stream(0, batch_tokens, setting.device) as stream:
        batches = [batch for _, batch in zip(range(4), stream.batches(0), strict=False)]

        def train(config: Config, shards: Shards | None = None) -> tuple[TrainState, float, int]:
            """A state after `steps` steps, milliseconds of a step, and the peak of the bytes that it added."""
            free(setting)
            held = 0 if setting.dry else torch.cuda.memory_allocated()
            state, runtime = prepared(setting, config, source, shards)
            for number in range(steps):
                state.train_step(batches[number % len(batches)], runtime)
            peak = 0 if setting.dry else torch.cuda.max_memory_allocated() - held
            tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
            ms = setting.milliseconds(lambda: state.train_step(batches[0], runtime), 30)
            for name, tensor in state.tensors().items():
                tensor.copy_(tensors[name])
            return state, ms, peak

        eager, eager_ms, peak = train(config)
        if not setting.dry:
            setting.record("loop.memory", memory(config, eager, peak))
            other, runtime = prepared(setting, config, source)
            setting.record("loop.waits_per_step", waits(other, batches[0], runtime))
            del other
        setting.record("loop.eager_ms", eager_ms)
        graph, graph_ms, _ = train(small_config(setting, cuda_graph=True))
        setting.record("loop.graph_ms", graph_ms)
        setting.record("loop.graph_equals_eager", same_bits(eager, graph))
        del graph
        if not setting.dry:
            ranks = Ranks(0, 1, 0, ("127.0.0.1", 29_517))
            with mesh(1, 1, setting.device, ranks, even_alone=True) as shards:
                nccl, nccl_ms, _ = train(config, shards)
                setting.record("loop.nccl_ms", nccl_ms)
                setting.record("loop.nccl_equals_one_process", same_bits(eager, nccl))


def same_bits(one: TrainState, other: TrainState) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def memory(config: Config, state: TrainState, peak: int) -> dict[str, float]:
    """Planned and measured peak of the device, bytes."""
    planned = sum(rank_memory(config, state.sae.d_model).values())
    return {"planned_bytes": planned, "measured_bytes": peak, "planned_over_measured": planned / peak}


def waits(state: TrainState, batch: Tensor, runtime: Runtime) -> float:
    """Times that the host waits for the device in a step."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                state.train_step(batch, runtime)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught) / 4


def shard(setting: Setting) -> None:
    """One of eight ranks of an SAE with 1,032,192 latents at d = 2688."""
    setting.record("shard.S7", measured(setting, setting.shape("S7")))


def peers(setting: Setting) -> None:
    """Other people's training steps at S1, those that can be imported."""
    free(setting)
    names = ["openai", "sparsify", "dictionary_learning", "bionemo_like", "flashsae_like"]
    found = {} if setting.dry else installed_peers(Path(sys.executable), names)
    setting.record("peers.compared", sorted(found))
    settings = {"precision": "bf16", "ops": "triton", "device": "cuda", "threads": 0, "clock": "wall", "dead": 0.0}
    if "bionemo_like" in found:
        moe = measure(setting.shape("S3-E8"), {"bionemo_like": found["bionemo_like"]}, settings, 5)
        setting.record("peers.bionemo_like_moe", moe["peers"])
    for name, command in found.items():
        setting.record(f"peers.{name}", measure(setting.shape("S1"), {name: command}, settings, 5)["peers"])


def sweep(setting: Setting) -> None:
    """Two runs from the command line, killed with SIGKILL in the middle of the first, then resumed to their end."""
    settings = {
        "sae": "topk,switch",
        "sae.n_latents": 256 if setting.dry else 4096,
        "sae.k": 8,
        "activations": "synthetic",
        "activations.heldout_tokens": 4000,
        "train.tokens": 40_000 if setting.dry else 500_000,
        "train.device": setting.device.type,
        "train.log_every_steps": 2,
        "train.checkpoint_every_steps": 4,
        "tracker": "none",
        "sweep": "gpu-check",
        "out": setting.out,
    }
    command = [sys.executable, "-m", "harness.launch", *(f"{name}={value}" for name, value in settings.items())]
    with (setting.out / "sweep.txt").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while first.poll() is None and not lines_logged(setting.out / "gpu-check") > 3:
            time.sleep(0.05)
        killed = first.poll() is None
        if killed:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        begin = time.monotonic()
        second = subprocess.run(command, stdout=log, stderr=log)
    done = [path.parent.name for path in setting.out.glob("gpu-check/*/result.json")]
    seconds = time.monotonic() - begin
    result = {"killed_on_the_way": killed, "exit_code": second.returncode, "resumed_s": seconds, "results": len(done)}
    setting.record("sweep", result)


def lines_logged(sweep: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in sweep.glob("*/metrics.jsonl"))
