"""The shapes to measure: named ones, and free ones as DxNxKxB or DxNxKxBxE."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.errors import UserError


@dataclass(frozen=True)
class Shape:
    """One SAE and one batch; more than one expert makes it a Switch SAE."""

    name: str
    d: int
    n: int
    k: int
    batch: int
    experts: int = 1


_NAMED = [
    Shape("C1", 384, 1024, 16, 2048),
    Shape("C2", 384, 4096, 32, 4096),
    Shape("C3", 384, 8192, 32, 8192),
    Shape("C3-E8", 384, 8192, 32, 8192, 8),
    Shape("S1", 768, 32768, 32, 8192),
    Shape("S1-65536", 768, 32768, 32, 65536),
    Shape("S1-131072", 768, 32768, 32, 131072),
    Shape("S2", 4096, 131072, 64, 16384),
    *(Shape(f"S3-E{e}", 768, 32768, 32, 8192, e) for e in (8, 32, 64, 128)),
    *(Shape(f"S3-131072-E{e}", 768, 32768, 32, 131072, e) for e in (8, 32, 64, 128)),
    Shape("S4", 768, 4096, 32, 8192),
    *(Shape(f"S5-{n}-{k}", 768, n, k, 8192) for n in (4096, 8192, 16384, 32768) for k in (16, 32, 64)),
    Shape("S6", 1024, 1 << 20, 128, 8192),
    # one of eight GPUs of an SAE with 1,032,192 latents
    Shape("S7", 2688, 129024, 32, 4096),
]
SHAPES = {shape.name: shape for shape in _NAMED}
FAMILIES = ("S3", "S5")
"""Names that stand for several shapes."""


def parse_shapes(text: str) -> list[Shape]:
    """Shapes from a comma-separated list of names and free shapes. Raises `UserError` for any other text."""
    shapes: list[Shape] = []
    for item in text.split(","):
        name = item.strip()
        free = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(?:x(\d+))?", name)
        if name in SHAPES:
            shapes.append(SHAPES[name])
        elif name in FAMILIES:
            shapes += [shape for shape in _NAMED if shape.name.startswith(f"{name}-")]
        elif free:
            d, n, k, batch, experts = (int(number) for number in free.groups(default="1"))
            if min(d, n, k, batch, experts) < 1 or n % experts or k > n // experts:
                raise UserError(f"shape {name}: needs positive numbers, E dividing N, and K at most N/E")
            shapes.append(Shape(name, d, n, k, batch, experts))
        else:
            raise UserError(f"unknown shape '{name}': one of {', '.join(SHAPES)}, S3, S5, or DxNxKxB, DxNxKxBxE")
    return shapes
