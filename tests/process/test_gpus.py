"""Peak figures of the GPU that a process runs on."""

from __future__ import annotations

import pytest

from harness.process.gpus import peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "flops"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H200", "fp64", None),
        ("Tesla T4", "bf16", None),
    ],
)
def test_the_peak_follows_from_the_name_and_the_precision(name: str, precision: str, flops: float | None) -> None:
    assert peak_flops(name, precision) == flops
