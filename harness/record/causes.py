"""Why a run failed, in the user's terms: what the error of a library means here, and what to do about it."""

from __future__ import annotations

import re
from typing import NamedTuple


class Cause(NamedTuple):
    what: str
    """In a few words, or the error itself where nothing more is known."""
    advice: str = ""
    """What to change before the run is tried again; empty if nobody can know."""


_LESS_MEMORY = "lower train.batch_tokens or sae.n_latents, or cut the latents over ranks with mesh.shard"

_KNOWN = (
    (
        r"(rank \d+) was killed by SIGKILL",
        Cause(
            "{} was killed by SIGKILL, most likely by the system because memory ran out",
            f"`dmesg | tail` says whether memory ran out; if so, {_LESS_MEMORY}",
        ),
    ),
    (
        r"(rank \d+) was killed by (SIGSEGV|SIGILL|SIGABRT)",
        Cause("{} crashed ({})", "try ops=reference; please report the log"),
    ),
    (
        r"(rank \d+) was killed by SIGBUS",
        Cause("{} was killed by SIGBUS: a file that it had mapped became shorter", "check the disk of the store"),
    ),
    (r"(rank \d+) was killed by (\w+)", Cause("{} was killed from outside ({})")),
    (
        r"CUDA out of memory|HIP out of memory",
        Cause("the GPU is out of memory", f"{_LESS_MEMORY}, or set cluster.pack=1"),
    ),
    (
        r"MemoryError|can't allocate memory|Cannot allocate memory|OutOfMemoryError",
        Cause("out of memory", _LESS_MEMORY),
    ),
    (
        r"No space left on device|Disk quota exceeded|os error (28|122)\b",
        Cause("no space is left on the disk", "free some, or choose another out="),
    ),
    (r"Too many open files", Cause("too many open files", "raise the limit: ulimit -n 65536")),
    (
        r"CUDA error: (.{1,80}?)(?: CUDA kernel errors|$)",
        Cause("the GPU reported an error ({})", "nvidia-smi shows its state"),
    ),
    (
        r"LinAlgError",
        Cause("the activations cannot be normalised: they are constant or not finite", "check activations.*"),
    ),
)
"""Pattern of an error in one line (`result.describe`) -> what it means; `{}` stand for its groups."""


def cause_of(error: str) -> Cause:
    """What an error in one line means; itself when it is not known."""
    for pattern, cause in _KNOWN:
        if found := re.search(pattern, error):
            return cause._replace(what=cause.what.format(*found.groups()))
    return Cause(error)
