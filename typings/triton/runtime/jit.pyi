from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

class JITFunction(Generic[P, R]):
    fn: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """From inside another kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """From the host: how to launch `grid` programs."""

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any: ...
