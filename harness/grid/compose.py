"""Hydra as grammar and composer: `conf/` and overrides become typed settings, and errors become one readable line.

Hydra's own multirun is not used: it can neither skip finished runs nor resume (see `harness.grid.cells`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import Config, nested_sections
from harness.errors import UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
"""Absolute, so that the command works from any directory."""


@contextmanager
def hydra_session() -> Iterator[None]:
    """Initialise Hydra on `conf/`, with `Config` as the schema of everything composed in the block."""
    if not CONF_DIR.is_dir():
        raise UserError(f"no configuration directory at {CONF_DIR}; install the project with `pip install -e .`")
    ConfigStore.instance().store(name="config_schema", node=Config)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3", job_name="launch"):
        yield


@functools.cache
def groups() -> dict[str, list[str]]:
    """Config group → its options, from the files in `conf/`."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir()
    }


@functools.cache
def leaf_keys() -> frozenset[str]:
    """Every settable key of the schema, dotted: `sae.k`, `activations.synthetic.noise`, `sweep` …"""

    def walk(cls: type, prefix: str) -> Iterator[str]:
        sections = nested_sections(cls)
        for spec in dataclasses.fields(cls):
            if spec.name in sections:
                yield from walk(sections[spec.name], f"{prefix}{spec.name}.")
            else:
                yield prefix + spec.name

    return frozenset(walk(Config, ""))


def _nearest(word: str, known: Sequence[str]) -> str:
    """The part of a message that offers what the user may have meant."""
    tail = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    close += [tail[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tail), n=2, cutoff=0.75)]
    unique = list(dict.fromkeys(close))[:3]
    return f"did you mean {' or '.join(unique)}?" if unique else ""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides and check keys and group names; the last override of a key wins.

    Call inside `hydra_session`. Raises `UserError`.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed: dict[str, Override] = {}
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except (HydraException, OmegaConfBaseException) as error:
            detail = next((line.strip() for line in str(error).splitlines()[1:] if line.strip(" ^")), "")
            raise UserError(
                f"cannot read the override '{text}'{f' ({detail})' if detail else ''}; "
                "write KEY=VALUE, and several values as KEY=A,B"
            ) from error
        _check_name(override, text)
        key = override.key_or_group
        parsed.pop(key, None)
        parsed[key] = override
    return list(parsed.values())


def _check_name(override: Override, text: str) -> None:
    key, known_groups = override.key_or_group, groups()
    if override.is_hydra_override():
        raise UserError(f"'{text}' has no effect: runs go to out=DIR under sweep=NAME, hydra.* keys are not used")
    if key in known_groups:
        if override.is_delete():
            raise UserError(f"'{text}' would remove a part that every run needs; choose another option of {key}=")
        options = known_groups[key]
        choices = swept_values(override)[0] if override.is_sweep_override() else [override.value()]
        for choice in choices:
            if choice not in options:
                hint = _nearest(str(choice), options)
                raise UserError(
                    f"{key}={choice}: there is no such {key} configuration; {hint + ' ' if hint else ''}"
                    f"available: {', '.join(options)}"
                )
        return
    if override.is_delete():
        raise UserError(f"'{text}' would remove a key that every run needs; give it a value instead: {key}=…")
    sections = {name.rsplit(".", 1)[0] for name in leaf_keys() if "." in name}
    if key not in leaf_keys() and key not in sections:
        hint = _nearest(key, sorted(leaf_keys() if "." in key else [*leaf_keys(), *known_groups]))
        raise UserError(f"there is no key '{key}'; {hint or 'the keys and what they mean are in harness/config.py'}")


def one_line(error: Exception) -> str:
    """What a Hydra or OmegaConf exception says is wrong, with the key, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in message:
        return f"{error.full_key}: {message}"
    details = [line for line in lines[1:] if not line.startswith(("full_key", "object_type", "reference_type"))]
    return " ".join([message, *details[:2]])


def compose_settings(overrides: Sequence[str]) -> DictConfig:
    """Compose `conf/config.yaml` with overrides that contain no sweep. Raises `UserError` in one line."""
    try:
        settings = compose(config_name="config", overrides=list(overrides))
        OmegaConf.set_struct(settings, True)
        return settings
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(one_line(cause)) from error


def checked_values(settings: DictConfig, key: str, values: Sequence[Any]) -> list[Any]:
    """The values of one swept key, converted to the type of the schema. Raises `UserError` for a wrong type."""
    trial = settings.copy()
    converted = []
    for value in values:
        try:
            OmegaConf.update(trial, key, value)
            chosen = OmegaConf.select(trial, key)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={value}: {one_line(error).removeprefix(f'{key}: ')}") from error
        converted.append(OmegaConf.to_object(chosen) if OmegaConf.is_config(chosen) else chosen)
    return converted


def swept_values(override: Override) -> tuple[list[str], list[Any]]:
    """The values of a sweep as texts in Hydra's grammar and as Python values. Raises `UserError`."""
    if not override.is_discrete_sweep():
        raise UserError(
            f"'{override.input_line}': an interval has no list of values; write KEY=A,B or KEY=range(A,B,STEP)"
        )
    texts = [str(text) for text in override.sweep_string_iterator()]
    if not texts:
        raise UserError(f"'{override.input_line}' matches nothing; write KEY=A,B")
    values = list(override.sweep_iterator())
    if not all(isinstance(value, int | float) for value in values):  # quoted strings, lists, dicts, null
        values = OverridesParser.create().parse_override(f"x=[{','.join(texts)}]").value()
        assert isinstance(values, list)
    return texts, values
