"""What everything in training needs to know of the process that it runs in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from harness.ops import Ops
from harness.parallel import Shards, Solo
from harness.process.signals import StopFlag


class Runtime(NamedTuple):
    device: torch.device
    shards: Shards
    """This process among the ranks of the mesh."""
    ops: Ops
    """The kernels."""
    stop: StopFlag
    """Set when somebody asks the process to save and stop."""


def alone(device: torch.device, ops: Ops) -> Runtime:
    """One process that nobody asks to stop."""
    return Runtime(device, Solo(), ops, StopFlag())
