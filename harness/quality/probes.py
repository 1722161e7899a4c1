"""Whether a single latent knows a property: 1-d logistic probes on pre-activations, after Gao et al. §4.2.

Tasks are exact labels of tokens by rule (`labels`) and labelled texts of `sae-probes`, read at the last token
(`probe_sets`). For each, the latent is chosen on training documents and its cross-entropy, in nats, is measured on
others: a minimum over n latents on the same data would fall with n by itself. Lower is better. Beside it always: the
constant, the best channel, the best of n random directions, a probe on all d channels, and shuffled labels. A Switch
SAE has pre-activations in the token's own expert; elsewhere they count as 0. Sparse probes of texts: `sparse_probes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.quality.clusters import mean
from harness.quality.labels import token_labels
from harness.quality.logistic import cross_entropy, fit, fit_all, loss_of
from harness.quality.metric import Outcome, Subject
from harness.quality.probe_sets import SetRows, installed, set_rows
from harness.quality.shared import Shared
from harness.quality.sparse_probes import accuracies, channel_accuracies
from harness.record.quality import Value
from harness.saes.router import chosen_expert
from harness.saes.trained import TrainedSae

VERSION = 2
SCREENED = 64
"""Latents with the largest |t| that are fitted for each task."""
_CHUNK = 1024
"""Latents whose pre-activations are held at once."""
_LEAST = 20
"""Fewest rows of either class in both halves; tasks with fewer are left out."""


class Tasks(NamedTuple):
    """Rows with one or more labels, in two halves."""

    x: Float[Tensor, "rows d"]
    train: Bool[Tensor, " rows"]
    labels: dict[str, Bool[Tensor, " rows"]]


Project = Callable[[Float[Tensor, "rows d"], Int[Tensor, " latents"]], Float[Tensor, "rows latents"]]
"""Rows and latents → their pre-activations."""
Losses = dict[str, float]
"""Task → cross-entropy on the other half."""


def best_of(project: Project, n: int, tasks: Tasks) -> dict[str, tuple[int, float]]:
    """Task → the latent with the smallest training cross-entropy, and its cross-entropy on the other half."""
    train, test = tasks.train, ~tasks.train
    own = torch.stack([y[train] for y in tasks.labels.values()]).double()
    counts, total = own.sum(dim=1, keepdim=True), own.shape[1]
    strengths = []
    for chunk in torch.arange(n).split(_CHUNK):
        z = project(tasks.x[train], chunk).double()
        of_class = own @ z
        gap = of_class / counts - (z.sum(dim=0) - of_class) / (total - counts)
        strengths.append(gap.abs() / z.std(dim=0).clamp_min(1e-12))
    strength = torch.cat(strengths, dim=1)
    found = {}
    for place, (name, y) in enumerate(tasks.labels.items()):
        chosen = strength[place].topk(min(SCREENED, n)).indices
        z = project(tasks.x, chosen)
        probe = fit(z[train], y[train])
        winner = int(cross_entropy(probe, z[train], y[train]).argmin())
        held_out = cross_entropy(probe, z[test], y[test])[winner]
        found[name] = (int(chosen[winner]), float(held_out))
    return found


def best_losses(project: Project, n: int, parts: Sequence[Tasks]) -> Losses:
    return {name: ce for tasks in parts for name, (_, ce) in best_of(project, n, tasks).items()}


def preactivations(sae: TrainedSae) -> Project:
    """W_enc·(x − b_dec) + b_enc in normalised units; with a router, 0 outside the token's own expert."""
    bias = sae.b_dec if sae.sae.traits.pre_bias else torch.zeros_like(sae.b_dec)

    def project(rows: Tensor, latents: Tensor) -> Tensor:
        x = sae.normalizer(rows.to(sae.device), sae.dtype)
        latents = latents.to(x.device)
        z = (x - bias) @ sae.W_enc[latents].T + sae.b_enc[latents]
        if sae.sae.routed:
            expert, _ = chosen_expert(sae.sae, sae.params, x)
            z = z.where(expert[:, None] == (latents // sae.sae.latents_per_expert)[None], 0.0)
        return z.cpu()

    return project


def tasks_of(shared: Shared, sets: Mapping[str, SetRows]) -> list[Tasks]:
    """Those of the kept tokens of the text, whose documents alternate between the halves, and one per set."""
    text = shared.text
    document = text.document[:, None].expand(text.kept.shape)[text.kept]
    labels = {name: y[text.kept] for name, y in token_labels(text.ids, shared.tokenizer).items()}
    parts = [Tasks(text.hidden[text.kept], document % 2 == 0, labels)]
    parts += [Tasks(rows.last, rows.train, {name: rows.label}) for name, rows in sets.items()]
    kept = [
        part._replace(labels={name: y for name, y in part.labels.items() if _both(part.train, y)}) for part in parts
    ]
    return [part for part in kept if part.labels]


def _both(train: Tensor, y: Tensor) -> bool:
    """Whether both halves have enough rows of both classes."""
    return min(int((y[half] == value).sum()) for half in (train, ~train) for value in (True, False)) >= _LEAST


def random_losses(parts: Sequence[Tasks], n: int) -> Losses:
    """The best of n random directions."""
    directions = torch.randn(n, parts[0].x.shape[1], generator=torch.Generator().manual_seed(0))
    return best_losses(lambda x, latents: x @ directions[latents].T, n, parts)


def controls(parts: Sequence[Tasks]) -> dict[str, Losses]:
    """What no SAE is needed for: the constant, the best channel, and a probe on all channels."""
    found: dict[str, Losses] = {"constant": {}, "full": {}}
    for x, train, labels in parts:
        for name, y in labels.items():
            share = y[train].double().mean().clamp(1e-6, 1 - 1e-6)
            found["constant"][name] = loss_of(torch.logit(share).expand(int((~train).sum())), y[~train])
            found["full"][name] = loss_of(fit_all(x[train], y[train])(x[~train]), y[~train])
    found["channel"] = best_losses(lambda x, latents: x[:, latents], parts[0].x.shape[1], parts)
    return found


def judge(
    sae: TrainedSae, parts: Sequence[Tasks], beside: Mapping[str, Losses], sets: Mapping[str, SetRows]
) -> Outcome:
    """Figures of one SAE. The standard errors are over tasks."""
    project, n = preactivations(sae), sae.sae.n_latents
    own = {name: found for tasks in parts for name, found in best_of(project, n, tasks).items()}
    generator = torch.Generator().manual_seed(1)
    shuffled = [
        tasks._replace(
            labels={name: y[torch.randperm(len(y), generator=generator)] for name, y in tasks.labels.items()}
        )
        for tasks in parts
    ]
    every: dict[str, Losses] = {"": {name: ce for name, (_, ce) in own.items()}}
    every |= {f"_{name}": losses for name, losses in beside.items()}
    every["_shuffled"] = best_losses(project, n, shuffled)
    kinds = {"": set(own), "_tokens": set(own) - set(sets), "_texts": set(own) & set(sets)}
    values = {
        f"loss{control}{kind}": mean(torch.tensor([losses[name] for name in own if name in names]))
        for kind, names in kinds.items()
        for control, losses in every.items()
        if names
    }
    gain = sum(beside["constant"][name] - every[""][name] for name in own)
    most = sum(max(beside["constant"][name] - beside["full"][name], 1e-9) for name in own)
    values |= {"gain_share": Value(gain / most), "tasks": Value(float(len(own)))}
    values |= accuracies(sae, sets)
    table = [
        {"label": name, "latent": own[name][0], "loss": own[name][1]}
        | {control: losses[name] for control, losses in beside.items()}
        for name in own
    ]
    return Outcome(sum(len(tasks.x) for tasks in parts), values, curves={"labels": table})


def settings(_judge: str) -> dict[str, str | None]:
    """What decides the tasks beside the text."""
    return {"sae_probes": installed()}


def _content(parts: Sequence[Tasks]) -> str:
    """Hash of all rows, halves and labels."""
    digest = hashlib.sha256(f"{VERSION} {SCREENED}".encode())
    for x, train, labels in parts:
        for name, tensor in {"rows": x, "train": train, **labels}.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _as_tensors(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """Number and standard error, if there is one."""
    known = {name: [part for part in value if part is not None] for name, value in values.items()}
    return {name: torch.tensor(parts, dtype=torch.float64) for name, parts in known.items()}


class Beside:
    """What no SAE is needed for, computed once for these tasks and kept on the disk."""

    def __init__(self, shared: Shared, parts: Sequence[Tasks], sets: Mapping[str, SetRows]) -> None:
        self._shared, self._parts, self._content = shared, parts, _content(parts)
        self._labels = [name for tasks in parts for name in tasks.labels]
        self.losses = self._kept("controls", lambda: controls(parts))
        kept = shared.cached(f"probe-accuracies-{self._content}", lambda: _as_tensors(channel_accuracies(sets)))
        self.of_channels = {name: Value(*value.tolist()) for name, value in kept.items()}

    def random(self, n: int) -> Losses:
        """The best of n random directions."""
        return self._kept(f"random-{n}", lambda: {"random": random_losses(self._parts, n)})["random"]

    def _kept(self, what: str, make: Callable[[], dict[str, Losses]]) -> dict[str, Losses]:
        def tensors() -> dict[str, Tensor]:
            return {
                name: torch.tensor([losses[label] for label in self._labels], dtype=torch.float64)
                for name, losses in make().items()
            }

        kept = self._shared.cached(f"probe-{what}-{self._content}", tensors)
        return {name: dict(zip(self._labels, values.tolist(), strict=True)) for name, values in kept.items()}


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    sets = set_rows(shared)
    parts = tasks_of(shared, sets)
    shared.progress.start("probes", len(subjects) + 1)
    beside = Beside(shared, parts, sets)
    for number, subject in enumerate(subjects, 1):
        sae = subject.load()
        random = beside.random(sae.sae.n_latents)
        shared.tick(number)
        outcome = judge(sae, parts, {**beside.losses, "random": random}, sets)
        outcome.values.update(beside.of_channels)
        yield subject, outcome
