"""Study files (`sweeps/*.yaml`): a question, the grids that answer it, and the law to fit.

Keys of a study: `question`, `title`, `law`, `sweep` (directory under `out`; default the study's name), `evaluate`
(metrics by which finished runs are judged, see `harness.quality.registry`), `evaluate_tokens` (of text, for them),
`overrides` (common to all grids) and `grids`, a list of {`name`, `overrides`, `only`, `min_latents_per_expert_over_k`}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserError
from harness.files import user_path
from harness.grid.cells import Grid
from harness.grid.schema import is_text
from harness.grid.yaml_text import check_texts, read_text

STUDY_DIR = Path(__file__).resolve().parents[2] / "sweeps"


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    title: str
    law: str
    sweep: str
    grids: tuple[Grid, ...]
    source: str
    """The name or the path by which it was loaded."""
    evaluate: tuple[str, ...] = ()
    """Metrics by which its finished runs are judged."""
    evaluate_tokens: int = 0
    """Tokens of text for these metrics; 0: as many as `harness.evaluate` takes unless told otherwise."""


def study_names() -> list[str]:
    return sorted(path.stem for path in STUDY_DIR.glob("*.yaml"))


def load_study(name_or_path: str) -> Study:
    """Read a study by name (from `sweeps/`) or by path to a YAML file. Raises `UserError`."""
    path = Path(user_path(name_or_path))
    if path.suffix not in (".yaml", ".yml"):
        path = STUDY_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            raise UserError(
                f"there is no study '{name_or_path}'; available: {', '.join(study_names())}, or a path to a .yaml file"
            )
    text = read_text(path, "study file")
    check_texts(text, path, _is_text)
    content = yaml.safe_load(text)
    known = {"question", "title", "law", "sweep", "evaluate", "evaluate_tokens", "overrides", "grids"}
    _check(content, path, known, "study")
    common = _strings(content.get("overrides"), path, "overrides")
    grids = content.get("grids")
    if not isinstance(grids, list) or not grids:
        raise UserError(f"{path}: a study needs `grids`, a list of at least one grid")
    tokens = content.get("evaluate_tokens", 0)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise UserError(f"{path}: evaluate_tokens must be a whole number of tokens, such as 8192, not {tokens!r}")
    return Study(
        name=path.stem,
        question=str(content.get("question", "")),
        title=str(content.get("title", path.stem)),
        law=str(content.get("law", "sae_nk")),
        sweep=str(content.get("sweep", path.stem)),
        grids=tuple(_grid(entry, common, path, number) for number, entry in enumerate(grids, start=1)),
        source=name_or_path,
        evaluate=_strings(content.get("evaluate"), path, "evaluate"),
        evaluate_tokens=tokens,
    )


def _is_text(key: str) -> bool:
    """Whether a value in a study file must be a text; the keys under `only` are settings."""
    return key in ("question", "title", "law", "sweep", "grids.name") or is_text(key.removeprefix("grids.only."))


def _grid(entry: Any, common: tuple[str, ...], path: Path, number: int) -> Grid:
    _check(entry, path, {"name", "overrides", "only", "min_latents_per_expert_over_k"}, f"grid {number}")
    only = entry.get("only") or {}
    if not isinstance(only, dict) or not all(isinstance(values, list) for values in only.values()):
        raise UserError(f"{path}: `only` of grid {number} must map a key to a list of values")
    ratio = entry.get("min_latents_per_expert_over_k", 0)
    if not isinstance(ratio, int | float):
        raise UserError(f"{path}: min_latents_per_expert_over_k of grid {number} must be a number, not {ratio!r}")
    own = _strings(entry.get("overrides"), path, f"overrides of grid {number}")
    return Grid((*common, *own), only, float(ratio))


def _check(content: Any, path: Path, known: set[str], what: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {what} is a mapping, see sweeps/quick.yaml for an example")
    if unknown := sorted(set(content) - known):
        raise UserError(f"{path}: unknown key {unknown[0]!r} in the {what}; known: {', '.join(sorted(known))}")


def _strings(value: Any, path: Path, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        example = "metrics such as downstream" if what == "evaluate" else "overrides such as 'sae.k=8,16'"
        raise UserError(f"{path}: {what} must be a list of {example}")
    return tuple(value)


def override_key(override: str) -> str:
    """The key or group that an override names."""
    return override.split("=", 1)[0].lstrip("+~")


def overridden(overrides: Sequence[str]) -> set[str]:
    """The keys and groups that overrides name."""
    return {override_key(text) for text in overrides}


def _replace_overrides(grids: Sequence[Grid], overrides: Sequence[str]) -> list[Grid]:
    """Put overrides of the command line into the grids of a study.

    An override replaces the same key in the grids that set it, so `sae.n_experts=4` reaches the Switch grid only. A key
    that no grid sets goes to all grids.
    """
    set_by = [overridden(grid.overrides) for grid in grids]
    anywhere = set().union(*set_by)
    result = []
    for grid, keys in zip(grids, set_by, strict=True):
        chosen = [text for text in overrides if override_key(text) in keys or override_key(text) not in anywhere]
        replaced = {override_key(text) for text in chosen}
        kept = [text for text in grid.overrides if override_key(text) not in replaced]
        result.append(replace(grid, overrides=(*kept, *chosen)))
    return result


def study_grids(study: Study, overrides: Sequence[str]) -> list[Grid]:
    """The grids of a study with overrides of the command line put in, `sweep` included."""
    common = [text for text in overrides if override_key(text) != "sweep"]
    sweep = [text for text in overrides if override_key(text) == "sweep"] or [f"sweep={study.sweep}"]
    return [replace(grid, overrides=(*grid.overrides, *sweep)) for grid in _replace_overrides(study.grids, common)]
