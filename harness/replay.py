"""`python -m harness.replay RUN_DIR…`: send finished records to Weights & Biases, from their own files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.config import from_container
from harness.errors import UserError
from harness.mirror.wandb_mirror import WandbRun, mode
from harness.record import metrics


def replay(run_dir: Path) -> str:
    """Send the record of `run_dir` to the W&B run that belongs to it; returns the mode (online, offline).

    Lines that W&B has already are dropped by W&B. Raises `UserError` when the directory is not a run, and what wandb
    raises when sending fails.
    """
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml")
    try:
        config = from_container(yaml.safe_load(config_path.read_text(encoding="utf-8")))
        lines = metrics.read(run_dir / "metrics.jsonl")
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    result: dict[str, Any] = {}
    if (run_dir / "result.json").exists():
        result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    chosen = mode()
    run = WandbRun(run_dir.resolve(), config, chosen)
    for line in lines:
        run.log(line)
    scalars = {name: value for name, value in result.items() if isinstance(value, str | int | float | bool)}
    run.finish(scalars, 0 if result.get("status") == "done" else 1)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.replay", description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    arguments = parser.parse_args(argv)
    for run_dir in arguments.run_dirs:
        try:
            chosen = replay(run_dir)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Exception as error:  # wandb's own errors: what they are differs between its versions
            first = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"error: W&B did not take {run_dir}: {first}; try again later", file=sys.stderr)
            return 1
        hint = f" (offline; send it: wandb sync {run_dir}/wandb/offline-run-*)" if chosen == "offline" else ""
        print(f"{run_dir.name}: sent{hint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
