"""Generated run directories: the files of the contract, filled from a known law with noise. No real training.

`python -m tests.analysis.generate DIR` writes one for looking at; the tests call `write_sweep`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

GPT4 = {"alpha": -0.50, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.32, "eta": -0.085}
"""Coefficients printed by Gao et al. 2024 for GPT-4 activations."""

MINILM_LIKE = {"alpha": 0.02, "beta_k": -0.05, "beta_n": -0.2, "gamma": -0.035, "zeta": -2.6, "eta": -0.3}
"""Coefficients that give losses like those of the small probes (fvu 0.1–0.3 at n = 256 … 4096)."""

D_MODEL = 384


def sae_nk(n, k, coefficients=GPT4):
    """Loss of the law `sae_nk` at arrays n, k."""
    c = coefficients
    log_n, log_k = np.log(n), np.log(k)
    power = np.exp(c["alpha"] + c["beta_k"] * log_k + c["beta_n"] * log_n + c["gamma"] * log_k * log_n)
    return power + np.exp(c["zeta"] + c["eta"] * log_k)


def grid_frame(n, k, noise, seed=0, coefficients=GPT4, seeds=1, noise_slope=0.0) -> pd.DataFrame:
    """A full grid with multiplicative noise; its standard deviation varies as (n / gmean n)^noise_slope."""
    rng = np.random.default_rng(seed)
    rows = pd.MultiIndex.from_product([n, k, range(seeds)], names=["n_latents", "k", "seed"]).to_frame(index=False)
    x = rows["n_latents"].to_numpy(dtype=float)
    sd = noise * (x / np.exp(np.log(x).mean())) ** noise_slope
    rows["fvu"] = sae_nk(x, rows["k"].to_numpy(dtype=float), coefficients) * np.exp(sd * rng.standard_normal(len(rows)))
    return rows


def write_run(
    directory: Path,
    *,
    sae: str,
    n: int,
    k: int,
    experts: int = 1,
    seed: int = 0,
    fvu: float = 0.2,
    tokens: int = 400_000,
    status: str = "done",
    converged: bool = False,
    decay_fraction: float = 0.0,
    dead: float | None = 0.02,
    extra: dict | None = None,
) -> Path:
    """One run directory of the contract; returns its path."""
    run_id = f"{sae}-n{n}-k{k}{f'-e{experts}' if experts > 1 else ''}-s{seed}-generated"
    run = directory / run_id
    run.mkdir(parents=True)
    per_token = 6 * D_MODEL * n / experts + 8 * D_MODEL * k + (2 * D_MODEL * experts if experts > 1 else 0)
    config = {
        "sae": {"architecture": sae, "n_latents": n, "k": k, "n_experts": experts, "normalize": "scale"},
        "activations": {"kind": "lm", "model": "package:generated", "hook": "resid_post", "layer": 4},
        "train": {"tokens": tokens, "seed": seed, "decay_fraction": decay_fraction, "batch_tokens": 512},
        "stream": {"seed": 0},
    }
    lines = []
    for i in range(12):
        seen = int(tokens * 2.0 ** (i - 11))
        value = fvu * (1 + 0.45 * ((tokens / seen) ** 0.35 - 1))
        common = {"step": seen // 512, "tokens": seen, "flops": seen * per_token, "wall_s": seen / 2e4}
        lines.append({**common, "loss": value * 1.02, "fvu_train": value * 1.01, "l0": float(k), "lr": 1e-3})
        lines.append({**common, "fvu": value, "fvu_se": value * 0.004, "mse": value * D_MODEL, "l0": float(k)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = status == "done"
    result = {
        "status": status,
        "run_id": run_id,
        "sae": sae,
        "n_latents": n,
        "k": k,
        "n_experts": experts,
        "d_model": D_MODEL,
        "seed": seed,
        "tokens": tokens if done else tokens // 3,
        "unique_tokens": tokens if done else tokens // 3,
        "steps": tokens // 512,
        "flops": tokens * per_token,
        "flops_executed": tokens * per_token * 1.1,
        "harvest_flops": 1.4e13,
        "params": 2 * n * D_MODEL + n + D_MODEL,
        "fvu": fvu if done else None,
        "fvu_se": 0.004 * fvu if done else None,
        "mse": fvu * D_MODEL if done else None,
        "l0": float(k),
        "dead_frac": dead,
        "wall_s": tokens / 2e4,
        "tokens_per_s": 2e4,
        "converged": converged,
        "store_id": "0123456789ab",
        "diverged_at_step": 200 if status == "diverged" else None,
        "error": "OSError: no space left on device" if status == "failed" else None,
        "pca_fvu": {str(j): round(0.62 * j**-0.16, 4) for j in (8, 16, 32)},
        "config": config,
    }
    (run / "result.json").write_text(json.dumps(result | (extra or {}), indent=1), encoding="utf-8")
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    provenance = {
        "git": {"sha": "0" * 40, "dirty": False},
        "packages": {"torch": "2.13.0", "numpy": np.__version__},
        "machine": {"processor": "generated", "cores": 2},
        "threads": 2,
        "command": "python -m harness.launch --study quick",
        "ops": "reference",
        "store_id": "0123456789ab",
    }
    (run / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    return run


def write_sweep(
    directory: Path,
    widths=(256, 512, 1024, 2048, 4096),
    ks=(8, 16, 32),
    experts: int = 8,
    noise: float = 0.004,
    seed: int = 0,
    repeats: int = 3,
    broken: bool = True,
    study: bool = True,
) -> Path:
    """A sweep in the shape of the quick study: TopK over widths × k, Switch where n/E ≥ 4k, some repeated seeds."""
    rng = np.random.default_rng(seed)

    def loss(n: int, k: int, factor: float = 1.0) -> float:
        return float(factor * sae_nk(n, k, MINILM_LIKE) * math.exp(noise * rng.standard_normal()))

    cells = [(n, k) for n in widths for k in ks]
    for i, (n, k) in enumerate(cells):
        dead = float(np.round(0.01 + 0.02 * rng.random() + 0.03 * math.log2(n / widths[0]) / 4, 4))
        write_run(directory, sae="topk", n=n, k=k, fvu=loss(n, k), dead=dead)
        if i % max(1, len(cells) // max(repeats, 1)) == 0 and i // max(1, len(cells) // max(repeats, 1)) < repeats:
            write_run(directory, sae="topk", n=n, k=k, seed=1, fvu=loss(n, k), dead=dead)
        if experts > 1 and n // experts >= 4 * k:
            write_run(directory, sae="switch", n=n, k=k, experts=experts, fvu=loss(n, k, 1.22), dead=dead * 1.5)
    if broken:
        write_run(directory, sae="topk", n=widths[-1], k=ks[-1], seed=7, status="diverged")
        write_run(directory, sae="topk", n=widths[0], k=ks[0], seed=8, status="failed")
        unfinished = write_run(directory, sae="topk", n=widths[-1], k=ks[0], seed=9)
        (unfinished / "result.json").unlink()
    if study:
        content = {
            "name": "quick",
            "question": "How does held-out fvu fall with the number of latents n and the active latents k?",
            "title": "Quick study — fixed tokens, not converged",
            "law": "sae_nk",
        }
        (directory / "study.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


if __name__ == "__main__":
    print(write_sweep(Path(sys.argv[1])))
