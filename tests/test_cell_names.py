"""What tells the cells of a sweep apart."""

import pytest

from harness.cell_names import cell_names
from harness.config import science, to_container
from harness.sweep.request import Request, requested_cells

BASE = ("sae=topk", "sae.n_latents=64", "sae.k=4", "activations=synthetic", "train.tokens=20e3")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), ["topk n=64 k=4"]),
        (("sae.n_latents=64,128", "train.seed=0,1"), ["n=64 seed=0", "n=64 seed=1", "n=128 seed=0", "n=128 seed=1"]),
        (("train.lr=1e-3,1e30",), ["lr=0.001", "lr=1e30"]),
        (("train.tokens=20e3,1e6,1234567",), ["tokens=20000", "tokens=1e6", "tokens=1234567.0"]),
        (("train.seed=0,1", "stream.seed=5"), ["seed=0", "seed=1"]),
        (("train.seed=0,1", "stream.seed=${train.seed}"), ["seed=0", "seed=1"]),
        (("train.seed=1", "stream.seed=1,2"), ["seed=1", "seed=2"]),
        (
            ("train.seed=0,1", "stream.seed=1,2"),
            [f"stream.seed={stream} train.seed={train}" for train in (0, 1) for stream in (1, 2)],
        ),
        (("sae=topk,switch", "sae.n_experts=1"), ["topk", "switch"]),
        (("sae=switch", "sae.n_experts=2,4"), ["E=2", "E=4"]),
        (("tracker=none", "train.threads=1,2"), ["topk n=64 k=4"] * 2),
    ],
)
def test_only_what_differs_is_named(overrides: tuple[str, ...], names: list[str]) -> None:
    configs = [cell.config for cell in requested_cells(Request([*BASE, *overrides]))]
    assert cell_names([to_container(config) for config in configs]) == names
    assert cell_names([science(config) for config in configs]) == names, "what is missing has its default"
