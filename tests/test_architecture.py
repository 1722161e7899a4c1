"""Arrows point down: who may import what. Read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = (
    # the ground
    *("harness.errors", "harness.architectures", "harness.files", "harness.config", "harness.budget", "harness.schema"),
    "harness.terminal",
    *("harness.cell_names", "harness.progress"),
    # local kernels, collectives, this process
    *("harness.ops", "harness.parallel", "harness.process"),
    # where x comes from, the run directory, the models, copies of the record
    *("harness.activations", "harness.record", "harness.saes", "harness.mirror"),
    # train, judge, ask, plan, place, and who does what
    *("harness.training", "harness.quality", "harness.grid", "harness.cost", "harness.places", "harness.sweep"),
    "harness.bench",
)
"""Each room may import itself and the rooms before it, nothing else of `harness`."""

WINGS = (
    *("analysis.notes", "analysis.format"),
    *("analysis.laws", "analysis.runs", "analysis.fits", "analysis.questions", "analysis.report"),
    *("analysis.gallery", "analysis.figures"),
)
"""The same for the analysis; its other files are commands or the package itself."""

ANALYSIS_MAY_IMPORT = (
    *("harness.errors", "harness.config", "harness.budget", "harness.files", "harness.terminal"),
    *("harness.cell_names", "harness.record.names", "harness.record.sweepdir", "harness.record.metrics"),
    *("harness.record.result", "harness.record.quality"),
)

WANDB = ("harness/mirror/", "analysis/runs/load_wandb.py")
DISTRIBUTED = ("harness/parallel/", "harness/record/checkpoint.py")
SLURM = ("harness/process/slurm_task.py", "harness/places/slurm/")


@functools.cache
def sources() -> dict[str, Path]:
    """Full name → file of every module of the project."""
    modules = {}
    for part in ("harness", "analysis", "sweeps"):
        for path in sorted((ROOT / part).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full names of the modules, or of what is taken from them, that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_modules(module: str) -> set[str]:
    """Modules of the project that a module imports; a name that is taken from a module counts as the module."""
    known = sources()
    names = (name if name in known else name.rpartition(".")[0] for name in imports(known[module]))
    return {name for name in names if name in known and name != module}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str, rooms: tuple[str, ...]) -> int | None:
    return next((place for place, room in enumerate(rooms) if within(module, room)), None)


def is_command(module: str) -> bool:
    """A file directly in `harness/` or `analysis/` that is no room of its own, or a `__main__`."""
    direct = module.count(".") == 1 and not module.startswith("sweeps.")
    return module.endswith("__main__") or (direct and room_of(module, (*ROOMS, *WINGS)) is None)


@pytest.mark.parametrize("rooms", [ROOMS, WINGS], ids=["harness", "analysis"])
def test_arrows_point_down(rooms: tuple[str, ...]) -> None:
    package = rooms[0].partition(".")[0]
    for module in sources():
        place = room_of(module, rooms)
        if place is None:
            continue
        for other in imported_modules(module):
            if within(other, package) and other != package:
                target = room_of(other, rooms)
                assert target is not None and target <= place, f"{module} imports {other}, which stands above it"


def test_every_file_is_a_command_or_has_a_room() -> None:
    for module in sources():
        top = module.partition(".")[0]
        assert module == top or top == "sweeps" or room_of(module, (*ROOMS, *WINGS)) is not None or is_command(module)


def test_nobody_imports_a_command() -> None:
    commands = {module for module in sources() if is_command(module)}
    for module in sources():
        if not module.startswith("analysis"):  # its command line is two files
            assert not imported_modules(module) & commands - {"analysis.cli"}, module


def circles() -> Iterator[list[str]]:
    """Every circle of imports between files that a depth-first walk meets."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield path[path.index(module) :]
        elif module not in done:
            for other in sorted(imported_modules(module)):
                yield from walk(other, [*path, module])
            done.add(module)

    for module in sources():
        yield from walk(module, [])


def test_no_circles_between_files() -> None:
    assert not list(circles())


@pytest.mark.parametrize(
    ("package", "allowed"), [("wandb", WANDB), ("torch.distributed", DISTRIBUTED)], ids=["wandb", "torch.distributed"]
)
def test_few_know(package: str, allowed: tuple[str, ...]) -> None:
    for path in sources().values():
        if any(within(name, package) for name in imports(path)):
            assert str(path.relative_to(ROOT)).startswith(allowed), path


def test_only_slurm_reads_slurm() -> None:
    for path in sources().values():
        if "SLURM_" in path.read_text(encoding="utf-8"):
            assert str(path.relative_to(ROOT)).startswith(SLURM), path


def test_analysis_knows_little_of_the_harness_and_no_torch() -> None:
    for module, path in sources().items():
        if within(module, "analysis"):
            theirs = {name for name in imports(path) if within(name, "harness")}
            foreign = {name for name in theirs if not any(within(name, known) for known in ANALYSIS_MAY_IMPORT)}
            assert not foreign, f"{module} imports {sorted(foreign)}"
    for module in sources():
        if within(module, "analysis") or within(module, "sweeps"):
            assert not any(within(name, "torch") for name in imports(sources()[module])), module


def test_file_names_of_a_run_directory_stand_in_one_place() -> None:
    from harness.record import names

    files = {value for name, value in vars(names).items() if name.isupper() and "." in value}
    files -= {names.WEIGHTS, names.WEIGHTS_CONFIG}  # other tools' formats use these names too
    for module, path in sources().items():
        if module == "harness.record.names" or within(module, "harness.activations"):  # a store has files of its own
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in files, f"{path}:{node.lineno} writes {node.value!r}: use harness.record.names"
