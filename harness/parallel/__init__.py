"""The mesh and the few exact collectives."""

from harness.parallel.interface import Axis, Shards
from harness.parallel.solo import Solo

__all__ = ["Axis", "Shards", "Solo"]
