from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

def register_jitable(function: F) -> F: ...
def overload(function: Callable[..., Any], *, inline: str) -> Callable[[F], F]: ...
