"""The tests. Importing them turns shape annotations into checks, before any module of the harness is imported.

Every annotated argument and result of the modules below is checked against its shape and dtype (jaxtyping, beartype).
Kernels are left out: they are compiled, not called.
"""

from __future__ import annotations

from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

CHECKED = ("harness/ops", "harness/parallel", "harness/saes")
"""Packages whose annotations are executed."""


def checked_modules() -> list[str]:
    """Names of the modules in `CHECKED`; a package's own name would include its kernels."""
    paths = [path for package in CHECKED for path in sorted((ROOT / package).rglob("*.py"))]
    called = [path for path in paths if path.stem != "__init__" and not path.stem.endswith("_kernels")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in called]


check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Checks one function or class. An int passes for a float, as it does for a static type checker."""

install_import_hook(checked_modules(), "tests.check")
