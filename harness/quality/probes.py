"""Whether a single latent knows a property of a token: 1-d logistic probes on pre-activations, after Gao et al. §4.2.

Properties are exact labels by rule (`token_labels`). For each, the latent is chosen on training documents and its
cross-entropy, in nats, is measured on others: a minimum over n latents on the same data would fall with n by itself.
Lower is better. Beside it always: the constant, the best channel, the best of n random directions, a probe on all d
channels, and shuffled labels. A Switch SAE has pre-activations in the token's own expert; elsewhere they count as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from harness.quality.clusters import mean
from harness.quality.labels import token_labels
from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.router import router_probabilities
from harness.saes.trained import TrainedSae

VERSION = 1
SCREENED = 64
"""Latents with the largest |t| that are fitted for each label."""
RIDGE = 1e-3
STEPS = 50
_CHUNK = 1024
"""Latents whose pre-activations are held at once."""
_LEAST = 20
"""Fewest tokens of either class in both halves; labels with fewer are left out."""


class Probe(NamedTuple):
    weight: Float64[Tensor, " probes"]
    bias: Float64[Tensor, " probes"]


def fit(z: Float[Tensor, "tokens probes"], y: Bool[Tensor, " tokens"], ridge: float = RIDGE) -> Probe:
    """One logistic regression per column, by damped Newton with the whole 2 × 2 Hessian.

    Columns are standardised, and the ridge is on the standardised weight. Steps are cut to ±3. Converged columns leave
    the iteration.
    """
    z = z.double()
    centre, scale = z.mean(dim=0), z.std(dim=0).clamp_min(1e-12)
    x, target = (z - centre) / scale, y.double()[:, None]
    w, b = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    left = torch.arange(x.shape[1])
    for _ in range(STEPS):
        part = x[:, left]
        p = torch.sigmoid(part * w[left] + b[left])
        s = p * (1 - p)
        error = p - target
        gradient_w, gradient_b = (part * error).mean(dim=0) + ridge * w[left], error.mean(dim=0)
        ww, wb, bb = (part.square() * s).mean(dim=0) + ridge, (part * s).mean(dim=0), s.mean(dim=0).clamp_min(1e-12)
        determinant = (ww * bb - wb * wb).clamp_min(1e-12)
        step_w = ((bb * gradient_w - wb * gradient_b) / determinant).clamp(-3, 3)
        step_b = ((ww * gradient_b - wb * gradient_w) / determinant).clamp(-3, 3)
        w[left] -= step_w
        b[left] -= step_b
        left = left[(gradient_w.abs() > 1e-7) | (gradient_b.abs() > 1e-7)]
        if not len(left):
            break
    return Probe(w / scale, b - w * centre / scale)


def cross_entropy(probe: Probe, z: Float[Tensor, "tokens probes"], y: Bool[Tensor, " tokens"]) -> Tensor:
    """Mean over tokens of −log p(label), nats, per probe."""
    logits = z.double() * probe.weight + probe.bias
    return torch.nn.functional.softplus(torch.where(y[:, None], -logits, logits)).mean(dim=0)


def fit_all(
    x: Float[Tensor, "tokens d"], y: Bool[Tensor, " tokens"], ridge: float = 1e-2
) -> Callable[[Tensor], Tensor]:
    """A logistic probe on all channels, by Newton; returns rows → logits."""
    x = x.double()
    centre, scale = x.mean(dim=0), x.std(dim=0).clamp_min(1e-12)

    def prepared(rows: Tensor) -> Tensor:
        return torch.cat([(rows.double() - centre) / scale, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)

    inputs, target = prepared(x), y.double()
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64)
    penalty = torch.full_like(weight, ridge)
    penalty[-1] = 1e-6
    for _ in range(8):
        p = torch.sigmoid(inputs @ weight)
        gradient = inputs.T @ (p - target) / len(inputs) + penalty * weight
        s = (p * (1 - p)).clamp_min(1e-6)
        hessian = (inputs * s[:, None]).T @ inputs / len(inputs) + penalty.diag()
        weight -= torch.linalg.solve(hessian, gradient)
    return lambda rows: prepared(rows) @ weight


class Halves(NamedTuple):
    """Rows of training documents, and of the others."""

    x: Float[Tensor, "tokens d"]
    train: Bool[Tensor, " tokens"]
    labels: dict[str, Bool[Tensor, " tokens"]]
    document: Int[Tensor, " tokens"]


Project = Callable[[Float[Tensor, "tokens d"], slice], Float[Tensor, "tokens latents"]]
"""Rows and a range of latents → their pre-activations."""


def best_of(project: Project, n: int, halves: Halves) -> dict[str, tuple[int, float]]:
    """Label → the latent with the smallest training cross-entropy, and its cross-entropy on the other half."""
    train, test = halves.train, ~halves.train
    strength = {name: torch.zeros(n, dtype=torch.float64) for name in halves.labels}
    for start in range(0, n, _CHUNK):
        span = slice(start, min(start + _CHUNK, n))
        z = project(halves.x[train], span).double()
        moments = z.std(dim=0).clamp_min(1e-12)
        for name, y in halves.labels.items():
            own = y[train]
            count = own.sum()
            gap = (z[own].mean(dim=0) - z[~own].mean(dim=0)) / moments
            strength[name][span] = gap.abs() * (count * (len(own) - count) / len(own)).sqrt()
    found = {}
    for name, y in halves.labels.items():
        chosen = strength[name].topk(min(SCREENED, n)).indices
        z = torch.cat([project(halves.x, slice(i, i + 1)) for i in chosen.tolist()], dim=1)
        probe = fit(z[train], y[train])
        winner = int(cross_entropy(probe, z[train], y[train]).argmin())
        held_out = cross_entropy(probe, z[test], y[test])[winner]
        found[name] = (int(chosen[winner]), float(held_out))
    return found


def preactivations(sae: TrainedSae) -> Project:
    """W_enc·(x − b_dec) + b_enc in normalised units; with a router, 0 outside the token's own expert."""
    bias = sae.b_dec if sae.sae.traits.pre_bias else torch.zeros_like(sae.b_dec)

    def project(rows: Tensor, span: slice) -> Tensor:
        x = sae.normalizer(rows.to(sae.device), sae.dtype)
        z = (x - bias) @ sae.W_enc[span].T + sae.b_enc[span]
        if sae.sae.routed:
            expert = router_probabilities(sae.params, x).argmax(dim=1)
            owner = torch.arange(span.start, span.stop, device=x.device) // sae.sae.latents_per_expert
            z = z.where(expert[:, None] == owner[None], 0.0)
        return z.cpu()

    return project


def halves_of(shared: Shared) -> Halves:
    """Kept tokens of the text; documents alternate between the halves."""
    text = shared.text
    x = text.hidden[text.kept]
    document = text.document[:, None].expand(text.kept.shape)[text.kept]
    train = document % 2 == 0
    labels = {}
    for name, y in token_labels(text.ids, shared.tokenizer).items():
        own = y[text.kept]
        counts = [int((own[half] == value).sum()) for half in (train, ~train) for value in (True, False)]
        if min(counts) >= _LEAST:
            labels[name] = own
    return Halves(x, train, labels, document)


def controls(halves: Halves, n: int) -> dict[str, dict[str, float]]:
    """Control → label → cross-entropy on held-out documents. They do not depend on the SAE but for n."""
    d = halves.x.shape[1]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(n, d, generator=generator)
    train, test = halves.train, ~halves.train
    found: dict[str, dict[str, float]] = {"constant": {}, "full": {}}
    for name, y in halves.labels.items():
        share = float(y[train].double().mean())
        p = torch.tensor([1 - share, share], dtype=torch.float64).log()
        found["constant"][name] = float(-p[y[test].long()].mean())
        logits = fit_all(halves.x[train], y[train])(halves.x[test])
        found["full"][name] = float(torch.nn.functional.softplus(torch.where(y[test], -logits, logits)).mean())
    best = {"channel": best_of(lambda x, span: x[:, span], d, halves)}
    best["random"] = best_of(lambda x, span: x @ random[span].T, n, halves)
    return found | {name: {label: ce for label, (_, ce) in part.items()} for name, part in best.items()}


def judge(sae: TrainedSae, halves: Halves, beside: dict[str, dict[str, float]]) -> Outcome:
    """Figures of one SAE. The standard errors are over labels."""
    project, n = preactivations(sae), sae.sae.n_latents
    own = best_of(project, n, halves)
    generator = torch.Generator().manual_seed(1)
    shuffled = {name: y[torch.randperm(len(y), generator=generator)] for name, y in halves.labels.items()}
    null = best_of(project, n, halves._replace(labels=shuffled))
    names = list(halves.labels)

    def over(table: dict[str, float]) -> Value:
        return mean(torch.tensor([table[name] for name in names], dtype=torch.float64))

    values = {"loss": over({name: ce for name, (_, ce) in own.items()})}
    values |= {f"loss_{name}": over(table) for name, table in beside.items()}
    values["loss_shuffled"] = over({name: ce for name, (_, ce) in null.items()})
    gain = {name: beside["constant"][name] - own[name][1] for name in names}
    most = {name: max(beside["constant"][name] - beside["full"][name], 1e-9) for name in names}
    values["gain_share"] = Value(sum(gain.values()) / sum(most.values()))
    values["labels"] = Value(float(len(names)))
    table = [{"label": name, "latent": own[name][0], "loss": own[name][1]} for name in names]
    for row in table:
        row |= {control: beside[control][str(row["label"])] for control in beside}
    return Outcome(len(halves.x), values, curves={"labels": table})


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    halves = halves_of(shared)
    beside: dict[int, dict[str, dict[str, float]]] = {}
    shared.progress.start("probes", len(subjects))
    for number, subject in enumerate(subjects, 1):
        sae = subject.load()
        n = sae.sae.n_latents
        if n not in beside:
            beside[n] = controls(halves, n)
        yield subject, judge(sae, halves, beside[n])
        shared.tick(number)
