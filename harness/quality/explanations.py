"""Can a latent be explained by patterns of tokens? Precision and recall of n-gram explanations, and what they lose.

For a random choice of live latents, patterns are built from random activations in one half of the documents and judged
on the other: recall over activations there, precision at all places. Beside it: the best single token, and the share of
tokens at which the latent is active, which is the precision of chance. In every edited text a fixed token stands at
position 0. Then the language model runs on what the explanations say (`explained_codes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.quality.clusters import mean
from harness.quality.explained_codes import reconstruction
from harness.quality.metric import Outcome, Subject
from harness.quality.patterns import Pattern, build, simulate, words
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

VERSION = 2
LATENTS = 32
EXAMPLES = 8
"""Activations from which patterns are built; as many others measure recall."""
_BATCH = 4096
_TEXTS = 64
"""Edited texts of one forward."""


class Active(NamedTuple):
    """Every activation on the text, by latent."""

    latent: Int[Tensor, " entries"]
    place: Int[Tensor, " entries"]
    """Position in the flattened text."""
    value: Float[Tensor, " entries"]


def activations(sae: TrainedSae, shared: Shared) -> Active:
    text = shared.text
    places = text.kept.flatten().nonzero().flatten()
    hidden = text.hidden.flatten(0, 1)
    parts = []
    for part in places.split(_BATCH):
        codes = sae.encode(hidden[part])
        values, index = effective(codes).cpu(), codes.index.cpu()
        row, column = (values > 0).nonzero(as_tuple=True)
        parts.append((index[row, column], part[row], values[row, column]))
    return Active(*(torch.cat(column) for column in zip(*parts, strict=True)))


def chosen_latents(active: Active, n: int, known: Bool[Tensor, " entries"], wanted: int = LATENTS) -> list[int]:
    """Random latents with enough activations to build patterns (`known`) and to judge them (the others)."""
    counts = [torch.bincount(active.latent[part], minlength=n) for part in (known, ~known)]
    able = torch.minimum(*counts).ge(EXAMPLES).nonzero().flatten()
    order = torch.randperm(len(able), generator=torch.Generator().manual_seed(0))
    return sorted(able[order[:wanted]].tolist())


def first_token(shared: Shared) -> list[int]:
    """What stands in front of every edited text."""
    tokenizer = shared.tokenizer
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    return shared.special.prefix or [next((token for token in named if token is not None), 0)]


def filler_token(shared: Shared) -> int:
    """What replaces a token: one without meaning."""
    ids = shared.tokenizer(" _", add_special_tokens=False)["input_ids"]
    return ids[0] if ids else 0


def explain(sae: TrainedSae, shared: Shared, latent: int, examples: Sequence[tuple[list[int], float]]) -> list[Pattern]:
    """A pattern per example: the text before and at the activation, and its value."""
    front, filler = first_token(shared), filler_token(shared)

    def activate(texts: Sequence[Sequence[int]]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), _TEXTS):
            part = texts[start : start + _TEXTS]
            lengths = torch.tensor([len(front) + len(text) for text in part])
            longest = int(lengths.max())
            # causal: what stands behind the last token changes nothing
            ids = torch.tensor([[*front, *text, *[filler] * (longest - len(front) - len(text))] for text in part])
            hidden = shared.model.hidden(ids.to(shared.device)).cpu()
            codes = sae.encode(hidden[torch.arange(len(part)), lengths - 1])
            values = effective(codes).cpu().where(codes.index.cpu() == latent, 0.0).clamp_min(0).sum(dim=1)
            found += values.tolist()
        return found

    return [build(prefix, value, activate, filler) for prefix, value in examples]


class Scores(NamedTuple):
    recall: float
    precision: float
    """NaN if the explanation never fires elsewhere."""
    token_recall: float
    """Of the best single token."""
    token_precision: float
    density: float


def judge_latent(
    patterns: Sequence[Pattern],
    ids: Int[Tensor, "contexts length"],
    active: Tensor,
    judged: Tensor,
    used: Tensor,
    tests: Tensor,
    first: int,
) -> Scores:
    """`active`, `judged` (contexts, length): where the latent is active, and which positions count; `used` and `tests`:
    flat positions of the activations for building and for recall."""
    fires = (simulate(patterns, ids, first) > 0).flatten()
    flat = active.flatten()
    elsewhere = judged.flatten().clone()
    elsewhere[used] = False
    tokens, counts = torch.unique(ids.flatten()[used], return_counts=True)
    token = ids.flatten() == tokens[counts.argmax()]

    def both(says: Tensor) -> tuple[float, float]:
        hits = says & elsewhere
        precision = float(flat[hits].double().mean()) if bool(hits.any()) else float("nan")
        return float(says[tests].double().mean()), precision

    return Scores(*both(fires), *both(token), float(flat[elsewhere].double().mean()))


def judge(sae: TrainedSae, shared: Shared, name: str = "one SAE") -> Outcome:
    """Figures of one SAE; `name` is for the progress. Raises `Interrupted`."""
    text = shared.text
    active = activations(sae, shared)
    length, first = text.ids.shape[1], 1
    built_on = text.document % 2 == 0
    known = built_on[active.place // length]
    chosen = chosen_latents(active, sae.sae.n_latents, known)
    true, simulated = (torch.zeros(text.ids.numel(), len(chosen)) for _ in range(2))
    scores: list[Scores] = []
    table = []
    shared.progress.start(f"explanations of {name}", len(chosen))
    for number, latent in enumerate(chosen):
        own = active.latent == latent
        true[active.place[own], number] = active.value[own]
        generator = torch.Generator().manual_seed(latent)
        build_on, test_on = (_some(own & part, generator) for part in (known, ~known))
        examples = []
        for place, value in zip(active.place[build_on].tolist(), active.value[build_on].tolist(), strict=True):
            context, position = divmod(place, length)
            examples.append((text.ids[context, first : position + 1].tolist(), value))
        patterns = explain(sae, shared, latent, examples)
        simulated[:, number] = simulate(patterns, text.ids, first).flatten()
        result = judge_latent(
            patterns,
            text.ids,
            (true[:, number] > 0).reshape(text.ids.shape),
            text.kept & ~built_on[:, None],
            active.place[build_on],
            active.place[test_on],
            first,
        )
        scores.append(result)
        shown = [words(pattern, lambda token: shared.tokenizer.decode([token])) for pattern in dict.fromkeys(patterns)]
        table.append({"latent": latent, **result._asdict(), "patterns": shown})
        shared.tick(number + 1)
    columns = {name: torch.tensor([getattr(score, name) for score in scores]) for name in Scores._fields}
    silent = columns["precision"].isnan()
    values = {name: mean(column[~column.isnan()]) for name, column in columns.items()}
    values["never_fires"] = Value(float(silent.double().mean()) if len(scores) else float("nan"))
    values["latents"] = Value(float(len(scores)))
    if chosen:
        label = f"losses with the explanations of {name}"
        values |= reconstruction(sae, shared, chosen, true, simulated, built_on, label)
    return Outcome(int(text.kept.sum()), values, curves={"latents": table})


def _some(entries: Bool[Tensor, " entries"], generator: torch.Generator) -> Int[Tensor, " examples"]:
    """`EXAMPLES` random ones of these entries."""
    places = entries.nonzero().flatten()
    return places[torch.randperm(len(places), generator=generator)[:EXAMPLES]]


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    assert shared.text is not None  # loaded before the clock of the progress starts
    for number, subject in enumerate(subjects, 1):
        yield subject, judge(subject.load(), shared, f"SAE {number} of {len(subjects)}")
