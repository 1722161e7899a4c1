"""Results of the metric `examples` that no language model made: as wide as wanted, with tokens as hostile as wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from harness.record.quality import Value, write_quality

LENGTH, WIDTH, EXAMPLES = 40, 33, 50


def write_examples(
    run: Path,
    n: int,
    words: list[str],
    *,
    experts: int = 1,
    seed: int = 0,
    contexts: int = 200,
    density: float = 0.2,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `quality/examples.*` of an SAE with random figures; returns its table per latent."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(len(words), size=(contexts, LENGTH)).astype(np.int32)
    acts = generator.integers(1, 256, size=(n, EXAMPLES, WIDTH)).astype(np.uint8)
    acts[generator.random(acts.shape) > density] = 0
    acts[:, -5:] = 0
    position = generator.integers(LENGTH, size=(n, EXAMPLES))
    place = generator.integers(contexts, size=(n, EXAMPLES)) * LENGTH + position
    peak = position - np.clip(position - WIDTH // 2, 0, LENGTH - WIDTH)
    np.put_along_axis(acts[:, :-5], peak[:, :-5, None], np.sort(generator.integers(1, 256, (n, 45)))[:, ::-1, None], 2)
    largest = generator.lognormal(size=n).astype(np.float64)
    value = np.take_along_axis(acts, peak[:, :, None], 2)[:, :, 0] / 255 * largest[:, None]
    decoder = generator.normal(size=(n, 16))
    count = generator.integers(1, 500, size=n)
    table = {
        "count": count,
        "density": count / 10_000,
        "mean": largest / 100,
        "mean_square": largest / 10,
        "skewness": largest,
        "kurtosis": largest,
        "largest": largest,
        "quantiles": np.sort(generator.random((n, 7)), axis=1) * largest[:, None],
        "histogram": generator.poisson(3, (n, 40)).astype(np.uint32),
        "example_place": place,
        "example_value": value.astype(np.float32),
        "example_acts": acts.reshape(n, -1),
        "top_tokens": generator.integers(len(words), size=(n, 5)).astype(np.int32),
        "nearest": generator.integers(n, size=(n, 10)).astype(np.int32),
        "nearest_cosine": -np.sort(-generator.random((n, 10)).astype(np.float32), axis=1),
        "coactive": generator.integers(n, size=(n, 10)).astype(np.int32),
        "coactive_correlation": -np.sort(-generator.random((n, 10)).astype(np.float32), axis=1),
        "coactive_share": generator.random((n, 10)).astype(np.float32),
        "promoted": generator.integers(len(words), size=(n, 10)).astype(np.int32),
        "promoted_logit": -np.sort(-generator.random((n, 10)).astype(np.float32), axis=1),
        "suppressed": generator.integers(len(words), size=(n, 10)).astype(np.int32),
        "suppressed_logit": np.sort(-generator.random((n, 10)).astype(np.float32), axis=1),
        "expert": (np.arange(n) // (n // experts)).astype(np.int32),
        "training_frequency": count / 10_000,
        "decoder": (decoder / np.linalg.norm(decoder, axis=1, keepdims=True)).astype(np.float16),
    }
    tables = {
        "contexts": {"context": np.arange(contexts), "document": np.arange(contexts) // 2, "ids": ids},
        "tokens": {"token": np.arange(len(words)), "text": words},
    }
    change = {"token": 0, "with": 0.5, "without": 0.25}
    about = {"metric": "examples", "version": 1, "weights": "0" * 64, "tokens": 10_000}
    about["settings"] = settings or {"tokens": 10_000, "store": "made up"}
    ablation = [{"latent": 0, "context": 0, "position": 0, "kl": 0.125, "tokens": [change]}]
    write_quality(run, about, {"live": Value(1.0)}, table, {}, {"ablation": ablation}, tables)
    return table
