"""`python -m harness.launch OVERRIDES…`: a grid of runs, from Hydra overrides or a study file to results.

Exit codes: 0 every cell done, 1 a cell failed or diverged, 2 a wrong request, 75 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.config import Config, to_container
from harness.cost.estimate import Estimates, estimate
from harness.cost.limits import cut_into_jobs
from harness.cost.planfile import record_plan
from harness.cost.table import plan_text
from harness.errors import FAILED, INTERRUPTED, WRONG_REQUEST, UserError
from harness.files import write_json_atomic
from harness.grid import cells as grid
from harness.grid import compose
from harness.grid.study import Study, load_study, study_candidates, study_names
from harness.places import joined
from harness.record.provenance import command_line, now
from harness.record.rundir import FINAL
from harness.record.state import state_of
from harness.sweep import pack
from harness.sweep import runs as plan
from harness.terminal import say


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    overrides: Sequence[str] = ()
    study: Study | None = None
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Cells with other values at these keys are left out."""

    def about(self) -> dict[str, Any]:
        """What a study says of itself, and what was asked for: enough to ask for more of the same."""
        asked = {"study": "" if self.study is None else self.study.source, "overrides": list(self.overrides)}
        if self.study is None:
            return asked
        return asked | {key: getattr(self.study, key) for key in ("name", "question", "title", "law")}


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    sweep_dirs: tuple[Path, ...]
    """Where the runs are, one directory per `sweep=`."""
    submitted: bool = False
    """Whether the runs are left to a cluster, so that there may be nothing to report yet."""


def cells_of(request: Request) -> list[grid.Cell]:
    """Expand and check a request; `train.precision` is resolved. Raises `UserError`."""
    with compose.hydra_session():
        if request.study is not None:
            candidates = study_candidates(request.study, request.overrides)
        else:
            candidates = grid.expand(request.overrides)
        candidates = grid.keep_only(candidates, request.only)
        if not candidates:
            raise UserError("no cell is left: the overrides and the study's own filters exclude every combination")
        cells = grid.build_cells(candidates)
    refuse_what_is_not_here(cells)
    if len({cell.config.cluster.name for cell in cells}) > 1:
        raise UserError("one launch runs here or is submitted, not both; write cluster=local or cluster=slurm")
    return [grid.Cell(cell.label, plan.resolve_precision(cell.config)) for cell in cells]


def refuse_what_is_not_here(cells: Sequence[grid.Cell]) -> None:
    """Raises `UserError` for cells that need a device or kernels that this machine does not have."""
    local = [cell.config for cell in cells if cell.config.cluster.name == "local"]
    wanted = {(config.ops, config.train.device) for config in local} - {("auto", "auto"), ("auto", "cpu")}
    for name, device in wanted:
        from harness.ops import choose_ops
        from harness.training.run import pick_device

        try:
            found = pick_device(device)
            if name != "auto":
                choose_ops(name, found)
        except ValueError as error:
            raise UserError(str(error)) from None


def prepare(request: Request, *, dry_run: bool) -> list[plan.Run]:
    """Cells, stores and names of a request, cheap runs first. Raises `UserError`; writes nothing."""
    cells = cells_of(request)
    if narrow := grid.narrow_cells(cells):
        shown = "; ".join(narrow[:5]) + (f" and {len(narrow) - 5} more" if len(narrow) > 5 else "")
        say(f"warning: {len(narrow)} of {len(cells)} cells have k > n/(4·experts), few latents to choose from: {shown}")
    stores = plan.find_stores([cell.config.activations for cell in cells], tolerant=dry_run)
    for store in stores.values():
        if store.id == plan.UNRESOLVED:
            say(f"note: the activation store is unresolved here, names and states are provisional: {store.problem}")
    runs = plan.make_runs(cells, stores)
    if len(runs) < len(cells):
        say(f"{len(cells) - len(runs)} of {len(cells)} cells ask for the same run as another one")
    return runs


def launch(request: Request, *, dry_run: bool = False, wait: bool = False) -> Outcome:
    """Do what `request` asks; with `dry_run` only show it. Raises `UserError` for a wrong request.

    On a cluster the runs are submitted; with `wait` it returns when they have ended.

    Ctrl-C counts as an interruption from the start, also while libraries load and stores are looked for.
    """
    try:
        if joined.step_ranks() > 1 and not dry_run:
            return _join(request)
        return carry_out(prepare(request, dry_run=dry_run), request.about(), dry_run=dry_run, wait=wait)
    except KeyboardInterrupt:
        say("interrupted before anything was trained; the same command begins again")
        return Outcome(INTERRUPTED, ())


def _join(request: Request) -> Outcome:
    """As one of the ranks of an `srun` step."""
    configs = [cell.config for cell in cells_of(request)]
    sweep_dirs = tuple(dict.fromkeys(Path(config.out) / config.sweep for config in configs))
    out = Path(configs[0].out)
    if joined.step_rank() != 0:
        return Outcome(joined.follow(out), sweep_dirs)
    runs: list[plan.Run] = []

    def planned() -> list[pack.Job]:
        runs.extend(prepare(request, dry_run=False))
        estimates = estimate(runs)
        _record(request.about(), runs, estimates)
        return cut_into_jobs([run for run in runs if run.status not in FINAL], estimates)

    def all_done() -> bool:
        statuses = [state_of(run.run_dir).status for run in runs]
        say(f"{statuses.count('done')} of {len(runs)} cells done")
        return statuses.count("done") == len(runs)

    return Outcome(joined.lead(out, planned, all_done), sweep_dirs)


def carry_out(runs: list[plan.Run], about: Mapping[str, Any], *, dry_run: bool, wait: bool) -> Outcome:
    """Train runs that have their names, here or on a cluster; `about` describes the sweep, empty for a known one."""
    sweep_dirs = sweep_dirs_of(runs)
    estimates = estimate(runs)
    if dry_run:
        jobs = cut_into_jobs([run for run in runs if run.status not in FINAL], estimates)
        print(plan_text(runs, jobs, estimates))
        return Outcome(0, sweep_dirs)
    _record(about, runs, estimates)
    if runs[0].config.cluster.name == "slurm":
        return _submit(runs, estimates, wait)
    jobs = cut_into_jobs([run for run in runs if run.status not in FINAL], estimates)
    ended = [run for run in runs if run.status in FINAL]
    from harness.places.local import run_jobs

    return Outcome(run_jobs(jobs, ended), sweep_dirs)


def _submit(runs: list[plan.Run], estimates: Estimates, wait: bool) -> Outcome:
    """Hand the runs to Slurm; with `wait`, come back when the queue is empty and judge what became of them."""
    from harness.places.slurm.submit import submit_runs, wait_for

    jobs, sweep_dirs = submit_runs(runs, estimates), sweep_dirs_of(runs)
    for directory in sweep_dirs if jobs else ():
        say(f"submitted; what becomes of it: python -m harness.status {directory} --watch")
    if not wait:
        return Outcome(0, sweep_dirs, submitted=True)
    statuses = wait_for(runs).values()
    done = sum(status == "done" for status in statuses)
    say(f"{done} of {len(runs)} cells done")
    return Outcome(0 if done == len(runs) else FAILED, sweep_dirs)


def sweep_dirs_of(runs: Sequence[plan.Run]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(run.run_dir.parent for run in runs))


def _record(about: Mapping[str, Any], runs: Sequence[plan.Run], estimates: Estimates) -> None:
    """What was asked and what it is expected to cost, in every sweep's directory."""
    for directory in sweep_dirs_of(runs):
        make_writable(directory)
        own = [run for run in runs if run.run_dir.parent == directory]
        write_study(directory, about, own)
        record_plan(directory, own, estimates)


def make_writable(directory: Path) -> None:
    """Make `directory` and be sure that files can be written there. Raises `UserError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another out=DIR") from error


def write_study(sweep_dir: Path, about: Mapping[str, Any], runs: Sequence[plan.Run]) -> None:
    """`study.json` of a sweep: what is asked, and every run that was ever asked for in this directory."""
    path = sweep_dir / "study.json"
    earlier: dict[str, Any] = {"runs": []}
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            list(earlier["runs"])
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run the same command again") from error
    unnamed = {"name": sweep_dir.name, "question": "", "title": sweep_dir.name, "law": "sae_nk"}
    unnamed |= {"study": "", "overrides": []}
    known = {key: earlier.get(key, value) for key, value in unnamed.items()} | dict(about)
    names = list(dict.fromkeys([*earlier["runs"], *(run.run_id for run in runs)]))
    write_json_atomic(path, {**known, "command": command_line(), "time": now(), "runs": names})


def parse_only(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=A,B` filters of the command line, values read as YAML scalars."""
    only: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--only {text}: write KEY=VALUE or KEY=A,B")
        only[key] = [yaml.safe_load(value) for value in values.split(",")]
    return only


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m harness.launch",
        description="Train a grid of sparse autoencoders; what is done already is not trained again.",
        epilog="Exit codes: 0 every cell done, 1 one failed or diverged, 2 wrong request, 75 interrupted (resumable).",
        allow_abbrev=False,
    )
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="Hydra overrides; KEY=A,B sweeps, e.g. sae=topk,switch sae.n_latents=2048,4096 sae.k=16 sweep=mine",
    )
    result.add_argument("--study", metavar="NAME|FILE", help=f"a study file: {', '.join(study_names())}, or a path")
    result.add_argument(
        "--only", action="append", default=[], metavar="KEY=A,B", help="keep only cells with these values"
    )
    result.add_argument("--dry-run", action="store_true", help="show cells, costs and what is done; write nothing")
    result.add_argument("--wait", action="store_true", help="with cluster=slurm: return when all runs have ended")
    result.add_argument(
        "--cfg", choices=["job", "hydra", "all"], help="print the composed configuration of the first cell and leave"
    )
    result.add_argument(
        "--info", nargs="?", const="all", metavar="WHAT", help="print configuration groups, their options and studies"
    )
    result.add_argument("-m", "--multirun", action="store_true", help="accepted from habit; sweeps need no flag here")
    result.add_argument("--traceback", action="store_true", help="show the traceback of a wrong request")
    return result


def print_info() -> None:
    print(f"configuration directory: {compose.CONF_DIR}")
    for name, options in compose.groups().items():
        print(f"{name}: {', '.join(options)}")
    print(f"studies: {', '.join(study_names())}")


def print_config(config: Config) -> None:
    print(yaml.safe_dump(to_container(config), sort_keys=False), end="")


def run(arguments: argparse.Namespace) -> int:
    if arguments.info:
        print_info()
        return 0
    study = load_study(arguments.study) if arguments.study else None
    request = Request(arguments.overrides, study, parse_only(arguments.only))
    if arguments.cfg:
        print_config(cells_of(request)[0].config)
        return 0
    return launch(request, dry_run=arguments.dry_run, wait=arguments.wait).exit_code


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        if arguments.traceback:
            raise
        say(f"error: {error}")
    except OSError as error:
        if arguments.traceback or error.filename is None:
            raise
        say(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
    return WRONG_REQUEST


if __name__ == "__main__":
    sys.exit(main())
