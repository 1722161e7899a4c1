"""Runs of other users: what may not be read is told as that, and the others are shown."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis import load
from harness.sweep.rows import sweep_rows
from tests.analysis.generate import write_run

NOBODY = 65534


def as_another_user(action: Callable[[], Any]) -> Any:
    """What `action` returns in a child process that is not root, through JSON."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.write(write_end, json.dumps(action()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said)


def test_a_run_that_may_not_be_read_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    for n in (64, 128):
        write_run(tmp_path, sae="topk", n=n, k=8, fvu=0.5)
    closed, _ = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    for directory in (*tmp_path.parents, tmp_path):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)

    def told() -> list[Any]:
        rows = [(row["run_id"], row["status"], row["error"]) for row in sweep_rows(tmp_path)]
        return [rows, load(tmp_path).left_out()]

    told()  # imports, which the child may not read
    closed.chmod(0)
    rows, left_out = as_another_user(told)
    closed.chmod(0o755)
    assert [status for _, status, _ in rows] == ["failed", "done"]
    for reason in (rows[0][2], left_out[0]["reason"]):
        assert f"cannot read {closed}/result.json: Permission denied; its owner can allow it" in reason
    assert len(left_out) == 1
