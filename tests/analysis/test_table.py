"""Tables of runs: what is read, what is left out and why."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import RunTable, frontier, load
from analysis.notes import has
from analysis.runs.curves import evaluations
from harness.errors import UserError
from tests.analysis.generate import write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "quick")


def test_sweep_directory(sweep):
    table = load(sweep)
    assert len(table) == 30
    reasons = dict(zip(table.excluded["run_id"], table.excluded["reason"], strict=True))
    assert len(reasons) == 3
    assert reasons["topk-n4096-k32-s7-generated"] == "status diverged at step 200"
    assert "no space left" in reasons["topk-n256-k8-s8-generated"]
    assert "no result.json" in reasons["topk-n4096-k8-s9-generated"]


def test_choosing_lists_the_others(sweep):
    topk = load(sweep).where(sae="topk")
    assert set(topk.frame["sae"]) == {"topk"} and "not sae=topk" in set(topk.excluded["reason"])
    assert len(topk.where(k="8").frame) == 6
    with pytest.raises(UserError, match="no column 'colour'"):
        topk.where(colour="red")


def test_damaged_result_is_left_out(tmp_path):
    run = write_run(tmp_path, sae="topk", n=256, k=8)
    (run / "result.json").write_text("{ not json")
    table = load(tmp_path)
    assert len(table) == 0 and "unreadable" in table.excluded["reason"][0]


def test_single_run_directory(tmp_path):
    assert len(load(write_run(tmp_path, sae="topk", n=256, k=8))) == 1


def test_curves_and_frontier(sweep):
    table = load(sweep)
    curves = evaluations(table)
    assert curves.groupby("run").size().eq(12).all() and curves["constant_lr"].all()
    front = frontier(table, curves)
    assert np.all(np.diff(front["flops"]) > 0) and np.all(np.diff(front["loss"]) < 0)
    for _, point in front.iterrows():
        assert (curves["loss"][curves["flops"] <= point["flops"]] >= point["loss"]).all()


def test_decayed_runs_enter_a_frontier_by_their_end_only(tmp_path):
    for n in (256, 1024):
        write_run(tmp_path, sae="topk", n=n, k=8, fvu=50 / n, decay_fraction=0.2)
    front = frontier(load(tmp_path))
    assert len(front) == 2 and front["tokens"].eq(400_000).all()


def test_torn_last_line_of_metrics(tmp_path):
    run = write_run(tmp_path, sae="topk", n=256, k=8)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99999, "fv')
    assert len(evaluations(load(tmp_path))) == 12


def test_frames_csv_parquet_agree(tmp_path):
    frame = pd.DataFrame({"size": [1, 2, 4, 8], "err": [0.5, 0.4, 0.3, 0.25]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    roles = {"x": "size", "loss": "err"}
    for source in (frame, tmp_path / "t.csv", tmp_path / "t.parquet"):
        table = load(source, roles)
        np.testing.assert_array_equal(table.values("x"), [1, 2, 4, 8])


def test_stacking_two_sources(tmp_path):
    write_run(tmp_path / "a", sae="topk", n=256, k=8)
    write_run(tmp_path / "b", sae="topk", n=512, k=8)
    table = load([str(tmp_path / "a"), str(tmp_path / "b")])
    assert sorted(table.values("n")) == [256, 512]


def test_repeated_run_is_kept_once(tmp_path):
    run = write_run(tmp_path / "a", sae="topk", n=256, k=8)
    content = json.loads((run / "result.json").read_text())
    other = write_run(tmp_path / "b", sae="topk", n=512, k=8)
    (other / "result.json").write_text(json.dumps(content))
    table = load([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(table) == 1 and has(table.notes, "duplicate_run")


def test_role_without_column():
    with pytest.raises(UserError, match="no column 'nope'"):
        RunTable(pd.DataFrame({"a": [1.0]}), {"n": "nope"})
    with pytest.raises(UserError, match="unknown role"):
        RunTable(pd.DataFrame({"a": [1.0]}), {"size": "a"})


def test_wandb_problems_are_one_line(monkeypatch):
    class Unreachable:
        def runs(self, path, filters):
            raise ConnectionError("name resolution failed")

    monkeypatch.setattr("analysis.runs.load_wandb._api", Unreachable)
    with pytest.raises(UserError, match="cannot be read: name resolution failed"):
        load("wandb:me/project/group")

    def without_a_key():
        raise ValueError("api_key not configured (no-tty)\nrun wandb login")

    monkeypatch.setattr("analysis.runs.load_wandb._api", without_a_key)
    with pytest.raises(UserError, match="cannot be read: api_key not configured"):
        load("wandb:me/project/group")
    with pytest.raises(UserError, match="is not wandb:entity"):
        load("wandb:project")
