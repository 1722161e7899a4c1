"""What a sweep directory says about its study: the question, the law to fit, the runs that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.laws.catalogue import get
from harness.errors import UserError
from harness.record import sweepdir

HANDWRITTEN = "study.yaml"
"""In a sweep directory without `study.json`: `name`, `title`, `question` and `law`, written by a person."""


@dataclass
class Study:
    """What a sweep says about itself."""

    name: str
    title: str
    question: str = ""
    law: str = "sae_nk"
    runs: tuple[str, ...] = ()
    """Every run of the study, started or not."""
    source: str = ""
    """The study of `sweeps/`, or its path, that the sweep came from; empty if it came from overrides alone."""
    overrides: tuple[str, ...] = ()
    """What the command line changed."""


def read_study(directory: Path) -> Study:
    """The study of a sweep directory, from `study.json` or `study.yaml`; a plain description if it has neither.

    Raises `UserError` if the file is damaged or its law is not known.
    """
    recorded = sweepdir.read_study(directory)
    content = _read_handwritten(directory) if recorded is None else recorded
    if content is None:
        return Study(directory.name, f"Sweep {directory.resolve().name}")
    text = {key: str(content[key]) for key in ("name", "title", "question", "law") if content.get(key)}
    return Study(
        name=text.get("name", directory.name),
        title=text.get("title", f"Sweep {directory.resolve().name}"),
        question=text.get("question", ""),
        law=get(text.get("law", "sae_nk")).name,
        runs=tuple(map(str, content.get("runs") or ())),
        source=str(content.get("study", text.get("name", ""))),
        overrides=() if recorded is None else tuple(map(str, recorded.get("overrides") or ())),
    )


def require_law(study: str, law: str) -> None:
    """Raises `UserError` naming the study if its law is not known: before it trains, not in its report."""
    try:
        get(law)
    except UserError as problem:
        raise UserError(f"the study {study}: {problem}") from None


def _read_handwritten(directory: Path) -> dict[str, Any] | None:
    import yaml  # nearly always there is a study.json

    path = directory / HANDWRITTEN
    if not path.exists():
        return None
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, yaml.YAMLError) as problem:
        raise UserError(f"{path} cannot be read: {str(problem).splitlines()[0]}; mend or remove it") from None
