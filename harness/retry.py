"""`python -m harness.retry runs/<sweep> [RUN_ID…] [KEY=VALUE…]`: train failed runs again, diverged ones with a change.

Failed runs go on from what they saved. A run is a function of its configuration, so a diverged one needs a changed
setting, e.g. `train.lr_factor=2`; that makes another run in its own directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from harness.config import Config
from harness.errors import WRONG_REQUEST, UserError
from harness.grid.cells import Cell
from harness.grid.compose import with_overrides
from harness.record import names
from harness.record.rundir import read_config
from harness.record.state import state_of
from harness.record.sweepdir import require_sweep
from harness.sweep.execute import carry_out
from harness.sweep.runs import find_stores, make_runs, with_own_rows
from harness.terminal import Parser, path_argument, run_command, say


def cells_to_retry(sweep_dir: Path, run_ids: Sequence[str], overrides: Sequence[str]) -> list[Cell]:
    """The failed runs of a sweep (with overrides the diverged ones too), or those named, with `overrides` applied.

    Raises `UserError`.
    """
    require_sweep(sweep_dir)
    chosen = list(run_ids) or sorted(path.parent.name for path in sweep_dir.glob(f"*/{names.RESULT}"))
    wanted = ("failed", "diverged") if overrides else ("failed",)
    cells = []
    for name in chosen:
        if not (sweep_dir / name / names.CONFIG).is_file():
            raise UserError(f"{sweep_dir} has no run {name}; python -m harness.status {sweep_dir} lists them")
        status = state_of(sweep_dir / name).status
        if status in wanted:
            here = dataclasses.replace(read_config(sweep_dir / name), out=str(sweep_dir.parent), sweep=sweep_dir.name)
            cells.append(Cell(name, _changed(here, overrides)))
        elif run_ids:
            hint = "; change a setting, e.g. train.lr_factor=2" if status == "diverged" else ""
            raise UserError(f"{name} is {status}, and only failed or diverged runs are tried again{hint}")
    if not cells:
        raise UserError(f"no run of {sweep_dir} is {' or '.join(wanted)}")
    return cells


def _changed(config: Config, overrides: Sequence[str]) -> Config:
    if any(override.startswith("activations.") for override in overrides):
        # the frozen store is that of the old settings
        config = dataclasses.replace(config, activations=dataclasses.replace(config.activations, store=""))
    try:
        return with_overrides(config, overrides)
    except UserError as error:
        raise UserError(f"cannot apply {' '.join(overrides)}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m harness.retry", description="Train failed runs again, or diverged ones with another setting."
    )
    parser.add_argument("sweep_dir", type=path_argument, metavar="runs/SWEEP")
    parser.add_argument("what", nargs="*", metavar="RUN_ID | KEY=VALUE", help="which runs, and what to change")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained")
    parser.add_argument("--wait", action="store_true", help="with cluster=slurm: return when all runs have ended")
    arguments = parser.parse_args(argv)
    overrides = [word for word in arguments.what if "=" in word]
    run_ids = [word for word in arguments.what if "=" not in word]
    try:
        cells = cells_to_retry(arguments.sweep_dir, run_ids, overrides)
        cells = with_own_rows(cells)
        stores = find_stores([cell.config.activations for cell in cells], tolerant=False)
        runs = make_runs(cells, stores)
        return carry_out(runs, {}, dry_run=arguments.dry_run, wait=arguments.wait).exit_code
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST


if __name__ == "__main__":
    run_command(main)
