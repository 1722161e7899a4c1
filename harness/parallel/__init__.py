"""The mesh and the few exact collectives."""

from harness.parallel.interface import Axis, Kind, Shards
from harness.parallel.solo import Solo

__all__ = ["Axis", "Kind", "Shards", "Solo"]
