"""`python -m harness.harvest DIR`: make the activation store of a frozen configuration, without training.

DIR holds a `config.yaml`: it is a run's directory or that of a harvest job. Several ranks (torchrun, srun) share the
work. Exit codes: 0 the store is complete, 1 failed, 2 a wrong request, 75 stopped and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from harness.activations.open import open_source
from harness.parallel.mesh import mesh
from harness.process.device import pick_device
from harness.process.rank import ranks_from_environment, run_as_rank, wait_for_ranks
from harness.process.signals import Interrupted, stop_on_signals
from harness.record.attempt import attempt_log, write_ended
from harness.record.rundir import other_hooks, read_config
from harness.terminal import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.harvest", description="Make an activation store.")
    parser.add_argument("directory", type=Path, help="holds config.yaml")
    parser.add_argument("--saved-is-success", action="store_true", help="exit 0, not 75, when stopped")
    arguments = parser.parse_args(argv)
    return run_as_rank(lambda: harvest(arguments.directory), saved_is_success=arguments.saved_is_success)


def harvest(directory: Path) -> None:
    """Make the store that `directory/config.yaml` needs, as the rank that this process is. Raises `Interrupted`."""
    config, ranks = read_config(directory), ranks_from_environment()
    device = pick_device(config.train.device, ranks.local_rank)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        log = stack.enter_context(attempt_log(directory, "harvest")) if ranks.rank == 0 else None
        shape, on_wait = config.mesh, wait_for_ranks(stop)
        # those that will compute windows help too
        shards = stack.enter_context(mesh(shape.ranks, 1, device, ranks, on_wait=on_wait))
        try:
            open_source(
                config.activations,
                Path(config.out),
                progress=shards.rank == 0,
                stop=stop,
                shards=shards,
                others=other_hooks(directory, config),
            )
        except Interrupted:
            if log is not None:
                write_ended([log.parent], outcome="saved", reason=stop.reason, step=None, requeued=False)
            raise


if __name__ == "__main__":
    sys.exit(main())
