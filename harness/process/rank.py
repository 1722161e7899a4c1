"""What the programs that are one rank of a job have in common: log lines and exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from harness.errors import FAILED, INTERRUPTED, WRONG_REQUEST, UserError
from harness.parallel.mesh import ranks_from_environment
from harness.process.claim import Claimed
from harness.process.signals import Interrupted


def run_as_rank(work: Callable[[], None], *, saved_is_success: bool) -> int:
    """Do it, and return the exit code: 0 done, 1 failed, 2 a wrong request, 75 (or 0 if asked) stopped and saved."""
    rank = ranks_from_environment().rank
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"rank {rank}: %(message)s")
    try:
        work()
    except Interrupted:
        return 0 if saved_is_success else INTERRUPTED
    except (UserError, Claimed) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except Exception:
        logging.exception("failed")
        return FAILED
    return 0
