"""N-gram explanations of latents whose rule is known, and of a tiny model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from harness.quality.explanations import judge, judge_latent
from harness.quality.patterns import LONGEST, WILDCARD, Pattern, build, matches, simulate
from harness.quality.shared import Shared
from tests.quality.planted import orthonormal, planted

A, B, X, FILLER = 1, 2, 7, 0


def rule(name: str, text: Sequence[int]) -> float:
    """Activation at the last token of a text."""
    holds = {
        "A B": len(text) >= 2 and tuple(text[-2:]) == (A, B),
        "B": text[-1] == B,
        "A * *": len(text) >= 3 and text[-3] == A,
        "start": len(text) == 1,
        "far": len(text) > LONGEST and text[-LONGEST - 1] == A,
    }
    return 2.0 * holds[name]


def pattern_of(name: str, prefix: list[int]) -> Pattern:
    return build(prefix, rule(name, prefix), lambda texts: [rule(name, text) for text in texts], FILLER)


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("A B", [X, X, A, B], (A, B)),
        ("B", [X, A, B], (B,)),
        ("A * *", [X, A, X, 5], (A, WILDCARD, WILDCARD)),
    ],
)
def test_patterns_of_known_rules(name: str, prefix: list[int], expected: tuple[int, ...]) -> None:
    assert pattern_of(name, prefix) == (expected, False, 2.0)


def test_a_latent_of_the_beginning() -> None:
    found = pattern_of("start", [X])
    assert found.start
    ids = torch.full((2, 5), X)
    assert matches(found, ids, first=1).nonzero().tolist() == [[0, 1], [1, 1]]


def test_what_is_too_far_is_not_explained() -> None:
    found = pattern_of("far", [A, *[X] * LONGEST])
    ids = torch.full((1, 40), X)
    ids[0, 5] = A
    active = torch.zeros(1, 40, dtype=torch.bool)
    active[0, 5 + LONGEST] = True
    assert found.activation == 0
    scores = judge_latent([found], ids, active, active | True, torch.tensor([0]), torch.tensor([5 + LONGEST]), 1)
    assert scores.recall == 0 and scores.precision != scores.precision  # it never fires


def test_precision_and_recall_of_a_bigram() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, (30, 40), generator=generator)
    active = torch.zeros(ids.shape, dtype=torch.bool)
    active[:, 1:] = (ids[:, :-1] == A) & (ids[:, 1:] == B)
    places = active.flatten().nonzero().flatten()
    scores = judge_latent([Pattern((A, B), False, 1.0)], ids, active, active | True, places[:5], places[5:], 0)
    assert scores.recall == scores.precision == 1
    assert scores.token_recall == 1 and scores.token_precision == pytest.approx(1 / 8, abs=0.06)


def test_the_most_literal_match_wins() -> None:
    ids = torch.tensor([[A, B, X, B]])
    loose, strict = Pattern((WILDCARD, B), False, 1.0), Pattern((A, B), False, 3.0)
    assert simulate([strict, loose], ids, 0).tolist() == [[0, 3, 0, 1]]


def test_a_tiny_model(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.quality.explanations.LATENTS", 3)
    outcome = judge(planted(orthonormal(16), k=3), shared)
    assert outcome.values["latents"].value >= 1
    assert 0 <= outcome.values["recall"].value <= 1 and 0 < outcome.values["density"].value < 1
    assert all(row["patterns"] for row in outcome.curves["latents"])
