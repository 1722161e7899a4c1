"""What a state says of itself in the record."""

from __future__ import annotations

import pytest

from harness.training.state import make_state
from tests.training.members import runtime, small_config, source_of


@pytest.mark.parametrize("peak", [None, 1e9])
def test_mfu_is_the_share_of_the_peak_since_the_last_line(peak: float | None) -> None:
    config = small_config()
    source, here = source_of(config), runtime()
    state = make_state(config, source, here)
    assert state.peak_flops is None, "a CPU has no known peak"
    state.peak_flops = peak
    with source.stream(0, 64, here.device) as stream:
        for steps in (3, 5):
            before = state.flops_executed
            for _, batch in zip(range(steps), stream.batches(state.done), strict=False):
                state.train_step(batch, here)
            line = state.log_line(here.shards)
            if peak is None:
                assert "mfu" not in line
            else:
                seconds = steps * 64 / line["tokens_per_s"]
                assert line["mfu"] == pytest.approx((state.flops_executed - before) / seconds / peak)
