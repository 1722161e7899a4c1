"""What harness.ops uses of Numba, which has no types of its own."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

def njit(**options: Any) -> Callable[[F], F]: ...
