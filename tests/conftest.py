"""Where there is no GPU, tests marked `gpu` are skipped and Triton's kernels run in its interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
