"""What tells the cells of a sweep apart, in few characters: `switch n=512 k=8 seed=1`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.architectures import ARCHITECTURES
from harness.config import Config, nested_sections

ARCHITECTURE = "sae.architecture"

ACTIVE = ("sae.k", "sae.target_l0")

FIRST = (ARCHITECTURE, "sae.n_latents", *ACTIVE, "sae.n_experts")
"""Shown before the other settings, in this order."""

LAST = ("train.seed",)

SEEDS = ("stream.seed", "train.seed")
"""Repeats vary both alike, so one of them tells enough."""

SYMBOLS = {
    ARCHITECTURE: "",
    "sae.n_latents": "n",
    "sae.n_experts": "E",
    "sae.target_l0": "L0",
    "activations.synthetic.seed": "data_seed",
}
"""Setting -> its name in front of the equals sign; others are called by the last part of their key."""


def cell_names(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of some configurations (`config.to_container`, or what a file holds of one).

    It has the scientific settings in which configurations of one architecture differ, the architecture if there are
    several, and n, k if there is nothing else to tell. A missing setting counts as its default.
    """
    cells = [_scientific(configuration) for configuration in configurations]
    values: dict[str, dict[str, set[str]]] = {}  # setting -> architecture -> its values
    for cell in cells:
        for key, value in cell.items():
            values.setdefault(key, {}).setdefault(str(cell[ARCHITECTURE]), set()).add(repr(value))
    keys = [key for key, by_kind in values.items() if any(len(seen) > 1 for seen in by_kind.values())]
    if len(values.get(ARCHITECTURE, ())) > 1:
        keys.append(ARCHITECTURE)
    if {*SEEDS} <= {*keys} and all(cell[SEEDS[0]] == cell[SEEDS[1]] for cell in cells):
        keys.remove(SEEDS[0])
    if not keys:
        keys = [ARCHITECTURE, "sae.n_latents", *ACTIVE]
    keys = (
        [key for key in FIRST if key in keys]
        + [key for key in keys if key not in FIRST + LAST]
        + [key for key in LAST if key in keys]
    )
    symbols = _symbols(keys)
    return [" ".join(_word(symbols[key], cell[key]) for key in keys if _applies(key, cell)) for cell in cells]


@functools.cache
def _defaults() -> dict[str, Any]:
    """Every scientific setting and its default."""
    return dict(_leaves(Config, ""))


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    sections = nested_sections(cls)
    for spec in dataclasses.fields(cls):
        if not spec.metadata.get("science", True):
            continue
        if spec.name in sections:
            yield from _leaves(sections[spec.name], f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec.default_factory() if callable(spec.default_factory) else spec.default


def _scientific(configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _at(configuration, key.split("."), default) for key, default in _defaults().items()}


def _at(section: Any, path: Sequence[str], default: Any) -> Any:
    for part in path:
        if not isinstance(section, Mapping) or part not in section:
            return default
        section = section[part]
    return section


def _symbols(keys: Sequence[str]) -> dict[str, str]:
    """Setting -> what it is called; the whole key where two settings have the same last part."""
    short = {key: SYMBOLS.get(key, key.rpartition(".")[2]) for key in keys}
    times = Counter(short.values())
    return {key: symbol if times[symbol] == 1 else key for key, symbol in short.items()}


def _applies(key: str, cell: Mapping[str, Any]) -> bool:
    if key == "sae.n_experts":
        traits = ARCHITECTURES.get(cell[ARCHITECTURE])
        return traits is not None and traits.routed
    # 0: not of this architecture, or without peers
    return key not in (*ACTIVE, "sae.sparsity", "train.mfr_weight", "train.mfr_seeds") or bool(cell[key])


def _word(symbol: str, value: Any) -> str:
    if isinstance(value, float):
        short = f"{value:g}"
        text = re.sub(r"e\+?(-?)0?", r"e\1", short if float(short) == value else repr(value))
    elif isinstance(value, list):
        text = ",".join(map(str, value)) or "-"
    else:
        text = str(value) if value not in ("", None) else "-"
    return f"{symbol}={text}" if symbol else text
