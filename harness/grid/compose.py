"""Hydra as grammar and composer: `conf/` and overrides become typed settings, and errors become one readable line.

Hydra's own multirun is not used: it can neither skip finished runs nor resume (see `harness.grid.cells`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from harness.config import Config, from_container, to_container
from harness.errors import UserError
from harness.grid.grammar import read_override, swept_values
from harness.grid.schema import CONF_DIR, groups, leaf_keys
from harness.grid.secrets import refuse_secrets
from harness.grid.yaml_text import check_conf


@contextmanager
def hydra_session() -> Iterator[None]:
    """Initialise Hydra on `conf/`, with `Config` as the schema of everything composed in the block.

    Raises `UserError` if `conf/` is missing or has a file that cannot be read as it was meant.
    """
    if not CONF_DIR.is_dir():
        raise UserError(f"no configuration directory at {CONF_DIR}; install the project with `pip install -e .`")
    check_conf()
    ConfigStore.instance().store(name="config_schema", node=Config)
    GlobalHydra.instance().clear()
    OmegaConf.register_new_resolver("oc.env", _no_environment, replace=True)
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3", job_name="launch"):
            yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _no_environment(variable: str, *_: str) -> str:
    """Every setting is recorded, so no value of the environment may slip into one."""
    raise ValueError(
        f"${{oc.env:{variable}}} is not resolved, because all settings are recorded and a variable may hold a secret; "
        f"let the shell fill in what may be seen (${variable}); paths may contain variables"
    )


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
    loader = GlobalHydra.instance().config_loader()
    parsed: dict[str, Override] = {}
    for text in overrides:
        override = read_override(text)
        override.config_loader = loader
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
    if wrong := re.fullmatch(r"Value '(.*)' of type '\w+' could not be converted to (Integer|Float)", message):
        kind = "a whole number" if wrong[2] == "Integer" else "a number"
        message = f"takes {kind}, not '{wrong[1]}'" + _in_digits(wrong[1])
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in message:
        return f"{error.full_key}: {message}"
    details = [line for line in lines[1:] if not line.startswith(("full_key", "object_type", "reference_type"))]
    return " ".join([message, *details[:2]])


def _in_digits(text: str) -> str:
    """What to write instead of a whole number that Hydra took for a fraction, such as 16e3."""
    with suppress(ValueError):
        if (number := float(text)).is_integer() and abs(number) < 2**53:
            return f"; write {number:.0f}"
    return ""


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


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with single settings changed. Raises `UserError`."""
    if not overrides:
        return config
    container = to_container(config)
    with hydra_session():
        for override in parse_overrides(overrides):
            key = override.key_or_group
            if override.is_sweep_override() or key not in leaf_keys():
                raise UserError(f"'{override.input_line}': one setting and one value are changed at a time: KEY=VALUE")
            section, *rest = key.split(".")
            place = container
            while rest:
                place, (section, *rest) = place[section], rest
            place[section] = override.value()
    try:
        changed = from_container(container)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    refuse_secrets([changed])
    return changed
