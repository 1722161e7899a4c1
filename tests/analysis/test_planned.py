"""The report compares what was planned with what it took."""

import json

import pytest

from analysis.report.page import write_report
from analysis.report.planned import planned_rows
from analysis.runs.load import read_sweep
from harness.errors import UserError
from tests.analysis.generate import write_run


def _sweep(path, planned):
    """Three runs of two widths; `planned`: seconds for each."""
    for n, k, wall_s, together in ((256, 8, 10.0, 1), (256, 16, 40.0, 2), (512, 8, 30.0, 1)):
        run_dir = write_run(path, sae="topk", n=n, k=k)
        result = json.loads((run_dir / "result.json").read_text())
        result |= {"wall_s": wall_s, "trained_together": together, "peak_memory_bytes": 3 * 10**8}
        (run_dir / "result.json").write_text(json.dumps(result))
    names = sorted(p.name for p in path.iterdir() if p.is_dir())
    names.sort(key=lambda name: ("n512" in name, "k16" in name))
    runs = {name: {"train_s": s, "memory_bytes": 2 * 10**8} for name, s in zip(names, planned, strict=True)}
    (path / "plan.json").write_text(json.dumps({"calibrations": [], "runs": runs}))
    return path


def test_time_and_memory_by_width_and_over_all(tmp_path):
    sweep = _sweep(tmp_path / "s", (10.0, 10.0, 60.0))
    rows = planned_rows(read_sweep(sweep), sweep)
    assert [(row["sae"], row["n"], row["runs"]) for row in rows] == [
        ("topk", 256, 2),
        ("topk", 512, 1),
        ("all", None, 3),
    ]
    assert rows[0]["planned_s"] == 20 and rows[0]["took_s"] == 30, "a pack shares its time"
    assert rows[0]["time_ratio"] == 1.5 and rows[0]["time_range"] == (1.0, 2.0)
    assert rows[2]["time_range"] == (0.5, 2.0) and rows[2]["memory_ratio"] == pytest.approx(1.5)
    page = write_report(sweep).read_text(encoding="utf-8")
    assert "Planned, and what it took" in page and "1.50 (1.00 to 2.00)" in page and "200 MB" in page


def test_a_run_without_a_plan_is_not_compared(tmp_path):
    sweep = _sweep(tmp_path / "s", (10.0, None, 60.0))
    assert planned_rows(read_sweep(sweep), sweep)[-1]["runs"] == 2
    (sweep / "plan.json").unlink()
    assert planned_rows(read_sweep(sweep), sweep) == []
    assert "Planned, and what it took" not in write_report(sweep).read_text(encoding="utf-8")


def test_a_damaged_plan_is_named(tmp_path):
    sweep = _sweep(tmp_path / "s", (10.0, 10.0, 60.0))
    (sweep / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        planned_rows(read_sweep(sweep), sweep)
