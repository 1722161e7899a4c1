"""The checks of `harness.bench.gpu` by name."""

from harness.bench.gpu.kernels import kernels
from harness.bench.gpu.speed import device, peers, selection, shapes, shard
from harness.bench.gpu.training import loop, sweep

__all__ = ["device", "kernels", "loop", "peers", "selection", "shapes", "shard", "sweep"]
