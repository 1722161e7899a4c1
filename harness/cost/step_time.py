"""The expected time of a training step on a named GPU, from data sheets: for plans made on another machine.

These are estimates. The peak figures are multiplied by the shares that an H200 reached in plain products and copies.
That gives a floor; the step is expected to reach a fixed share of it.
"""

from __future__ import annotations

from harness import budget
from harness.config import Config
from harness.process.gpus import Gpu

PRODUCTS_REACH, COPIES_REACH = 0.80, 0.90
"""Shares of the peaks: an H200 does 790 TFLOP/s on long bf16 products and copies at 4.3 TB/s."""

FLOOR_SHARE = 0.5
"""Assumed floor time over step time: an H200 reached 0.60 to 0.82 with TopK and 0.20 to 0.88 with Switch
(docs/performance.md); AuxK costs more."""

LAUNCHES_S = 2e-3
"""The shortest step, in seconds: about a hundred kernels are launched one after the other."""


def step_seconds(gpu: Gpu, config: Config, d_model: int) -> float | None:
    """Expected seconds of one step on one rank; None for float64, for which there are no figures."""
    if config.train.precision == "fp64":
        return None
    low = config.train.precision == "bf16"
    rate = PRODUCTS_REACH * (gpu.bf16_flops if low else gpu.fp32_flops)
    sae, mesh = config.sae, config.mesh
    tokens = config.train.batch_tokens / mesh.dp
    product = 2.0 * tokens * d_model * sae.n_latents / sae.n_experts / mesh.shard / rate
    # every row with those of each peer, in float32
    pairs = config.train.peers * sae.n_latents**2 / mesh.training_ranks
    product += 2.0 * pairs * d_model / (PRODUCTS_REACH * gpu.fp32_flops)
    traffic = budget.floor_bytes(sae, d_model, tokens, 2 if low else 4, mesh.shard) / (COPIES_REACH * gpu.bytes_per_s)
    sent = sum(budget.bytes_sent_per_step(config, d_model).values()) / gpu.link_bytes_per_s
    return max((product + traffic) / FLOOR_SHARE + sent, LAUNCHES_S)
