"""The metrics by name: the only list of them."""

from __future__ import annotations

from harness.quality import (
    ablation,
    detection,
    dimension,
    downstream,
    examples,
    explanations,
    geometry,
    knowledge,
    mdl,
    probes,
    progressive,
    refinement,
)
from harness.quality.metric import Metric

_ALL = (
    Metric("downstream", downstream.VERSION, "losses of the language model with x replaced", downstream.run),
    Metric("probes", probes.VERSION, "what a single latent knows of a token or a text", probes.run, probes.settings),
    Metric("explanations", explanations.VERSION, "precision and recall of token patterns", explanations.run),
    Metric(
        "detection", detection.VERSION, "whether a judge finds a latent by its words", detection.run, detection.settings
    ),
    Metric("ablation", ablation.VERSION, "how many logits a latent touches", ablation.run),
    Metric("knowledge", knowledge.VERSION, "whether latents hold facts apart", knowledge.run, knowledge.settings),
    Metric("geometry", geometry.VERSION, "duplicates, nearest neighbours and experts", geometry.run),
    Metric("refinement", refinement.VERSION, "shrinkage of activations", refinement.run),
    Metric("progressive", progressive.VERSION, "codes of other sizes, fixed thresholds", progressive.run),
    Metric("examples", examples.VERSION, "what every latent does, for the gallery", examples.run),
    Metric("mdl", mdl.VERSION, "bits per token of the codes", mdl.run),
    Metric("dimension", dimension.VERSION, "dimension of the activations themselves", dimension.run),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
