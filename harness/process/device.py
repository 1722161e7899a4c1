"""Which device: every answer to that question."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness.config import Config

if TYPE_CHECKING:  # a plan asks these questions for ten thousand cells and need not load torch
    import torch


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `train.device=name` means in this process: `auto` is the GPU if there is one.

    With several GPUs it is the one of rank `local_rank` of this node; without a rank, the current one. Raises
    `ValueError` for `cuda` without a GPU.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU here; leave it at auto, or check the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    # a workspace of fixed size: cuBLAS then gives the same bits in every stream, in and out of a CUDA graph
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    index = torch.cuda.current_device() if local_rank is None else local_rank % torch.cuda.device_count()
    return torch.device(name, index)


def trains_on_gpu(config: Config) -> bool:
    """Whether a run will train on a GPU: on a cluster if its job asks for one, on this machine if there is one."""
    if config.train.device == "cpu":
        return False
    if config.cluster.name == "slurm":
        return config.cluster.gpus_per_task > 0
    import torch

    return torch.cuda.is_available()


def planned_on_gpu(config: Config) -> bool:
    """The same for a plan, which may also be made for a GPU that `cluster.gpu_type` names."""
    return config.train.device != "cpu" and (bool(config.cluster.gpu_type) or trains_on_gpu(config))
