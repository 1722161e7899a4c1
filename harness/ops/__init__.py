"""Local kernels behind one interface, chosen by device."""

from __future__ import annotations

import torch

from harness.ops.interface import AdamState, Codes, Groups, Hyper, Ops, Reduce

__all__ = ["AdamState", "Codes", "Groups", "Hyper", "Ops", "Reduce", "choose_ops"]


def choose_ops(name: str, device: torch.device | None = None) -> Ops:
    """The kernel set called `name`; `auto` takes the fastest that is exact on this device (default: the CPU).

    Kernel sets are imported when asked for: their compilers are slow to load.
    """
    on_cpu = device is None or device.type == "cpu"
    if name == "cpu" or (name == "auto" and on_cpu):
        if not on_cpu:
            raise ValueError(f"ops=cpu does not run on {device}; leave ops at auto, or set train.device=cpu")
        from harness.ops import cpu

        return cpu
    from harness.ops import reference

    return reference
