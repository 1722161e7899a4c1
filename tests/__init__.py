"""The tests. Importing them turns shape annotations into checks, before any module of the harness is imported.

Every annotated argument and result of the modules below is checked against its shape and dtype (jaxtyping, beartype).
Kernels are left out: they are compiled, not called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

F = TypeVar("F", bound=Callable[..., Any])

ROOT = Path(__file__).resolve().parents[1]


def checked_modules() -> list[str]:
    """Names of the modules that state shapes. A package's own name would include its kernels."""
    paths = sorted((ROOT / "harness").rglob("*.py"))
    called = [path for path in paths if path.stem != "__init__" and not path.stem.endswith("_kernels")]
    stating = [path for path in called if "from jaxtyping import" in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in stating]


def check(function: F) -> F:
    """The function with its types checked at every call. An int passes for a float, as it does for a static checker.

    Functions inside functions stay as they are: they would be decorated at every call of the outer one.
    """
    if "<locals>" in function.__qualname__:
        return function
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


install_import_hook(checked_modules(), "tests.check")
