"""What can be set: the groups of `conf/`, the keys of the schema and their types."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import Config, nested_sections
from harness.errors import UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
"""Absolute, so that the command works from any directory."""


@functools.cache
def groups() -> dict[str, list[str]]:
    """Config group → its options, from the files in `conf/`."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir()
    }


@functools.cache
def _leaves() -> Mapping[str, tuple[type, Any]]:
    """Dotted key → the dataclass that has the field, and the field's type."""

    def walk(cls: type, prefix: str) -> Iterator[tuple[str, tuple[type, Any]]]:
        sections, hints = nested_sections(cls), typing.get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            if spec.name in sections:
                yield from walk(sections[spec.name], f"{prefix}{spec.name}.")
            else:
                yield prefix + spec.name, (cls, hints[spec.name])

    return MappingProxyType(dict(walk(Config, "")))


@functools.cache
def leaf_keys() -> frozenset[str]:
    """Every settable key of the schema, dotted: `sae.k`, `activations.synthetic.noise`, `sweep` …"""
    return frozenset(_leaves())


def is_text(key: str) -> bool:
    """Whether a key holds a text or a list of texts."""
    return key in _leaves() and _leaves()[key][1] in (str, list[str])


def is_list(key: str) -> bool:
    return key in _leaves() and _leaves()[key][1] == list[str]


def typed(key: str, value: Any) -> Any:
    """`value` in the type of the schema; a number may be given as text. Raises `UserError` for what does not fit."""
    section, name = OmegaConf.structured(_leaves()[key][0]), key.rsplit(".", 1)[-1]
    try:
        section[name] = value
    except OmegaConfBaseException as error:
        raise UserError(f"{key}={value}: {str(error).splitlines()[0]}") from error
    return section[name]
