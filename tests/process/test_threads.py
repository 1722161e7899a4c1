"""How threads wait for each other, decided before torch loads; results do not depend on it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
ASK = f"import sys, os, harness; assert 'torch' not in sys.modules; print([os.environ.get(v) for v in {VARIABLES}])"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["PASSIVE", None, None]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None, None]),
        ({"GOMP_SPINCOUNT": "10000"}, [None, "10000", None]),
        ({"KMP_BLOCKTIME": "200"}, [None, None, "200"]),
    ],
)
def test_threads_sleep_while_they_wait_unless_somebody_has_decided(
    given: dict[str, str], expected: list[str | None]
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=inherited | given, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{expected}\n", done.stderr
