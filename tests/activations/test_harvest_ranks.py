"""A harvest over one and two ranks that is stopped and killed: store and run are those of an undisturbed one."""

from __future__ import annotations

import dataclasses
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from harness.activations.store.identity import store_id
from harness.activations.store.paths import is_complete
from harness.config import ActivationsConfig, Config
from harness.errors import INTERRUPTED
from tests.training.members import small_config
from tests.training.ranks import (
    ASSEMBLED,
    ASSEMBLY,
    FORWARD,
    PLANNING,
    Strike,
    join,
    killed,
    logs,
    prepare,
    processes,
    same_weights,
    start,
)

__all__ = ["processes"]

UNIT_TOKENS = 1600
KILL = (signal.SIGKILL,)


class Harvest:
    """A run whose store is harvested first, in units of 1600 tokens."""

    def __init__(
        self, context: ForkServerContext, activations: ActivationsConfig, out: Path, world: int, name: str
    ) -> None:
        config: Config = small_config(train__tokens=64 * 20, sae__k=2)
        config.activations = dataclasses.replace(activations, tokens=9000, heldout_tokens=600, context=8)
        config.out = str(out / name)
        self.run_dir = prepare(out / name / "s" / "run", config, shard=world)
        self.root = out / name / "_activations"
        self.store = self.root / store_id(config.activations)
        self.context, self.world = context, world

    def start(self, strike: Strike | None = None) -> list:
        return start(self.context, self.run_dir, self.world, strike, UNIT_TOKENS)

    def units(self) -> int:
        return len(list(self.root.glob("*.partial/units/*.safetensors")))

    def ends_like(self, whole: Harvest) -> None:
        assert join(self.start()) == [0] * self.world, logs(self.run_dir)
        # the manifest holds the hash of every shard, and opening a store checks them
        assert (self.store / "manifest.json").read_text() == (whole.store / "manifest.json").read_text()
        for root in (whole.root, self.root):
            assert [path.name for path in root.iterdir()] == [self.store.name]
        assert {path.name for path in self.store.iterdir()} == {path.name for path in whole.store.iterdir()}
        assert same_weights(whole.run_dir, self.run_dir)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_harvest_that_is_stopped_and_killed_ends_as_the_same_store(
    processes: ForkServerContext, tiny: ActivationsConfig, tmp_path: Path, world: int
) -> None:
    whole = Harvest(processes, tiny, tmp_path, world, "whole")
    assert join(whole.start()) == [0] * world, logs(whole.run_dir)

    last, everyone = (world - 1,), tuple(range(world))
    cut = Harvest(processes, tiny, tmp_path, world, "stopped")
    for strike in (
        Strike(PLANNING, 1, (signal.SIGTERM,), (0,)),
        Strike(FORWARD, 30, (signal.SIGTERM,), last),
        Strike(FORWARD, 5, (signal.SIGUSR1,), (0,)),
        Strike(FORWARD, 10, (signal.SIGTERM,), everyone),
        Strike(ASSEMBLY, 2, (signal.SIGTERM,), (0,)),
    ):
        codes = join(cut.start(strike))
        assert codes == [INTERRUPTED] * world, (strike, codes, logs(cut.run_dir))
        assert is_complete(cut.store) or cut.units() > 0 or strike.place == PLANNING
    cut.ends_like(whole)

    cut = Harvest(processes, tiny, tmp_path, world, "killed")
    for strike, all_of_them in (
        (Strike(PLANNING, 1, KILL, last), False),
        (Strike(FORWARD, 40, KILL, last), False),
        (Strike(FORWARD, 20, KILL, (0,)), True),
        (Strike(ASSEMBLY, 2, KILL), False),
        (Strike(ASSEMBLY, 5, KILL), True),
        (Strike(ASSEMBLED, 1, KILL), False),
    ):
        killed(cut.start(strike), strike.ranks, all_of_them)
        assert not cut.store.exists(), "the name of a store is given last"
    cut.ends_like(whole)
