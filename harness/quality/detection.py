"""Detection and fuzzing: can a judge tell from an explanation where a latent fires? (after delphi)

Examples of a latent are divided first: those it is explained from are never those it is judged on. Detection shows
texts, half of them without the latent; fuzzing shows texts with highlights, half of them moved to tokens where it is
silent. Scores are balanced accuracy and AUC, and the same judge with the explanations of other latents gives the
floor: what counts is the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from harness.quality.clusters import mean
from harness.quality.explanations import Active, activations
from harness.quality.judges import Judge, make_judge
from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Shared
from harness.record import names
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

VERSION = 1
LATENTS = 32
SHOWN = 8
"""Contexts from which a latent is explained, and as many on which it is judged."""
WINDOW = 32
"""Tokens of a text, with the activation inside."""
ACTIVE = 0.3
"""Of the largest activation in a text: tokens above are highlighted."""


class Example(NamedTuple):
    tokens: list[str]
    highlighted: list[bool]
    activation: float

    def text(self, *, marked: bool) -> str:
        if not marked:
            return "".join(self.tokens)
        return "".join(f"<<{token}>>" if on else token for token, on in zip(self.tokens, self.highlighted, strict=True))


class Material(NamedTuple):
    """Of one latent."""

    explained: list[Example]
    positive: list[Example]
    negative: list[Example]
    moved: list[Example]
    """The positive texts with as many other tokens highlighted."""


def material(active: Active, latent: int, shared: Shared, decode: dict[int, str]) -> Material | None:
    """Examples of a latent; None if it fires in too few contexts."""
    ids, length = shared.text.ids, shared.text.ids.shape[1]
    own = active.latent == latent
    strength = torch.zeros(ids.numel())
    strength[active.place[own]] = active.value[own]
    strength = strength.reshape(ids.shape)
    best = strength.max(dim=1).values
    fires = (best > 0).nonzero().flatten()
    silent = (best == 0).nonzero().flatten()
    if len(fires) < 2 * SHOWN or len(silent) < SHOWN:
        return None
    generator = torch.Generator().manual_seed(latent)
    # ranks are spread over both halves: the strongest, weaker ones, the weakest
    ranked = fires[best[fires].argsort(descending=True)]
    ranked = ranked[torch.linspace(0, len(ranked) - 1, 2 * SHOWN).round().long()]
    order = torch.randperm(2 * SHOWN, generator=generator)
    first, second = ranked[order[:SHOWN]].tolist(), ranked[order[SHOWN:]].tolist()
    others = silent[torch.randperm(len(silent), generator=generator)[:SHOWN]].tolist()

    def example(context: int, around: int) -> Example:
        start = min(max(around - WINDOW // 2, 0), max(length - WINDOW, 0))
        span = slice(start, start + WINDOW)
        values = strength[context, span]
        limit = max(float(values.max()) * ACTIVE, 1e-12)
        tokens = [decode[token] for token in ids[context, span].tolist()]
        return Example(tokens, (values >= limit).tolist(), float(values.max()))

    def peak(context: int) -> int:
        return int(strength[context].argmax())

    positive = [example(context, peak(context)) for context in second]
    return Material(
        [example(context, peak(context)) for context in first],
        positive,
        [example(context, int(torch.randint(length, (), generator=generator))) for context in others],
        [_moved(each, generator) for each in positive],
    )


def _moved(example: Example, generator: torch.Generator) -> Example:
    """The text with as many tokens highlighted, none of them active."""
    free = [place for place, on in enumerate(example.highlighted) if not on]
    wanted = min(sum(example.highlighted), len(free))
    chosen = {free[place] for place in torch.randperm(len(free), generator=generator)[:wanted].tolist()}
    return example._replace(highlighted=[place in chosen for place in range(len(example.tokens))])


def explanation(examples: Sequence[Example], most: int = 5) -> str:
    """The offline explanation: the words that are highlighted most often, by summed activation, as patterns."""
    weights: dict[str, float] = {}
    for example in examples:
        for token, on in zip(example.tokens, example.highlighted, strict=True):
            if on and token.strip():
                weights[token.strip()] = weights.get(token.strip(), 0.0) + example.activation
    return " | ".join(sorted(weights, key=lambda word: -weights[word])[:most])


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive score is above a negative one; equal ones count half."""
    p, n = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float(((p > n) + 0.5 * (p == n)).mean()) if p.size and n.size else float("nan")


def balanced_accuracy(positive: Sequence[float], negative: Sequence[float], cut: str) -> float:
    """Mean of the shares that are right in either class."""
    if not positive or not negative:
        return float("nan")
    if cut == "median":
        return _above(positive, float(np.median([*positive, *negative])), negative)
    right = np.mean([score >= 0.5 for score in positive]), np.mean([score < 0.5 for score in negative])
    return float(np.mean(right))


def _above(positive: Sequence[float], middle: float, negative: Sequence[float]) -> float:
    """Scores at the median are half right."""

    def share(scores: Sequence[float], sign: int) -> float:
        return float(np.mean([(sign * (s - middle) > 0) + 0.5 * (s == middle) for s in scores]))

    return (share(positive, 1) + share(negative, -1)) / 2


class Scores(NamedTuple):
    auc: float
    accuracy: float
    unusable: int


def scored(judge: Judge, says: str, positive: Sequence[Example], negative: Sequence[Example], marked: bool) -> Scores:
    answers = judge.score(says, [each.text(marked=marked) for each in (*positive, *negative)], marked)
    yes = [answer for answer in answers[: len(positive)] if answer is not None]
    no = [answer for answer in answers[len(positive) :] if answer is not None]
    return Scores(auc(yes, no), balanced_accuracy(yes, no, judge.cut), len(answers) - len(yes) - len(no))


def evaluate(
    judge: Judge, materials: Sequence[Material], tick=lambda done: None
) -> tuple[dict[str, Value], list[dict[str, float | str]]]:
    """Values over latents, and a line per latent. Needs two latents: the floor is with another one's explanation."""
    says = [explanation(each.explained) for each in materials]
    lines: list[dict[str, float | str]] = []
    unusable = asked = 0
    for number, each in enumerate(materials):
        line: dict[str, float | str] = {"explanation": says[number]}
        for kind, against, marked in (("detection", each.negative, False), ("fuzzing", each.moved, True)):
            own = scored(judge, says[number], each.positive, against, marked)
            other = scored(judge, says[(number + 1) % len(says)], each.positive, against, marked)
            line |= {f"{kind}_auc": own.auc, f"{kind}_accuracy": own.accuracy}
            line |= {f"{kind}_auc_shuffled": other.auc, f"{kind}_accuracy_shuffled": other.accuracy}
            line[f"{kind}_auc_gain"] = own.auc - other.auc
            unusable += own.unusable + other.unusable
            asked += 2 * (len(each.positive) + len(against))
        lines.append(line)
        tick(number + 1)
    numbers = [name for name in (lines[0] if lines else {}) if name != "explanation"]
    columns = {name: torch.tensor([float(line[name]) for line in lines], dtype=torch.float64) for name in numbers}
    values = {name: mean(column[~column.isnan()]) for name, column in columns.items()}
    values["unusable_answers"] = Value(unusable / max(asked, 1))
    values["latents"] = Value(float(len(lines)))
    return values, lines


def judge_sae(sae: TrainedSae, shared: Shared, judge: Judge, done: int = 0) -> Outcome:
    """Figures of one SAE; `done` latents of other SAEs come before in the progress."""
    active = activations(sae, shared)
    decode = {token: shared.tokenizer.decode([token]) for token in torch.unique(shared.text.ids).tolist()}
    order = torch.randperm(sae.sae.n_latents, generator=torch.Generator().manual_seed(0)).tolist()
    live = set(torch.unique(active.latent).tolist())
    materials: dict[int, Material] = {}
    for latent in (latent for latent in order if latent in live):
        if (found := material(active, latent, shared, decode)) is not None:
            materials[latent] = found
        if len(materials) == LATENTS:
            break
    values, lines = evaluate(judge, list(materials.values()), lambda latents: shared.tick(done + latents))
    table = [{"latent": latent, **line} for latent, line in zip(materials, lines, strict=True)]
    return Outcome(int(shared.text.kept.sum()), values, curves={"latents": table})


def settings(judge: str) -> dict[str, str]:
    """What decides its values beside the text: who judges."""
    return {"judge": judge}


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    judge = make_judge(shared.judge, shared.out / names.SHARED / "judge.jsonl")
    assert shared.text is not None  # loaded before the clock of the progress starts
    shared.progress.start(f"detection by {judge.name}", len(subjects) * LATENTS)
    for number, subject in enumerate(subjects):
        yield subject, judge_sae(subject.load(), shared, judge, number * LATENTS)
