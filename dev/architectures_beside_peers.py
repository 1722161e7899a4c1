"""Our trainer beside SAELens' and dictionary_learning's at equal L0: `python -m dev.architectures_beside_peers`.

All see the same rows in the same order, from the same initial weights, with the same batch, warm-up and decay of the
learning rate. The learning rate of each is the best of the same grid (seed 0, both L0); then come further seeds at that
rate. INTEROP_PYTHON is a Python that has sae-lens, DICTIONARY_PYTHON one that has dictionary_learning.

The trainers answer in `OUT/TRAINER.jsonl`, a line per SAE; what stands there is not trained again, so several trainers
can run at the same time. The table needs no trainer: `--trainers ''`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harness.activations.store.read import Store
from harness.bench import peer_trainers
from harness.bench.contender import Process
from harness.config import SaeConfig
from harness.parallel import Solo
from harness.saes import Params, initial_params, make_normalizer, resolve_sae
from harness.saes.start import Start
from harness.terminal import Parser, table

WORKER = Path(peer_trainers.__file__)
PYTHONS = {"saelens": "INTEROP_PYTHON", "dictionary_learning": "DICTIONARY_PYTHON"}
TRAINERS = ("ours", *PYTHONS)
ARCHITECTURES = ("batchtopk", "jumprelu", "gated", "relu", "matryoshka")
BASELINES = ("topk", "multi_topk")
"""Ours alone trains them too, so that `python -m analysis report OUT/runs/ours` shows the order at equal L0."""
WITH_K = (*BASELINES, "batchtopk", "matryoshka")
COEFFICIENTS: dict[tuple[str, str], tuple[float, float]] = {
    ("saelens", "relu"): (1.0, 3.0),
    ("saelens", "gated"): (1.0, 3.0),
    ("dictionary_learning", "relu"): (0.04, 0.12),
    ("dictionary_learning", "gated"): (0.04, 0.12),
}
"""Where theirs have no target: two coefficients to begin the search with, in the units of each."""
BATCH, N_LATENTS, EXTRAPOLATED = 256, 1024, math.log(1.3)
"""`EXTRAPOLATED`: how far, in log L0, a wanted L0 may lie beyond the measured ones."""
CLOSE, TRIES = math.log(1.15), 5
"""A coefficient is good enough when L0 is this close; most coefficients that are tried for one L0."""


@dataclass(frozen=True)
class Asked:
    """One SAE to train: `level` is the L0 to aim at, or a coefficient."""

    architecture: str
    level: float
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.architecture} {self.level:g} {self.lr:g} {self.seed}"


def write_data(store: Path, tokens: int, seeds: list[int], wanted: list[int], path: Path) -> dict[str, Any]:
    """Rows of mean squared norm d, and the initial weights that our trainer draws. Returns what the peers must know."""
    source = Store(store)
    raw = source.statistics(False)
    normalizer = make_normalizer("scale", source.d_model, raw.mean_sq_norm)
    steps = tokens // BATCH
    with source.stream(0, BATCH, torch.device("cpu")) as stream:
        batches = itertools.islice(stream.batches(0), steps)
        train = torch.cat([normalizer(raw_rows, torch.float32) for raw_rows in batches])
    heldout = torch.cat([normalizer(rows, torch.float32) for rows, _ in source.heldout(8192)])
    config = SaeConfig(architecture="topk", n_latents=N_LATENTS, k=16, enc_bias=True)
    unit = normalizer.scale**2
    sae = resolve_sae(config, source.d_model, raw.variance / unit, raw.variance, raw.mean_sq_norm / unit)
    sample = normalizer(source.sample(), torch.float64)
    data = {"train": train, "heldout": heldout, "mean": (raw.mean / normalizer.scale).float()}
    params: Params = {}
    for seed in seeds:
        params = initial_params(sae, sample, seed, Solo(), torch.device("cpu"), torch.float32)
        data |= {f"directions.{seed}": params["W_dec"], "center": params["b_dec"]}
    save_file(data, path)
    thresholds = {}
    for l0 in wanted:
        aimed = replace(sae, target_l0=float(l0))
        thresholds[l0] = Start(aimed, params, sample, params["W_dec"], Solo()).threshold()
    known = {"data": str(path), "d": source.d_model, "n": N_LATENTS, "batch": BATCH, "steps": steps}
    return known | {"first_threshold": thresholds}


def _list(values: Iterable[float]) -> str:
    return ",".join(dict.fromkeys(f"{value:g}" for value in values))


def train_ours(every: list[Asked], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One launch of all, which differ in levels, rates and seeds. With the settings that a user has by default, but for
    size, budget, learning rate, and the clipping that SAELens has: gradients of norm 1 of the squared error."""
    architecture = every[0].architecture
    name = "sae.k" if architecture in WITH_K else "sae.target_l0"
    grid = {name: "level", "train.lr": "lr", "train.seed": "seed"}
    command = [
        sys.executable, "-m", "harness.launch", f"sae={architecture}", f"sae.n_latents={N_LATENTS}", "train=quick",
        *(f"{key}={_list(getattr(asked, field) for asked in every)}" for key, field in grid.items()),
        f"train.tokens={arguments.tokens}", f"train.batch_tokens={BATCH}", "train.eval_points=0",
        f"train.clip_norm={arguments.clip_norm:g}", f"activations.dir={arguments.store.parent}",
        f"train.threads={arguments.threads}", "tracker=none", f"out={arguments.out / 'runs'}", "sweep=ours",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    answers = {}
    for file in (arguments.out / "runs" / "ours").glob(f"{architecture}-*/result.json"):
        result = json.loads(file.read_text())
        config = result["config"]
        level = config["sae"]["k"] or config["sae"]["target_l0"]
        asked = Asked(architecture, level, config["train"]["lr"], config["train"]["seed"])
        if asked in every:
            answers[asked.key] = {"fvu": result["fvu"], "l0": result["l0"]}
    return answers


class Results:
    """What a trainer has answered, on disk."""

    def __init__(self, out: Path, trainer: str) -> None:
        self.trainer, self.path = trainer, out / f"{trainer}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known: dict[str, dict[str, float]] = {line.pop("key"): line for line in map(json.loads, lines)}

    def levels(
        self, architecture: str, wanted: list[int], lrs: list[float], train: Callable[[Asked], None] | None = None
    ) -> list[float]:
        """What to aim at: the wanted L0, or coefficients that reach them with the middle rate and seed 0, found with
        the secant of log L0 in log λ. Without `train` among what is known."""
        first = COEFFICIENTS.get((self.trainer, architecture))
        if first is None:
            return [float(l0) for l0 in wanted]
        tried: dict[float, float] = {}

        def l0_at(coefficient: float) -> bool:
            asked = Asked(architecture, coefficient, lrs[len(lrs) // 2], 0)
            if asked.key not in self.known and train is not None:
                train(asked)
            if asked.key in self.known:
                tried[coefficient] = math.log(max(self.known[asked.key]["l0"], 1e-3))
            return asked.key in self.known

        found = []
        for l0 in wanted if all(l0_at(each) for each in first) else ():
            aim = math.log(l0)
            for _ in range(TRIES):
                near = sorted(tried, key=lambda each: abs(tried[each] - aim))
                if abs(tried[near[0]] - aim) <= CLOSE:
                    break
                slope = (tried[near[0]] - tried[near[1]]) / math.log(near[0] / near[1])
                step = (aim - tried[near[0]]) / min(slope, -0.3)
                if not l0_at(float(f"{near[0] * math.exp(max(-1.5, min(1.5, step))):.3g}")):
                    break
            found.append(min(tried, key=lambda each: abs(tried[each] - aim)))
        return found

    def curve(self, architecture: str, levels: list[float], lr: float, seed: int) -> list[tuple[float, float]]:
        """(log L0, log fvu) of the finished SAEs, by L0."""
        keys = [Asked(architecture, level, lr, seed).key for level in levels]
        points = [self.known[key] for key in keys if key in self.known]
        return sorted((math.log(point["l0"]), math.log(point["fvu"])) for point in points if point["l0"] > 0)

    def at(self, architecture: str, levels: list[float], l0: int, lr: float, seed: int) -> float | None:
        """log fvu at `l0`, on the line through the two nearest; None where there are none near."""
        return at_l0(self.curve(architecture, levels, lr, seed), math.log(l0))

    def best_lr(self, architecture: str, levels: list[float], wanted: list[int], lrs: list[float]) -> float | None:
        """That with the least mean log fvu at the wanted L0 with seed 0; None if none reaches them."""
        means = {}
        for lr in lrs:
            values = [self.at(architecture, levels, l0, lr, 0) for l0 in wanted]
            if all(value is not None for value in values):
                means[lr] = sum(value for value in values if value is not None)
        return min(means, key=lambda lr: means[lr]) if means else None


def at_l0(curve: list[tuple[float, float]], log_l0: float) -> float | None:
    """The curve at this L0, linear between its points and a little beyond them."""
    if len(curve) < 2 or not curve[0][0] - EXTRAPOLATED <= log_l0 <= curve[-1][0] + EXTRAPOLATED:
        return None
    after = next((place for place, point in enumerate(curve) if point[0] >= log_l0 and place > 0), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[after - 1], curve[after]
    return y0 + (y1 - y0) * (log_l0 - x0) / (x1 - x0) if x1 > x0 else y1


def train(
    results: Results, arguments: argparse.Namespace, ask: Callable[[list[Asked]], dict[str, dict[str, float]]]
) -> None:
    """All that is missing: every learning rate with seed 0, then the other seeds with the best one."""

    def all_of(every: list[Asked]) -> None:
        missing = [asked for asked in every if asked.key not in results.known]
        for some in [missing] if results.trainer == "ours" and missing else [[asked] for asked in missing]:
            begin = time.monotonic()
            answers = ask(some)
            results.known |= answers
            with results.path.open("a") as file:
                for key, answer in answers.items():
                    file.write(json.dumps({"key": key, **answer}) + "\n")
                    print(f"{results.trainer}: {key}: fvu {answer['fvu']:.4f} at L0 {answer['l0']:.2f}", flush=True)
            print(f"{time.monotonic() - begin:.0f} s", flush=True)

    baselines = BASELINES if results.trainer == "ours" else ()
    for architecture in (*baselines, *arguments.architectures):
        levels = results.levels(architecture, arguments.l0, arguments.lrs, lambda asked: all_of([asked]))
        all_of([Asked(architecture, level, lr, 0) for lr in arguments.lrs for level in levels])
        best = results.best_lr(architecture, levels, arguments.l0, arguments.lrs)
        if best is not None:
            all_of([Asked(architecture, level, best, seed) for seed in arguments.seeds if seed for level in levels])


def report(arguments: argparse.Namespace) -> None:
    """A row per architecture and L0: fvu of each trainer at that L0 (mean of the seeds ± standard error), its rate."""
    every = [Results(arguments.out, trainer) for trainer in TRAINERS]
    rows = []
    for architecture in arguments.architectures:
        for l0 in arguments.l0:
            cells, figures = [], []
            for results in every:
                levels = results.levels(architecture, arguments.l0, arguments.lrs)
                lr = results.best_lr(architecture, levels, arguments.l0, arguments.lrs)
                logs = [results.at(architecture, levels, l0, lr, seed) for seed in arguments.seeds] if lr else []
                values = [math.exp(value) for value in logs if value is not None]
                if len(values) < 2:
                    cells.append("")
                    figures.append(None)
                    continue
                mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
                cells.append(f"{mean:.4f} ± {error:.4f} ({lr:g})")
                figures.append((mean, error))
            ours, theirs = figures[0], [figure for figure in figures[1:] if figure]
            verdict = ""
            if ours and theirs:
                best = min(theirs)
                verdict = "no worse" if ours[0] <= best[0] + math.hypot(ours[1], best[1]) else "worse"
                verdict += f" ({ours[0] / best[0] - 1:+.1%})"
            rows.append((architecture, str(l0), *cells, verdict))
    print(table(["architecture", "L0", *(f"{trainer} (lr)" for trainer in TRAINERS), "ours"], rows, left=("ours",)))


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--store", type=Path, required=True, help="a complete store of activations")
    add("--out", type=Path, default=Path("runs/beside_peers"))
    add("--tokens", type=float, default=75e3)
    add("--threads", type=int, default=1)
    add("--trainers", default=",".join(TRAINERS))
    add("--architectures", default=",".join(ARCHITECTURES))
    add("--l0", default="16,64")
    add("--lrs", default="1.6e-3,3.2e-3,6.4e-3")
    add("--seeds", default="0,1,2")
    add("--clip-norm", type=float, default=0.003, help="of our trainer")
    add("--own-init", action="store_true", help="the peers begin from their own initial weights instead of ours")
    arguments = parser.parse_args()
    arguments.tokens = int(arguments.tokens)
    arguments.architectures = arguments.architectures.split(",")
    arguments.l0 = [int(value) for value in arguments.l0.split(",")]
    arguments.lrs = [float(value) for value in arguments.lrs.split(",")]
    arguments.seeds = [int(value) for value in arguments.seeds.split(",")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for trainer in filter(None, arguments.trainers.split(",")):
        results = Results(arguments.out, trainer)
        if trainer == "ours":
            train(results, arguments, lambda every: train_ours(every, arguments))
            continue
        common = write_data(
            arguments.store, arguments.tokens, arguments.seeds, arguments.l0, arguments.out / f"{trainer}.safetensors"
        )
        steps = common["steps"]
        common |= {
            "threads": arguments.threads,
            "own_init": arguments.own_init,
            # as ours: 20,000 tokens of warm-up, decay over the last fifth, dead after 50,000 tokens
            "warmup_steps": 20_000 // BATCH,
            "decay_steps": steps // 5,
            "dead_steps": 50_000 // BATCH,
            "sparsity_warmup_steps": steps // 5,
        }
        with Process(trainer, [os.environ[PYTHONS[trainer]], str(WORKER), trainer], common) as worker:

            def ask(
                every: list[Asked], worker: Process = worker, trainer: str = trainer
            ) -> dict[str, dict[str, float]]:
                answers = {}
                for asked in every:
                    aim = "sparsity" if (trainer, asked.architecture) in COEFFICIENTS else "l0"
                    task = {"architecture": asked.architecture, aim: asked.level, "lr": asked.lr, "seed": asked.seed}
                    answers[asked.key] = worker.ask(json.dumps(task))
                return answers

            train(results, arguments, ask)
    report(arguments)


if __name__ == "__main__":
    main()
