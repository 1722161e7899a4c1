"""A process that is one rank of a job: its place among the others, its log lines, its exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping

from harness.errors import FAILED, INTERRUPTED, WRONG_REQUEST, UserError
from harness.parallel.mesh import Ranks
from harness.process.claim import Claimed
from harness.process.signals import Interrupted
from harness.process.slurm_task import slurm_task
from harness.terminal import say


def ranks_from_environment(environment: Mapping[str, str] | None = None) -> Ranks:
    """RANK, WORLD_SIZE and LOCAL_RANK (torchrun, our launcher), else the task of an `srun` step, else one process.

    In an `srun` step without MASTER_ADDR, the step decides where its ranks meet.
    """
    env = os.environ if environment is None else environment
    task = slurm_task(env)
    step = task if task is not None and task.step_id else None
    meeting_point = step.meeting_point() if step is not None and "MASTER_ADDR" not in env else None
    if "RANK" in env and "WORLD_SIZE" in env:
        return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")), meeting_point)
    if step is not None:
        return Ranks(step.rank, step.step_tasks, step.local_rank, meeting_point)
    return Ranks(0, 1, 0)


def run_as_rank(work: Callable[[], None], *, saved_is_success: bool) -> int:
    """Do the work and return the exit code: 0 done, 1 failed, 2 a wrong request, 75 stopped and saved (0 if asked)."""
    rank = ranks_from_environment().rank
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
