"""`python -m harness.bench.memory --study NAME`: the planned memory of a rank beside what the real code takes.

For GPUs (`--device gpu`, as on a cluster of them) `bench.allocated` counts what the code allocates at real sizes,
without a GPU and without numbers. Architectures that choose by a threshold are left out: how much they hold depends on
the numbers. With `--device cpu` the code computes on random rows, each cell in a process of its own whose resident
memory `bench.resident` reads; cells of several ranks are left out.

Exit codes: 0 if plan and peak agree within a tenth for every cell, else 1.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence

from harness.bench.allocated import allocated
from harness.bench.resident import resident
from harness.cell_names import cell_names
from harness.config import to_container
from harness.errors import FAILED, WRONG_REQUEST, UserError
from harness.grid.study import load_study
from harness.record.run import Run
from harness.sweep.request import Request, plan_runs, requested_cells
from harness.terminal import Parser, run_command, say, si, table

TOLERANCE = 0.1


def shapes(runs: Sequence[Run], device: str) -> list[Run]:
    """Runs that differ in what decides their memory, of those whose memory can be found out."""
    found: dict[str, Run] = {}
    for run in runs:
        config = run.config
        known = config.mesh.ranks == 1 if device == "cpu" else config.sae.traits.per_token
        if not (known and run.store.d_model):
            continue
        train = config.train
        seeds = {"seed": 0, "mfr_seeds": list(range(len(train.mfr_seeds)))}
        train = dataclasses.replace(train, **seeds, lr=0.0, lr_factor=1.0, warmup_tokens=0.0)
        found.setdefault(repr((config.sae, train, config.mesh)), run)
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.bench.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--study", default="", metavar="NAME|FILE")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return _compare(arguments.study, arguments.overrides, arguments.device)
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST


def _compare(name: str, overrides: Sequence[str], device: str) -> int:
    """Print the table. Raises `UserError`."""
    if device == "gpu" and importlib.util.find_spec("triton") is None:
        raise UserError("the kernels of a GPU need the package triton; pip install triton")
    study = load_study(name) if name else None
    place = ["cluster=slurm", "cluster.gpu_type=h100"] if device == "gpu" else ["cluster=local", "train.device=cpu"]
    runs = shapes(plan_runs(requested_cells(Request([*overrides, *place], study)), dry_run=True), device)
    if not runs:
        raise UserError(f"the memory of none of these cells can be found out with --device {device}")
    headings, rows, apart = list[str](), [], 0
    for cell, run in zip(cell_names([to_container(run.config) for run in runs]), runs, strict=True):
        found = allocated(run) if device == "gpu" else resident(run)
        parts = [f"{si(size)}B" for size in found.phases.values()]
        mesh = f"{run.config.mesh.dp} × {run.config.mesh.shard}"
        ratio = found.planned / found.peak
        apart += abs(ratio - 1) > TOLERANCE
        rows.append([cell, mesh, *parts, f"{si(found.planned)}B", f"{ratio:.2f}"])
        headings = ["cell", "mesh", *found.phases, "planned", "planned / taken"]
        say(f"{cell}: planned {si(found.planned)}B, taken {si(found.peak)}B")
    print(table(headings, rows))
    return FAILED if apart else 0


if __name__ == "__main__":
    run_command(main)
