"""What a training step can take on a named GPU, from data sheets: for plans made where no such GPU is.

Unmeasured: peak figures, times the shares of them that an H200 was seen to reach in plain products and copies, times
the share of that floor which our step is expected to reach.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness import budget
from harness.config import Config


@dataclass(frozen=True)
class Gpu:
    name: str
    bf16_flops: float
    """Peak of dense bf16 products with float32 sums, FLOP/s."""
    fp32_flops: float
    """Peak of float32 products without TF32, FLOP/s."""
    memory_bytes: float
    bytes_per_s: float
    """Peak memory bandwidth."""
    link_bytes_per_s: float
    """To another GPU of the node, one direction: NVLink, or PCIe where there is none."""


# NVIDIA data sheets: "A100 Tensor Core GPU" (40 GB PCIe/SXM, 80 GB PCIe/SXM), "A40", "A10", "L4", "L40", "L40S",
# "H100 Tensor Core GPU" (SXM, PCIe, NVL), "H200 Tensor Core GPU" (SXM). Dense figures: half of those printed with
# sparsity. The longest name that occurs in a site's own name counts, so the variants come with their ending.
_GPUS = (
    Gpu("a100", 312e12, 19.5e12, 40e9, 1.555e12, 300e9),
    Gpu("a100-80", 312e12, 19.5e12, 80e9, 2.039e12, 300e9),
    Gpu("a40", 149.7e12, 37.4e12, 48e9, 0.696e12, 32e9),
    Gpu("a10", 125e12, 31.2e12, 24e9, 0.600e12, 32e9),
    Gpu("l4", 121e12, 30.3e12, 24e9, 0.300e12, 32e9),
    Gpu("l40", 181e12, 90.5e12, 48e9, 0.864e12, 32e9),
    Gpu("l40s", 362e12, 91.6e12, 48e9, 0.864e12, 32e9),
    Gpu("h100", 989e12, 67e12, 80e9, 3.35e12, 450e9),
    Gpu("h100-pcie", 756e12, 51e12, 80e9, 2.0e12, 64e9),
    Gpu("h200", 989e12, 67e12, 141e9, 4.8e12, 450e9),
)

PRODUCTS_REACH, COPIES_REACH = 0.80, 0.90
"""Of the peaks: an H200 does 790 TFLOP/s on long bf16 products and copies at 4.3 TB/s."""

FLOOR_SHARE = 0.25
"""Share of the floor that a step is taken to reach. Expected, not measured: other people's trainers in plain torch,
which our kernels for GPUs resemble, come to 4 to 5 ms where the floor is 1.1 (n = 32,768, d = 768, batch 8,192)."""

LAUNCHES_S = 1e-3
"""No step is shorter than this: it starts about a hundred kernels one by one."""


def find_gpu(name: str) -> Gpu | None:
    """The GPU that a site's name such as `nvidia_a100-sxm4-80gb` means; None for one that is not in the list, and for
    a slice of one (`a100_3g.20gb`)."""
    said = name.lower()
    if re.search(r"\d+g\.\d+gb", said):
        return None
    found = [gpu for gpu in _GPUS if _is_meant(gpu, said)]
    return max(found, key=lambda gpu: len(gpu.name), default=None)


def _is_meant(gpu: Gpu, said: str) -> bool:
    model, _, variant = gpu.name.partition("-")
    return bool(re.search(rf"(?<![a-z0-9]){model}(?!\d)", said) and re.search(rf"(?<!\d){variant}(?!\d)", said))


def known_gpus() -> str:
    return ", ".join(gpu.name for gpu in _GPUS)


def step_seconds(gpu: Gpu, config: Config, d_model: int) -> float | None:
    """Expected seconds of one step of one rank of `config`; None for float64, which these GPUs are not made for."""
    if config.train.precision == "fp64":
        return None
    low = config.train.precision == "bf16"
    rate = PRODUCTS_REACH * (gpu.bf16_flops if low else gpu.fp32_flops)
    sae, mesh = config.sae, config.mesh
    tokens = config.train.batch_tokens / mesh.dp
    product = 2.0 * tokens * d_model * sae.n_latents / sae.n_experts / mesh.shard / rate
    traffic = budget.floor_bytes(sae, d_model, tokens, 2 if low else 4, mesh.shard) / (COPIES_REACH * gpu.bytes_per_s)
    sent = sum(budget.bytes_sent_per_step(config, d_model).values()) / gpu.link_bytes_per_s
    return max((product + traffic) / FLOOR_SHARE + sent, LAUNCHES_S)
