"""Arrows point down: who may import what. Read from the source, so that imports inside functions count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ALLOWED = {
    "harness/config.py": set(),
    "harness/budget.py": {"harness.config"},
    "harness/ops": {"harness.ops", "harness.budget"},
    "harness/parallel": {"harness.parallel", "harness.errors"},
    "harness/saes": {"harness.saes", "harness.ops", "harness.parallel", "harness.config", "harness.budget"},
    "harness/record": {"harness.record", "harness.parallel", "harness.config", "harness.errors"},
    "harness/activations": {
        *("harness.activations", "harness.record", "harness.parallel", "harness.config", "harness.errors"),
    },
    "harness/train": {
        *("harness.train", "harness.saes", "harness.ops", "harness.parallel", "harness.activations", "harness.record"),
        *("harness.config", "harness.budget", "harness.errors"),
    },
    "harness/jobs": {
        *("harness.jobs", "harness.train", "harness.activations", "harness.record"),
        *("harness.config", "harness.budget", "harness.errors"),
    },
    "analysis": {"analysis", "harness.budget", "harness.config", "harness.errors", "harness.files"},
}
"""Part of the code → what it may import of the project."""

COMMAND = "harness/training/jobs.py"
"""Stands beside `launch` and may use everything."""

WANDB = ("harness/record/", "analysis/load_wandb.py")


def imports(path: Path) -> set[str]:
    """Full names of the modules (or of what is taken from them) that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def all_files() -> list[Path]:
    return [path for part in ("harness", "analysis", "sweeps") for path in files(part)]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_down(part: str) -> None:
    for path in set(files(part)) - {ROOT / COMMAND}:
        ours = {name for name in imports(path) if name.split(".")[0] in ("harness", "analysis", "sweeps")}
        upward = {name for name in ours if not any(within(name, module) for module in ALLOWED[part])}
        assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


def test_only_records_know_wandb() -> None:
    users = {str(p.relative_to(ROOT)) for p in all_files() if any(within(name, "wandb") for name in imports(p))}
    assert all(user.startswith(WANDB) for user in users), users


def test_ranks_are_known_to_few() -> None:
    users = {
        str(p.relative_to(ROOT)) for p in all_files() if any(within(name, "torch.distributed") for name in imports(p))
    }
    users -= {"harness/record/checkpoint.py"}  # saves through torch.distributed.checkpoint, and asks `Shards` for ranks
    # checkpoints of several ranks are written through torch.distributed.checkpoint
    assert all(user.startswith(("harness/parallel/", "harness/record/checkpoint.py")) for user in users), users


def test_analysis_needs_no_torch() -> None:
    for path in [*files("analysis"), *(ROOT / "harness" / name for name in ("budget.py", "config.py", "errors.py"))]:
        assert not any(within(name, "torch") for name in imports(path)), path
