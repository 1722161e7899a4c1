"""Overrides to cells: every combination of swept values is one checked `Config`.

Hydra composes once per combination of group choices. Other swept values are type-checked once each and put into the
composed settings. Ten thousand cells take seconds.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hydra.core.override_parser.types import OverrideType
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import Config, nested_sections
from harness.errors import UserError
from harness.grid.compose import checked_values, compose_settings, hydra_session, one_line, parse_overrides
from harness.grid.grammar import MOST_CELLS, swept_values
from harness.grid.schema import leaf_keys, typed
from harness.grid.secrets import refuse_secrets

_COPY = re.compile(r"([\w.]+)=\$\{([\w.]+)\}")
"""An override that copies the value of another key."""


@dataclass(frozen=True)
class Grid:
    """All combinations of the values that some overrides sweep, and which of them to keep."""

    overrides: tuple[str, ...]
    """In Hydra's grammar."""
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Key → values: combinations with another value are left out."""
    min_latents_per_expert_over_k: float = 0.0
    """Combinations with n/E below this many times k are left out; 0 keeps all."""


class Cell(NamedTuple):
    label: str
    """The kind of SAE, if it was chosen, and the swept overrides, as one would type them."""
    config: Config


class Impossible(UserError):
    """Some combinations of settings are no cells."""


_Combination = tuple[str, Mapping[str, Any]]
"""A label, and settings nested like `Config`: their types are checked, their values not yet. A value that was never
given is `omegaconf.MISSING`."""


def make_cells(grids: Sequence[Grid], only: Mapping[str, Sequence[Any]] | None = None) -> list[Cell]:
    """The cells of all grids, in the order in which they are written; `only` filters them all.

    A cell that several grids ask for occurs several times. Raises `UserError` when a combination is impossible (the
    message lists all of them) or none is left.
    """
    with hydra_session():
        combinations = [combination for grid in grids for combination in _combinations(grid)]
        combinations = _keep_only(combinations, only or {})
        if not combinations:
            raise UserError("no cell is left: the overrides and the study's own filters exclude every combination")
        return _check(combinations)


def _combinations(grid: Grid) -> list[_Combination]:
    expanded = _keep_only(_expand(grid.overrides), grid.only)
    return [combination for combination in expanded if _is_wide(combination, grid.min_latents_per_expert_over_k)]


def _expand(overrides: Sequence[str]) -> list[_Combination]:
    """All combinations of the sweeps in `overrides`, in the order in which they are written."""
    copies = _copies(overrides)
    overrides = [text for text in overrides if text.partition("=")[0] not in copies]
    interpolated = any("${" in text for text in overrides)
    structural: list[list[tuple[str, str]]] = []  # per axis: (override to compose with, label)
    plain: list[tuple[str, list[str], list[Any]]] = []
    for override in parse_overrides(overrides):
        if not override.is_sweep_override():
            line = str(override.input_line)
            structural.append([(line, line if override.key_or_group == "sae" else "")])
            continue
        texts, values = swept_values(override)
        if interpolated or override.type != OverrideType.CHANGE or override.key_or_group not in leaf_keys():
            name = override.get_key_element()
            structural.append([(f"{name}={text}", f"{name}={text}") for text in texts])
        else:
            plain.append((override.key_or_group, texts, values))
    count = math.prod([*map(len, structural), *(len(values) for _, _, values in plain)])
    if count > MOST_CELLS:
        raise UserError(f"the sweeps have {count:,} combinations, and a launch has at most {MOST_CELLS:,} cells")
    combinations: list[_Combination] = []
    copied: dict[tuple[str, str], Any] = {}  # the value as the type of the key that copies it
    for choice in itertools.product(*structural):
        settings = compose_settings([text for text, _ in choice])
        labels = [label for _, label in choice if label]
        axes = [
            [
                (key, value, f"{key}={text}")
                for value, text in zip(checked_values(settings, key, values), texts, strict=True)
            ]
            for key, texts, values in plain
        ]
        try:
            base = OmegaConf.to_container(settings, resolve=True, throw_on_missing=False)
        except OmegaConfBaseException as error:
            raise UserError(one_line(error)) from error
        plain_base = {str(name): value for name, value in base.items()} if isinstance(base, dict) else {}
        for point in itertools.product(*axes):
            label = " ".join([*labels, *(text for _, _, text in point)])
            chosen = {key: value for key, value, _ in point}
            for key, other in copies.items():
                value = chosen[other] if other in chosen else _at(plain_base, other)
                if (key, str(value)) not in copied:  # a check copies all settings
                    copied[key, str(value)] = checked_values(settings, key, (value,))[0]
                chosen[key] = copied[key, str(value)]
            combinations.append((label, _with_values(plain_base, list(chosen.items()))))
    return combinations


def _copies(overrides: Sequence[str]) -> dict[str, str]:
    """Key → the key whose value it copies, from overrides like `stream.seed=${train.seed}`.

    They need no composition of their own. Empty if there is any other interpolation, or if one of these keys is written
    twice: then Hydra composes cell by cell.
    """
    keys = [text.partition("=")[0] for text in overrides]
    copies = {}
    for text in overrides:
        if "${" not in text:
            continue
        match = _COPY.fullmatch(text)
        if match is None or not set(match.groups()) <= leaf_keys() or max(map(keys.count, match.groups())) > 1:
            return {}
        copies[match[1]] = match[2]
    return {} if set(copies) & set(copies.values()) else copies


def _at(settings: Mapping[str, Any], key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), settings)


def _with_values(base: dict[str, Any], values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """`base` with dotted keys replaced; other sections are shared, not copied."""
    settings = dict(base)
    for key, value in values:
        section, *path = key.split(".")
        settings[section] = _replaced(settings[section], path, value)
    return settings


def _replaced(section: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    return {**section, path[0]: _replaced(section[path[0]], path[1:], value)}


def _keep_only(combinations: Sequence[_Combination], only: Mapping[str, Sequence[Any]]) -> list[_Combination]:
    """The combinations whose value at each key of `only` is among the listed ones."""
    for key in only:
        if key not in leaf_keys():
            raise UserError(f"only: there is no key '{key}'; the keys are in harness/config.py")
    only = {key: [typed(key, value) for value in values] for key, values in only.items()}
    return [
        (label, settings)
        for label, settings in combinations
        if all(_at(settings, key) in values for key, values in only.items())
    ]


def _is_wide(combination: _Combination, ratio: float) -> bool:
    """Whether n/E ≥ ratio·k: below about 4 an expert has hardly a choice of latents."""
    sae = combination[1]["sae"]
    if MISSING in (sae["n_latents"], sae["k"]) or min(sae["n_latents"], sae["n_experts"]) < 1:
        return True  # refused later, by name
    return sae["n_latents"] >= ratio * sae["k"] * sae["n_experts"]


def _check(combinations: Sequence[_Combination]) -> list[Cell]:
    """The combinations as cells. Raises one `UserError` that lists all the impossible ones."""
    cells: list[Cell] = []
    refused: list[tuple[str, str]] = []
    shared: dict[int, Any] = {}
    for label, settings in combinations:
        try:
            cells.append(Cell(label, _build(Config, settings, "", shared)))
        except ValueError as error:
            refused.append((label, str(error)))
    refuse_secrets(cell.config for cell in cells)
    if refused:
        raise Impossible(_refusal(refused, len(combinations)))
    return cells


def _refusal(refused: Sequence[tuple[str, str]], total: int) -> str:
    if len({reason for _, reason in refused}) == 1 and (total == 1 or len(refused) == total):
        return refused[0][1]
    return "\n".join([f"{len(refused)} of {total} cells are impossible, nothing was started:", *told_once(refused)])


def told_once(problems: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each reason of (label of a cell, reason): the first cell, and how many more have it."""
    cells: dict[str, list[str]] = {}
    for label, reason in problems:
        cells.setdefault(reason, []).append(label)
    more = {reason: f" (and {len(labels) - 1} more)" if len(labels) > 1 else "" for reason, labels in cells.items()}
    return [f"  {labels[0] or 'the only cell'}{more[reason]}: {reason}" for reason, labels in cells.items()]


def _build(cls: type, settings: Mapping[str, Any], prefix: str, shared: dict[int, Any]) -> Any:
    """The dataclass of typed settings; its `__post_init__` checks the values. Equals `config.from_container`.

    `shared` maps the id of a mapping to what was built from it: sections that cells share are built once.
    """
    sections = nested_sections(cls)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name in sections:
            if id(value) not in shared:
                shared[id(value)] = _build(sections[name], value, f"{prefix}{name}.", shared)
            value = shared[id(value)]
        values[name] = value
    missing = [f"{prefix}{name}" for name, value in values.items() if isinstance(value, str) and value == MISSING]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; set it, e.g. {missing[0]}=…")
    return cls(**values)


def narrow_cells(cells: Sequence[Cell]) -> list[str]:
    """Labels of cells with k > n/(4·E): allowed, but they have few latents to choose from and say little."""
    return [
        cell.label
        for cell in cells
        if (cell.config.sae.k or cell.config.sae.target_l0) * 4 * cell.config.sae.n_experts > cell.config.sae.n_latents
    ]
