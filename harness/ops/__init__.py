"""Local kernels behind one interface, chosen by device."""

from __future__ import annotations

import importlib.util
import os

import torch

from harness.ops.interface import AdamState, Codes, Groups, Hyper, Nesting, Ops, Reduce, is_whole, per_entry

__all__ = ["AdamState", "Codes", "Groups", "Hyper", "Nesting", "Ops", "Reduce", "choose_ops", "is_whole", "per_entry"]


def choose_ops(name: str, device: torch.device | None = None) -> Ops:
    """The kernel set called `name`; `auto` is the fastest exact one for this device (default: the CPU). Raises
    `ValueError` if the set does not run on this device.

    Kernel sets are imported here and not at the top, since their compilers are slow to load.
    """
    on_cpu = device is None or device.type == "cpu"
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "cpu" if on_cpu else "triton" if has_triton else "reference"
    if name == "cpu":
        if not on_cpu:
            raise ValueError(f"ops=cpu does not run on {device}; leave ops at auto, or set train.device=cpu")
        from harness.ops import cpu

        return cpu
    if name == "triton":
        if on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("ops=triton needs a GPU and this is a CPU; leave ops at auto, or set ops=reference")
        if not has_triton:
            raise ValueError("ops=triton needs the package triton, which is not installed; pip install triton")
        from harness.ops import triton

        return triton
    from harness.ops import reference

    return reference
