"""Overrides to cells: every combination of swept values is one checked `Config`.

Hydra composes once per combination of group choices; plain swept values are type-checked once each and put into the
composed settings, so that ten thousand cells take seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.types import OverrideType
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import Config
from harness.errors import UserError
from harness.grid.compose import (
    checked_values,
    compose_settings,
    leaf_keys,
    nested_sections,
    one_line,
    parse_overrides,
    swept_values,
)


class Candidate(NamedTuple):
    """One combination of the grid, types checked, values not yet."""

    label: str
    """The kind of SAE if it was chosen and the swept overrides, as one would type them."""
    settings: Mapping[str, Any]
    """Nested like `Config`; a value that was never given is `omegaconf.MISSING`."""


class Cell(NamedTuple):
    label: str
    config: Config


def expand(overrides: Sequence[str]) -> list[Candidate]:
    """All combinations of the sweeps in `overrides` (Hydra's grammar), in the order in which they are written.

    Call inside `hydra_session`. Raises `UserError`.
    """
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
    candidates: list[Candidate] = []
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
            candidates.append(Candidate(label, _with_values(plain_base, [(key, value) for key, value, _ in point])))
    return candidates


def _with_values(base: dict[str, Any], values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """`base` with dotted keys replaced; untouched sections are shared, not copied."""
    settings = dict(base)
    for key, value in values:
        section, *path = key.split(".")
        settings[section] = _replaced(settings[section], path, value)
    return settings


def _replaced(section: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    return {**section, path[0]: _replaced(section[path[0]], path[1:], value)}


def lookup(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, e.g. `sae.k`."""
    value: Any = settings
    for name in key.split("."):
        value = value[name]
    return value


def keep_only(candidates: Sequence[Candidate], only: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """The candidates whose value at each key of `only` is among the listed ones."""
    for key in only:
        if key not in leaf_keys():
            raise UserError(f"only: there is no key '{key}'; the keys are in harness/config.py")
    return [c for c in candidates if all(lookup(c.settings, key) in allowed for key, allowed in only.items())]


def keep_wide_experts(candidates: Sequence[Candidate], ratio: float) -> list[Candidate]:
    """The candidates with n/E ≥ ratio·k: below about 4 an expert has hardly a choice of latents."""

    def wide(settings: Mapping[str, Any]) -> bool:
        sae = settings["sae"]
        if MISSING in (sae["n_latents"], sae["k"]):
            return True  # refused later, by name
        return sae["n_latents"] >= ratio * sae["k"] * sae["n_experts"]

    return [candidate for candidate in candidates if wide(candidate.settings)]


def build_cells(candidates: Sequence[Candidate]) -> list[Cell]:
    """Check every candidate. Raises one `UserError` that lists all the impossible ones."""
    cells: list[Cell] = []
    refused: list[tuple[str, str]] = []
    shared: dict[int, Any] = {}
    for candidate in candidates:
        try:
            cells.append(Cell(candidate.label, _build(Config, candidate.settings, "", shared)))
        except ValueError as error:
            refused.append((candidate.label, str(error)))
    if refused:
        raise UserError(_refusal(refused, len(candidates)))
    return cells


def _refusal(refused: Sequence[tuple[str, str]], total: int) -> str:
    if len({reason for _, reason in refused}) == 1 and (total == 1 or len(refused) == total):
        return refused[0][1]
    lines = [f"  {label or 'the only cell'}: {reason}" for label, reason in refused]
    return "\n".join([f"{len(refused)} of {total} cells are impossible, nothing was started:", *lines])


def _build(cls: type, settings: Mapping[str, Any], prefix: str, shared: dict[int, Any]) -> Any:
    """The dataclass of typed settings; its `__post_init__` checks the values. Equals `config.from_container`.

    `shared` holds what was built from which mapping: sections that cells have in common are built once.
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
    """Labels of cells with k > n/(4·E): allowed, but so few latents to choose from that they say little."""
    return [
        cell.label for cell in cells if cell.config.sae.k * 4 * cell.config.sae.n_experts > cell.config.sae.n_latents
    ]
