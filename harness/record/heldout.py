"""`heldout.parquet`: the final held-out error of a run, document by document, so that runs can be compared in pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from harness.files import replacing
from harness.record import names


def write_heldout(run_dir: Path, sums: Mapping[str, np.ndarray]) -> str:
    """Write the columns `sums`, one line per document, and return the sha256 of the file."""
    import pyarrow as pa  # needed once, at the end of a run
    import pyarrow.parquet as parquet

    path = run_dir / names.HELDOUT
    with replacing(path) as temporary:
        parquet.write_table(pa.table(dict(sums)), temporary)
    return hashlib.sha256(path.read_bytes()).hexdigest()
