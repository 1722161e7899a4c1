"""Runs on the hub: what is sent, what the card says, what is read back. The hub is a server on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.errors import UserError
from harness.export import main
from harness.record.quality import Value, write_quality
from harness.saes.hub import parse
from harness.saes.publish import push, stage
from tests.saes.hub_server import TOKEN, Hub, serving


@pytest.fixture
def sweep(topk_run: Path, switch_run: Path, tmp_path: Path) -> Path:
    for run in (topk_run, switch_run):
        shutil.copytree(run, tmp_path / "sweep" / run.name)
    about = {"metric": "downstream", "version": 1, "settings": {}, "weights": "0", "tokens": 1}
    write_quality(tmp_path / "sweep" / topk_run.name, about, {"kl": Value(0.25, 0.01)}, {}, {}, {})
    return tmp_path / "sweep"


def run_in(server: Hub, tmp_path: Path, *command: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_sweep_there_and_back(sweep: Path, tmp_path: Path) -> None:
    with serving() as server:
        done = run_in(server, tmp_path, "-m", "harness.export", str(sweep), "--push", "hf:lab/saes", "--license", "mit")
        assert done.returncode == 0, done.stderr
        assert f"published: {server.url}/lab/saes/commit/" in done.stdout
        files = server.repositories["lab/saes"]
        first, second = sorted(path.name for path in sweep.iterdir())
        switch, topk = (first, second) if first.startswith("switch") else (second, first)
        assert f"{topk}/cfg.json" in files and f"{switch}/cfg.json" not in files
        for name in (topk, switch):
            sent = files[f"{name}/sae/sae.safetensors"]
            assert sent == (sweep / name / "sae" / "sae.safetensors").read_bytes()
            assert "config" not in json.loads(files[f"{name}/result.json"])
        assert not any(path.endswith(("config.yaml", "provenance.json")) for path in files)
        weights = {content for path, content in files.items() if path.endswith(".safetensors")}
        assert set(server.large.values()) == weights  # as large files, each content once
        script = (
            "import sys, torch; from harness.saes.trained import load; "
            "a, b = load(sys.argv[1]), load(sys.argv[2]); "
            "assert all(torch.equal(a.params[n], b.params[n]) for n in b.params) and a.origin.hashed; print('same')"
        )
        for name in (topk, switch):
            back = run_in(server, tmp_path, "-c", script, f"hf:lab/saes/{name}", str(sweep / name))
            assert back.stdout.strip() == "same", back.stderr[-800:]
        refused = run_in(server, tmp_path, "-m", "harness.export", str(sweep), "--push", "hf:lab/other", token="wrong")
        assert refused.returncode == 2 and "401" in refused.stderr and "Traceback" not in refused.stderr


def test_the_card(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    files = stage(sorted(sweep.iterdir()), "hf:lab/saes", "cc-by-4.0", tmp_path / "work")
    text = files["README.md"].read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "saelens" and head["license"] == "cc-by-4.0"
    assert {"saelens", "sparse-autoencoder"} <= set(head["tags"])
    for run in sweep.iterdir():
        result = json.loads((run / "result.json").read_text())
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{run.name}`")]
        assert f"{result['fvu']:.4g} ± {result['fvu_se']:.2g}" in line
        assert ("| yes |" in line) == run.name.startswith("topk")
        assert ("0.25 ± 0.01" in line) == run.name.startswith("topk")
    assert str(sweep) not in text.split("## Commands")[0]


def test_without_a_token_one_line_says_what_to_do(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main([str(sweep), "--push", "hf:lab/saes"]) == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error and error.count("\n") == 1


@pytest.mark.parametrize("address", ["lab/saes", "hf:saes", "hf:lab/../etc", "hf:a/b/c/d"])
def test_wrong_addresses(address: str, sweep: Path) -> None:
    with pytest.raises(UserError, match="is no address on the hub"):
        parse(address)
    with pytest.raises(UserError, match="is no address on the hub"):
        push(sweep, address)


def test_what_to_give(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--format", "saelens"], ["--push", "hf:a/b", "--format", "saelens", "--out", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main([str(sweep), *arguments])
        assert stopped.value.code == 2 and "either --format and --out, or --push" in capsys.readouterr().err
