"""The directory of a run, `<out>/<sweep>/<run_id>/`: its frozen configuration, its attempts and their logs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from harness.activations.store.paths import shares_forwards
from harness.config import ActivationsConfig, Config, from_container, run_id, science, to_container
from harness.errors import UserError
from harness.files import write_json_atomic, write_text_atomic
from harness.record import names
from harness.schema import TEXT, fields, list_of, read_json, read_text, whole

RUN_ID = re.compile(r".+-s\d+-[0-9a-f]{10}")
"""A directory with such a name must hold the run of this name. Under another name anybody may keep a copy of a run."""

STEP = re.compile(r"step-(\d{1,18})")
"""Name of the directory of a checkpoint."""

_OTHER_HOOKS = list_of(fields({"layer": whole(), "hook": TEXT, "store": TEXT}))


def run_directory(config: Config, run_id: str) -> Path:
    return Path(config.out) / config.sweep / run_id


def require_own(path: Path, run_dir: Path, owner: str) -> None:
    """Raises `UserError` if `path`, a file in `run_dir`, tells of another run than the directory's name says."""
    if owner != run_dir.name and RUN_ID.fullmatch(run_dir.name):
        raise UserError(
            f"{path} belongs to run {owner}, not to the run {run_dir.name} in whose directory it is; "
            "it was edited or moved here: put the right one back, or move the directory away and train the run again"
        )


def read_config(run_dir: Path) -> Config:
    """The frozen configuration of a run. Raises `UserError` when it is missing, not one, or that of another run."""
    path = run_dir / names.CONFIG
    try:
        config = from_container(yaml.safe_load(read_text(path)))
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml") from None
    except UserError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not the configuration of a run: {' '.join(str(error).split())}") from error
    store = config.activations.store
    if store and config.train.precision != "auto":  # else it was not frozen by a launch and has no name yet
        require_own(path, run_dir, run_id(config, store))
    return config


def freeze_other_hooks(directory: Path, config: Config, others: Iterable[Config]) -> None:
    """Write beside the frozen `config` at which other hooks the same pass of the language model is to harvest: those of
    `others` that differ only in them."""
    found = {other.activations.store: other.activations for other in others}
    points = [
        {"layer": each.layer, "hook": each.hook, "store": each.store}
        for each in found.values()
        if shares_forwards(config.activations, each)
    ]
    write_json_atomic(directory / names.OTHER_HOOKS, points)


def other_hooks(directory: Path, config: Config) -> list[ActivationsConfig]:
    """What `freeze_other_hooks` wrote into `directory` beside `config`; empty if nothing was.

    Raises `UserError` for a damaged file.
    """
    path = directory / names.OTHER_HOOKS
    if not path.is_file():
        return []
    points = read_json(path, _OTHER_HOOKS, f"delete {path}: each store is then harvested by itself")
    return [dataclasses.replace(config.activations, **point) for point in points]


def freeze(run_dir: Path, config: Config) -> None:
    """Write the complete configuration into `run_dir`, which is made if missing.

    If the directory holds a configuration already, all scientific settings must agree with it, else `UserError` is
    raised. Other settings, such as the tracker or the number of threads, may change between starts and are rewritten.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / names.CONFIG
    if path.exists():
        frozen = read_config(run_dir)
        if frozen == config:
            return
        before, now = science(frozen), science(config)
        # the name of the run contains the id of its store; several settings may mean the same store
        before.pop("activations", None)
        now.pop("activations", None)
        if different := list(_differences(before, now)):
            raise UserError(
                f"{run_dir} holds a run of another configuration ({', '.join(different)} differ); "
                "choose another sweep= or out=, or move that directory away"
            )
    write_text_atomic(path, yaml.safe_dump(to_container(config), sort_keys=False))


def _differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*left, *right}):
        a, b = left.get(name), right.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}"


def claim_path(run_dir: Path) -> Path:
    """The lock of the process that works on the run."""
    return run_dir / names.CLAIM


def attempts(run_dir: Path) -> int:
    """How many times the run was started."""
    folder = run_dir / names.ATTEMPTS
    if not folder.is_dir():
        return 0
    return max((int(path.name) for path in folder.iterdir() if re.fullmatch(r"[0-9]{1,9}", path.name)), default=0)


def saved_step(home: Path) -> int | None:
    """Step of the newest checkpoint of a run or a pack; None before the first."""
    found = (STEP.fullmatch(path.name) for path in (home / names.CHECKPOINTS).glob("step-*"))
    return max((int(step[1]) for step in found if step), default=None)
