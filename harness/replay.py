"""`python -m harness.replay RUN_DIR…`: copy finished records to a tracker, from their own files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.files import user_path
from harness.grid.compose import with_overrides
from harness.mirror import copies, messages
from harness.mirror.wandb_settings import with_environment
from harness.record import names
from harness.record.result import read_result
from harness.record.rundir import read_config
from harness.terminal import Parser, run_command, say


def replay(run_dir: Path, tracker: str = "", overrides: Sequence[str] = ()) -> str:
    """Copy the record of `run_dir` to `tracker` (default: the run's own, or W&B if it has none). `overrides` change
    settings of the tracker for this copy, e.g. `tracker.project=mine`.

    Lines that the copy holds already are not sent again. Returns how to look at the copy or send it on; may be empty.
    Raises `UserError` if the directory is not a run or a package is missing, and what the tracker's package raises.
    """
    run_dir = run_dir.resolve()
    config = read_config(run_dir)
    own = config.tracker.name
    config.tracker = dataclasses.replace(config.tracker, name=tracker or ("wandb" if own == "none" else own))
    config = with_overrides(config, overrides)
    config.tracker = with_environment(config.tracker)
    copies.check(config.tracker)
    try:
        lines = copies.Tail(run_dir / names.METRICS).read()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{run_dir / names.METRICS} is damaged ({error}); the record cannot be read") from error
    result = read_result(run_dir) or {}
    with contextlib.redirect_stdout(None):  # trackio prints
        copy = copies.open_copy(run_dir, config, live=False)
        copies.send(copy, lines)
        copies.finish(copy, result)
    return copy.note


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.replay", description=__doc__)
    parser.add_argument("what", nargs="+", metavar="RUN_DIR | KEY=VALUE", help="runs, and settings of the tracker")
    parser.add_argument("--tracker", choices=list(copies.TITLES), default="", help="default: the run's own, or wandb")
    arguments = parser.parse_args(argv)
    overrides = [word for word in arguments.what if word.startswith("tracker.")]
    for run_dir in [word for word in arguments.what if word not in overrides]:
        try:
            note = replay(Path(user_path(run_dir)), arguments.tracker, overrides)
        except UserError as error:
            say(f"error: {error}")
            return 2
        except Exception as error:  # which ones, the tracker's package decides
            text = messages.in_one_line(error)
            say(f"error: the tracker did not take {run_dir}: {text}; try again later, or with tracker.KEY=VALUE")
            return 1
        print(f"{Path(run_dir).name}: sent" + (f" ({note})" if note else ""))
    return 0


if __name__ == "__main__":
    run_command(main)
