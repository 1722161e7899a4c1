"""A process that is one rank of a job: its place among the others, its log lines, its exit code."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping

from harness.errors import FAILED, INTERRUPTED, WRONG_REQUEST, UserError
from harness.parallel.mesh import Ranks
from harness.process.claim import Claimed
from harness.process.signals import Interrupted, StopFlag
from harness.process.slurm_task import number, slurm_task
from harness.terminal import say

SILENT_S = 4.0
"""Ranks that start this far apart are no news."""


def ranks_from_environment(environment: Mapping[str, str] | None = None) -> Ranks:
    """RANK, WORLD_SIZE and LOCAL_RANK (torchrun, our launcher), else the task of an `srun` step, else one process.

    In an `srun` step without MASTER_ADDR, the step decides where its ranks meet. In a step of several tasks, RANK
    counts only under torchrun: otherwise somebody has left it behind, the same for all tasks. Raises `UserError` for
    variables that are no numbers.
    """
    env = os.environ if environment is None else environment
    task = slurm_task(env)
    step = task if task is not None and task.step_id else None
    meeting_point = step.meeting_point() if step is not None and "MASTER_ADDR" not in env else None
    left_behind = step is not None and step.step_tasks > 1 and "TORCHELASTIC_RUN_ID" not in env
    if "RANK" in env and "WORLD_SIZE" in env and not left_behind:
        rank, world = number(env, "RANK", 0), number(env, "WORLD_SIZE", 1)
        if rank >= world:
            raise UserError(
                f"RANK={rank} is no rank of WORLD_SIZE={world}; unset both, or start the ranks with torchrun"
            )
        return Ranks(rank, world, number(env, "LOCAL_RANK", 0), meeting_point)
    if step is not None:
        return Ranks(step.rank, step.step_tasks, step.local_rank, meeting_point)
    return Ranks(0, 1, 0)


def wait_for_ranks(stop: StopFlag) -> Callable[[str], None]:
    """What a rank does while others are missing: it says so once, after `SILENT_S`; a stop raises `Interrupted`."""
    begun, said = time.monotonic(), False
    task = slurm_task()
    of = f" of step {task.job_id}.{task.step_id}" if task is not None and task.step_id else ""

    def wait(what: str) -> None:
        nonlocal said
        if stop.requested:
            raise Interrupted
        if not said and time.monotonic() - begun > SILENT_S:
            say(f"waiting for {what}{of}")
            said = True

    return wait


def run_as_rank(work: Callable[[], None], *, saved_is_success: bool) -> int:
    """Do the work and return the exit code: 0 done, 1 failed, 2 a wrong request, 75 stopped and saved (0 if asked)."""
    try:
        rank = ranks_from_environment().rank
    except UserError as error:
        say(f"error: {error}")
        return WRONG_REQUEST
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"rank {rank}: %(message)s")
    try:
        work()
    except Interrupted:
        return 0 if saved_is_success else INTERRUPTED
    except (UserError, Claimed) as error:
        say(f"error: {error}")
        return WRONG_REQUEST
    except Exception:
        logging.exception("failed")
        return FAILED
    return 0
