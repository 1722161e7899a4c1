"""Judges: known ones give known scores, and an endpoint over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.quality.detection import Example, Material, auc, balanced_accuracy, evaluate, judge_sae
from harness.quality.explanations import activations
from harness.quality.judges import KEY_VARIABLE, HttpJudge, PatternJudge, make_judge
from harness.quality.shared import Shared
from tests.quality.planted import orthonormal, planted

SECRET = "sk-very-secret"


class Mock:
    name, cut = "mock", "half"

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.generator = torch.Generator().manual_seed(0)

    def score(self, explanation: str, texts: Sequence[str], highlighted: bool) -> list[float | None]:
        if self.rule == "yes":
            return [1.0] * len(texts)
        if self.rule == "random":
            return [*torch.rand(len(texts), generator=self.generator).tolist()]
        if self.rule == "refuses":
            return [None] * len(texts)
        word = f"<<{explanation}>>" if highlighted else explanation
        says = [float(word in text) for text in texts]
        return [1 - score for score in says] if self.rule == "contrary" else [*says]


def materials(count: int = 40) -> list[Material]:
    """Latent i fires on the word `w<i>!` and nowhere else."""

    def example(number: int, place: int, on: int) -> Example:
        tokens = [f"w{number}!" if spot == place else f"x{number}-{spot}" for spot in range(8)]
        return Example(tokens, [spot == on for spot in range(8)], 1.0)

    def negative(number: int) -> Example:
        return Example([f"y{number}-{spot}" for spot in range(8)], [False] * 8, 0.0)

    return [
        Material(
            [example(i, place, place) for place in range(4)],
            [example(i, place, place) for place in range(4, 8)],
            [negative(i) for _ in range(4)],
            [example(i, place, place - 4) for place in range(4, 8)],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("rule", "expected"), [("oracle", 1.0), ("yes", 0.5), ("random", 0.5), ("contrary", 0.0)])
@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_known_judges(rule: str, expected: float, kind: str) -> None:
    values, _ = evaluate(Mock(rule), materials(200))
    tolerance = 0.05 if rule == "random" else 1e-9
    assert values[f"{kind}_accuracy"].value == pytest.approx(expected, abs=tolerance)
    assert values[f"{kind}_auc"].value == pytest.approx(expected, abs=tolerance)
    assert values[f"{kind}_auc_shuffled"].value == pytest.approx(0.5, abs=0.08)
    assert values[f"{kind}_auc_gain"].value == pytest.approx(expected - 0.5, abs=0.1)


def test_refusals_are_counted() -> None:
    values, _ = evaluate(Mock("refuses"), materials(3))
    assert values["unusable_answers"].value == 1


def test_ties_and_medians() -> None:
    assert auc([0.5, 0.5], [0.5]) == 0.5 and auc([1.0], [0.0]) == 1
    assert balanced_accuracy([0.3, 0.31], [0.29, 0.28], "median") == 1
    assert balanced_accuracy([0.3, 0.31], [0.29, 0.28], "half") == 0.5


def test_the_pattern_judge() -> None:
    judge = PatternJudge()
    assert judge.score("w1! | a*c", ["x w1! y", "abc", "zzz"], False) == [1, 1, 0]
    assert judge.score("w1!", ["<<w1!>> x", "w1! <<x>>"], True) == [1, 0]


def test_examples_of_a_tiny_model(shared: Shared) -> None:
    sae = planted(orthonormal(16), k=2)
    outcome = judge_sae(sae, shared, PatternJudge())
    assert outcome.values["latents"].value == len(outcome.curves["latents"]) > 0
    assert len(activations(sae, shared).latent) == 2 * int(shared.text.kept.sum())


class Endpoint(BaseHTTPRequestHandler):
    mode = "logprobs"
    asked: list[dict] = []  # noqa: RUF012
    keys: list[str | None] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked.append(body)
        Endpoint.keys.append(self.headers.get("Authorization"))
        if Endpoint.mode == "denied" or (Endpoint.mode == "busy" and len(Endpoint.asked) < 3):
            self.send_response(401 if Endpoint.mode == "denied" else 429)
            self.end_headers()
            self.wfile.write(f"bad key {self.headers.get('Authorization')}".encode())
            return
        yes = "w1" in body["messages"][0]["content"].partition("Text:")[2]
        choice: dict = {"message": {"content": "I cannot say" if Endpoint.mode == "prose" else str(int(yes))}}
        if Endpoint.mode == "logprobs":
            top = [{"token": "1", "logprob": -0.2 if yes else -2.0}, {"token": "0", "logprob": -2.0 if yes else -0.2}]
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, format: str, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    Endpoint.mode, Endpoint.asked, Endpoint.keys = "logprobs", [], []
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def judge_at(endpoint: str, tmp_path: Path) -> HttpJudge:
    return HttpJudge(endpoint, "m", tmp_path / "cache.jsonl", wait_s=0.001)


def test_an_endpoint_is_asked_once_and_replayed(endpoint: str, tmp_path: Path) -> None:
    judge = judge_at(endpoint, tmp_path)
    scores = judge.score("a word", ["has w1", "has none"], False)
    assert scores[0] == pytest.approx(0.858, abs=0.01) and scores[1] == pytest.approx(0.142, abs=0.01)
    assert Endpoint.keys == [f"Bearer {SECRET}"] * 2 and Endpoint.asked[0]["temperature"] == 0
    assert judge_at(endpoint, tmp_path).score("a word", ["has w1", "has none"], False) == scores
    assert len(Endpoint.asked) == 2
    assert SECRET not in (tmp_path / "cache.jsonl").read_text()


def test_answers_without_logprobs_and_without_sense(endpoint: str, tmp_path: Path) -> None:
    Endpoint.mode = "text"
    assert judge_at(endpoint, tmp_path).score("e", ["w1", "none"], False) == [1, 0]
    Endpoint.mode = "prose"
    assert judge_at(endpoint, tmp_path).score("other", ["w1"], False) == [None]


def test_a_busy_endpoint_is_asked_again(endpoint: str, tmp_path: Path) -> None:
    Endpoint.mode = "busy"
    assert len(judge_at(endpoint, tmp_path).score("e", ["w1"], False)) == 1 and len(Endpoint.asked) == 3


def test_a_refusal_does_not_show_the_key(endpoint: str, tmp_path: Path) -> None:
    Endpoint.mode = "denied"
    with pytest.raises(UserError, match="status 401") as caught:
        judge_at(endpoint, tmp_path).score("e", ["w1"], False)
    assert SECRET not in str(caught.value) and len(Endpoint.asked) == 1


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not answer"):
        judge_at("http://127.0.0.1:9", tmp_path).score("e", ["w1"], False)


def test_wrong_judges(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--judge nobody is not known"):
        make_judge("nobody", tmp_path / "c")
    with pytest.raises(UserError, match="is no address"):
        make_judge("http:ftp#m", tmp_path / "c")
