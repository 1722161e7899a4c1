"""The directory of a run: `<out>/<sweep>/<run_id>/`. What is in it, and what can be read off it.

config.yaml      frozen configuration, complete and resolved
provenance.json  code, versions, machine, command
metrics.jsonl    one line per logged step and per evaluation
checkpoints/     while the run is not finished
sae/             final weights
attempts/<n>/    log.txt of the n-th start
result.json      written last: its presence means that the run has ended
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from harness.config import Config, from_container, science, to_container
from harness.errors import UserError
from harness.files import write_json_atomic, write_text_atomic
from harness.process.signals import Interrupted

FINAL = ("done", "diverged")
"""Statuses that are results. `failed` is not: a later launch tries again."""


def run_directory(config: Config, run_id: str) -> Path:
    return Path(config.out) / config.sweep / run_id


def read_config(run_dir: Path) -> Config:
    """The frozen configuration of a run. Raises `UserError` when it is missing or not one."""
    path = run_dir / "config.yaml"
    try:
        return from_container(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} is not the configuration of a run: {' '.join(str(error).split())}") from error


def freeze(run_dir: Path, config: Config) -> None:
    """Write the complete configuration into `run_dir`, which is made when missing.

    A directory that already holds a configuration must agree with it in every scientific setting (else `UserError`);
    the others, such as the tracker or the number of threads, may differ from one start to the next and are rewritten.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    if path.exists():
        frozen = read_config(run_dir)
        if frozen == config:
            return
        before, now = science(frozen), science(config)
        # The run's name contains the recipe hash of its store; the same store may be asked for in several ways.
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


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None when the run has not ended. Raises `UserError` when it is not JSON."""
    path = run_dir / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run this cell again") from error


def write_failure(run_dir: Path, config: Config, run_id: str, error: BaseException, started: str, ended: str) -> None:
    """End a run that raised: `result.json` with status `failed` and the error in one line."""
    sae = config.sae
    write_json_atomic(
        run_dir / "result.json",
        {
            "status": "failed",
            "run_id": run_id,
            "sae": sae.architecture,
            "n_latents": sae.n_latents,
            "k": sae.k,
            "n_experts": sae.n_experts,
            "seed": config.train.seed,
            "error": describe(error),
            "attempts": attempts(run_dir),
            "started": started,
            "finished": ended,
            "config": to_container(config),
        },
    )


def describe(error: BaseException) -> str:
    """An exception as one line; the log has all of it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} …"
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind


def set_failure_aside(run_dir: Path) -> None:
    """Move the `result.json` of a failed run to the attempt that wrote it, so that the run counts as unfinished."""
    path = run_dir / "result.json"
    path.replace(run_dir / "attempts" / str(max(attempts(run_dir), 1)) / "result.json")


def attempts(run_dir: Path) -> int:
    """How many times the run was started."""
    folder = run_dir / "attempts"
    if not folder.is_dir():
        return 0
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def saved_step(home: Path) -> int | None:
    """Step of the newest checkpoint of a run or a pack; None before the first."""
    return max((int(path.name.removeprefix("step-")) for path in (home / "checkpoints").glob("step-*")), default=None)


@contextmanager
def attempt_log(run_dir: Path, header: str) -> Iterator[Path]:
    """A new `attempts/<n>/log.txt` that receives all logging and warnings, and the traceback if the block raises."""
    path = run_dir / "attempts" / str(attempts(run_dir) + 1) / "log.txt"
    path.parent.mkdir(parents=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    log = logging.getLogger("harness.attempt")
    try:
        log.info(header)
        yield path
    except Interrupted:
        log.info("stopped; what is saved goes on with the next start")
        raise
    except BaseException:
        log.info("the run ended with an exception\n%s", traceback.format_exc())
        raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
