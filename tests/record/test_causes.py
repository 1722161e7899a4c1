"""What an error of a library means to the person who reads it."""

import errno
import os

import pytest

from harness.record.causes import cause_of
from harness.record.result import describe


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "what", "advice"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
            "GPU is out of memory",
            "train.batch_tokens",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory", "sae.n_latents"),
        (MemoryError(), "out of memory", "mesh.shard"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory", "mesh.shard"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space is left", "free some"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "no space is left", "out="),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many open files", "ulimit"),
        (RuntimeError("rank 1 was killed by SIGKILL; its log is x"), "memory ran out", "dmesg"),
        (RuntimeError("rank 1 was killed by SIGSEGV; its log is x"), "crashed (SIGSEGV)", "ops=reference"),
        (RuntimeError("rank 1 was killed by SIGBUS; its log is x"), "became shorter", "disk"),
        (RuntimeError("rank 1 was killed by SIGTERM; its log is x"), "from outside (SIGTERM)", ""),
        (RuntimeError("CUDA error: an illegal memory access"), "(an illegal memory access)", "nvidia-smi"),
        (RuntimeError("the device\nis on fire"), "RuntimeError: the device is on fire", ""),
    ],
)
def test_a_cause_and_what_to_do(error: Exception, what: str, advice: str) -> None:
    cause = cause_of(describe(error))
    assert what in cause.what
    assert advice in cause.advice and bool(advice) == bool(cause.advice)
