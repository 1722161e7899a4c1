"""Peak figures of GPUs, from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    """Model, then `-` and the variant if there are several."""
    bf16_flops: float
    """Peak of dense bf16 products with float32 sums, FLOP/s."""
    fp32_flops: float
    """Peak of float32 products without TF32, FLOP/s."""
    memory_bytes: float
    bytes_per_s: float
    """Peak memory bandwidth."""
    link_bytes_per_s: float
    """To another GPU of the node, in one direction: over NVLink if the GPU has it, else over PCIe."""


# NVIDIA data sheets: "A100 Tensor Core GPU" (40 GB PCIe/SXM, 80 GB PCIe/SXM), "A40", "A10", "L4", "L40", "L40S",
# "H100 Tensor Core GPU" (SXM, PCIe, NVL), "H200 Tensor Core GPU" (SXM). Dense figures: half of those printed with
# sparsity. A site's own name for a GPU means the longest of these names that it contains.
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


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a site's own name such as `nvidia_a100-sxm4-80gb`; None if unknown or a slice (`a100_3g.20gb`)."""
    site_name = name.lower()
    if re.search(r"\d+g\.\d+gb", site_name):
        return None
    matching = [gpu for gpu in _GPUS if _matches(gpu, site_name)]
    return max(matching, key=lambda gpu: len(gpu.name), default=None)


def _matches(gpu: Gpu, site_name: str) -> bool:
    model, _, variant = gpu.name.partition("-")
    has_model = re.search(rf"(?<![a-z0-9]){model}(?!\d)", site_name)
    return bool(has_model and re.search(rf"(?<!\d){variant}(?!\d)", site_name))


def known_gpus() -> str:
    """All names in the list, for a message."""
    return ", ".join(gpu.name for gpu in _GPUS)


def peak_flops(name: str, precision: str) -> float | None:
    """Peak of products in `fp32` or `bf16` on the GPU that calls itself `name`, FLOP/s; None if unknown."""
    gpu = find_gpu(name)
    if gpu is None or precision == "fp64":
        return None
    return gpu.bf16_flops if precision == "bf16" else gpu.fp32_flops
