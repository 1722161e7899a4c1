"""What harness.ops uses of Triton, which has no types of its own."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from triton.runtime.jit import JITFunction

__version__: str
P = ParamSpec("P")
R = TypeVar("R")

def jit(function: Callable[P, R]) -> JITFunction[P, R]: ...
