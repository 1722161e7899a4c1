"""Runs of W&B through the real client, which asks a mock server (`wandb_server`) for what it once uploaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.wandb_server import KEY, Store, serving

RECORDED = Path(__file__).parent / "data" / "wandb_group.json"

READ = """
import json, sys
from analysis import load
from analysis.runs.curves import evaluations
table = load(sys.argv[1])
curves = evaluations(table)
lines = {run: len(read()) for run, read in table.histories.items()}
print("ANSWER", json.dumps({
    "n": table.values("n").tolist(), "fvu": table.values("loss").tolist(), "lr": table.values("lr").tolist(),
    "runs": table.frame["run_id"].tolist(), "excluded": table.left_out(), "lines": lines,
    "points": curves.groupby("run").size().to_dict(), "constant": bool(curves["constant_lr"].any()),
}))
"""


@pytest.fixture
def recorded():
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def _client(address, home, *command):
    """A process of its own: the client keeps its settings for as long as it lives."""
    env = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_SILENT": "true"}
    env["WANDB_ERROR_REPORTING"] = "false"
    env |= {"WANDB_CACHE_DIR": str(home / "cache"), "WANDB_CONFIG_DIR": str(home / "config"), "WANDB_DIR": str(home)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=env, check=False)


def test_a_group_is_read_by_the_real_client(recorded, tmp_path):
    first, *_ = recorded
    recorded["another"] = json.loads(json.dumps(recorded[first]))
    recorded["another"]["bucket"]["groupName"] = "not this one"
    recorded["unfinished"] = json.loads(json.dumps(recorded[first]))
    recorded["unfinished"] |= {"exit": None, "summary": {"n_latents": 512, "k": 4, "fvu": 0.9}}
    recorded["unfinished"]["bucket"] |= {"displayName": "topk-n512", "config": "{}"}
    store = Store(recorded)
    with serving(store) as address:
        done = _client(address, tmp_path, "-c", READ, "wandb:me/sae-scaling/wb")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.split("ANSWER", 1)[1])
    whole = {run["bucket"]["displayName"]: run for run in recorded.values() if run["exit"] == 0}
    assert sorted(answer["n"]) == [64, 128, 256] and set(answer["runs"]) == set(whole)
    assert answer["excluded"] == [{"run": "topk-n512", "reason": "status unfinished"}]
    for run, fvu, n, lr in zip(answer["runs"], answer["fvu"], answer["n"], answer["lr"], strict=True):
        assert fvu == whole[run]["summary"]["fvu"]
        assert lr == pytest.approx(4 * 2e-4 / (n / 2**14) ** 0.5)  # the rule, not the decayed rate in the summary
        assert whole[run]["summary"]["lr"] != pytest.approx(lr)
        assert answer["lines"][run] == len(whole[run]["history"])  # complete, not sampled
        evaluated = [line for line in whole[run]["history"] if "fvu" in line]
        assert answer["points"][run] == len(evaluated) and not answer["constant"]
    assert {"Runs", "RunParquetHistory", "HistoryPage"} <= set(store.operations)
    assert store.operations.count("Runs") == 2, "runs come in pages"


def test_the_command_fits_a_group(recorded, tmp_path):
    with serving(Store(recorded)) as address:
        line = ("-m", "analysis", "fit", "wandb:me/sae-scaling/wb", "--law", "power", "--x", "n_latents")
        done = _client(address, tmp_path, *line)
        nothing = _client(address, tmp_path, "-m", "analysis", "fit", "wandb:me/sae-scaling/nobody")
    assert done.returncode == 0 and "over 3 runs" in done.stdout, done.stderr
    assert nothing.returncode == 2 and nothing.stderr.strip().endswith("wandb:me/sae-scaling/nobody holds no run")
