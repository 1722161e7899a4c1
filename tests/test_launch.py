"""Wrong requests through the real command line: one clear message, the contract's exit code, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import export, replay, status
from harness.errors import UserError
from harness.grid.study import load_study
from harness.launch import main
from harness.sweep.request import Request, requested_cells
from sweeps.__main__ import main as sweeps
from tests.tiny import TINY

MINILM = "activations=minilm"

WRONG = {
    "no value": (["sae.k"], "cannot read the override 'sae.k'"),
    "empty value": (["sae.k="], "sae.k: takes a whole number, not ''"),
    "unbalanced": (["sae.k=[1,2"], "cannot read the override"),
    "group misspelt": (["sea=topk"], "there is no key 'sea'; did you mean sae"),
    "option misspelt": (["sae=tokp"], "sae=tokp: there is no such sae configuration; did you mean topk?"),
    "option in a sweep": (["sae=topk,swich"], "did you mean switch"),
    "key misspelt": (["sae.n_latent=64"], "did you mean sae.n_latents"),
    "key of another group": (["optim.lr=1"], "did you mean train.lr?"),
    "added key": (["+sae.foo=1"], "there is no key 'sae.foo'"),
    "deleted key": (["~sae.k"], "would remove a key that every run needs"),
    "wrong type": (["sae.k=two"], "sae.k: takes a whole number, not 'two'"),
    "wrong type in a sweep": (["sae.k=2,two"], "sae.k=two"),
    "not a whole number": (["sae.k=2.5"], "sae.k: takes a whole number, not '2.5'"),
    "an exponent": (["sae.n_latents=16e3"], "sae.n_latents: takes a whole number, not '16000.0'; write 16000"),
    "no number": (["train.lr=fast"], "train.lr: takes a number, not 'fast'"),
    "null": (["sae.k=null"], "not Optional"),
    "interval": (["sae.k=interval(1,3)"], "an interval has no list of values"),
    "hydra key": (["hydra.run.dir=x"], "has no effect"),
    "k above n": (["sae.k=64"], "sae.k=64 is larger than sae.n_latents=32"),
    "k zero": (["sae.k=0"], "sae.k=0 must be at least 1"),
    "n zero": (["sae.n_latents=0"], "sae.n_latents=0 must be at least 1"),
    "indivisible": (["sae=switch", "sae.n_experts=5"], "not divisible by sae.n_experts=5"),
    "k above an expert": (["sae=switch", "sae.n_experts=16", "sae.k=4"], "larger than one expert's latents"),
    "experts of a topk": (["sae.n_experts=2"], "needs sae=switch"),
    "several impossible": (["sae.n_latents=32,64", "sae.k=2,48"], "1 of 4 cells are impossible"),
    "no budget": (["train.tokens=0"], "no budget"),
    "decay with convergence": (["train.until=convergence", "train.decay_fraction=0.1"], "constant learning rate"),
    "unknown precision": (["train.precision=fp8"], "choose one of: auto, fp32, bf16, fp64"),
    "less than a step": (["train.tokens=10"], "is less than one step of train.batch_tokens="),
    "nothing to draw": (["activations.synthetic.d_model=0"], "activations.synthetic.d_model=0 must be at least 1"),
    "warm-up beyond the budget": (["train.warmup_tokens=10e6"], "exceed the budget of 4096 tokens"),
    "warm-up and decay": (["train.warmup_tokens=3e3", "train.decay_fraction=0.9"], "exceed the budget of 4096 tokens"),
    "batch larger than the store": (
        [MINILM, "activations.tokens=1000", "train.batch_tokens=1024", "train.tokens=1e6"],
        "train.batch_tokens=1024 exceeds the store's activations.tokens=1000",
    ),
    "saves longer than it trains": (
        ["cluster=slurm", "cluster.time='00:10:00'", "cluster.lead_s=301"],
        "cluster.lead_s=301 is more than half of cluster.time='00:10:00'",
    ),
    "schedule of a named file": (["train=quick", "train.warmup_tokens=20e3"], "exceed the budget"),
    "warm-up beyond FLOPs": (["train.tokens=0", "train.flops=1e7", "train.warmup_tokens=1e9"], "exceed the budget"),
    "no row left": ([MINILM, "activations.context=1"], "leaves no row"),
    "too many latents": (["sae.n_latents=1000000000000"], "must be at least 1 and at most 1000000000"),
    "too many threads": (["train.threads=100000"], "at most 1024"),
    "too many cells": (["sae.n_latents=range(1,1000000000)"], "a launch has at most 100,000 cells"),
    "sweep outside": (["sweep=../../elsewhere"], "is not a plain name"),
    "uneven mesh": (["mesh.shard=7"], "cannot be cut over mesh.shard=7 ranks"),
    "uneven replicas": (["mesh.dp=7"], "cannot be cut over mesh.dp=7 replicas"),
    "unknown cluster": (["cluster=kubernetes"], "there is no such cluster configuration"),
    "unknown tracker": (["tracker=tensorbord"], "there is no such tracker configuration"),
    "unknown study": (["--study", "quik"], "there is no study 'quik'; available: architectures"),
    "missing study file": (["--study", "nowhere/study.yaml"], "cannot read the study file"),
    "unknown filter": (["--only", "sae.kk=3"], "there is no key 'sae.kk'"),
    "empty filter": (["--only", "sae.k"], "write KEY=VALUE"),
    "nothing left": (["--only", "sae.k=7"], "no cell is left"),
    "missing text": ([MINILM, "activations.text=files", "activations.text_paths=[nowhere/*.txt]"], "nowhere"),
    "no text named": ([MINILM, "activations.text=files"], "needs activations.text_paths"),
    "unknown package": ([MINILM, "activations.model=package:no_such_package"], "no such package"),
    "model without files": ([MINILM, "activations.model=/"], "no config.json"),
    "unknown model": ([MINILM, "activations.model=nobody/nothing"], "nobody/nothing"),
    "unknown hook": ([MINILM, "activations.hook=resid_mid"], "choose one of: resid_post, mlp_out, attn_out"),
    "layer too deep": ([MINILM, "activations.layer=99"], "99"),
}
"""Name → arguments beside those of a cell that would train, and a part of the message."""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def check_message(error: str, part: str) -> None:
    lines = error.strip().splitlines()
    refusal = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert part in lines[refusal], error
    assert all(line.startswith("  ") for line in lines[refusal + 1 :]), error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, part = WRONG[name]
    out = tmp_path / "out"
    assert main([*TINY, f"out={out}", *arguments]) == 2
    check_message(capsys.readouterr().err, part)
    assert not list(out.rglob("result.json"))
    assert not list(out.rglob("*.tmp"))


def test_kernels_that_do_not_run_here_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([*TINY, f"out={tmp_path}", "ops=triton", "train.device=cpu"]) == 2
    check_message(capsys.readouterr().err, "ops=triton needs a GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no value", "option misspelt", "several impossible"])
def test_wrong_requests_as_a_process(name: str, tmp_path: Path) -> None:
    arguments, part = WRONG[name]
    command = [sys.executable, "-m", "harness.launch", *TINY, "out=out", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    check_message(done.stderr, part)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_value_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae.k=8"]) == 2
    check_message(capsys.readouterr().err, "no value for sae.n_latents; set it, e.g. sae.n_latents=…")


def test_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--no-such-flag"])
    assert leave.value.code == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"out={tmp_path}", "train.device=cuda"]) == 2
    check_message(capsys.readouterr().err, "torch sees no GPU here")


def test_text_that_is_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x80" * 1000)
    files = [MINILM, "activations.text=files", f"activations.text_paths=[{tmp_path}/a.txt]"]
    assert main([*TINY, f"out={tmp_path}/out", *files]) == 2
    check_message(capsys.readouterr().err, "a.txt")


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert main([*TINY, f"out={tmp_path}/out"]) == 2
    check_message(capsys.readouterr().err, "choose another out=DIR")


@pytest.mark.parametrize(("file", "part"), [("study.json", "remove it"), ("result.json", "remove it to run this cell")])
def test_damaged_records_are_named(file: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"out={tmp_path}"]) == 0
    (path,) = tmp_path.rglob(file)
    path.write_text(path.read_text()[:20])
    capsys.readouterr()
    assert main([*TINY, f"out={tmp_path}"]) == 2
    check_message(capsys.readouterr().err, part)


@pytest.mark.parametrize(
    ("command", "arguments", "part"),
    [
        (status.main, ["nowhere"], "there is no sweep at nowhere"),
        (export.main, ["nowhere", "--format", "saelens", "--out", "x"], "no finished weights"),
        (replay.main, ["nowhere"], "not a run directory"),
        (sweeps, ["--arch", "tokp"], "choose from: topk, switch"),
        (sweeps, ["--tokens", "10e3", "--dry-run", "train.warmup_tokens=20e3"], "cells: train.warmup_tokens=20000"),
        (sweeps, ["--study", "quik"], "there is no study 'quik'"),
        (sweeps, ["--width", "256,x"], "takes a whole number, not 'x'"),
        (sweeps, ["--activations", "minlm"], "did you mean minilm?"),
    ],
)
def test_other_commands(command: object, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(command)
    assert command(arguments) == 2
    check_message(capsys.readouterr().err, part)


def test_a_disk_that_fills_up(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = [*TINY, f"out={small_disk}", "sae.n_latents=512"]
    assert main(wide) == 1
    *_, error, again = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: no space left on the disk of ") and error.endswith("; 0 of 1 cells done")
    assert again.startswith("free some space; to go on: ")
    assert not list(small_disk.rglob("*.tmp"))
    assert not list(small_disk.rglob("result.json"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert main(wide) == 0
    (result,) = small_disk.rglob("result.json")
    assert json.loads(result.read_text())["status"] == "done"


def test_a_disk_that_is_full_already(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "ballast").write_bytes(b"\0" * 48 * 1024)
    assert main([*TINY, f"out={small_disk}"]) == 2
    check_message(capsys.readouterr().err, "cannot write to")


def test_info_and_cfg(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--info"]) == 0
    names = "sae: batchtopk, gated, jumprelu, jumprelu_tanh, llama_scope, matryoshka, multi_topk, prolu, relu"
    assert names in capsys.readouterr().out
    assert main([*TINY, "--cfg", "job", "-m"]) == 0
    assert "n_latents: 32" in capsys.readouterr().out


def test_ctrl_c_while_libraries_load_is_an_interruption(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.sweep.execute.plan_runs", interrupted)
    assert main(["sae=topk", "sae.n_latents=64", "sae.k=4"]) == 75
    assert "interrupted before anything was trained; to begin again: " in capsys.readouterr().err


def test_the_schedule_of_the_default_file_is_only_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*(text for text in TINY if "warmup" not in text), "--cfg", "job"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 1 of 1 cells never train at their full learning rate")


def test_a_small_budget_typed_over_a_study_is_only_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study("quick")
    cells = requested_cells(Request(["train.tokens=16384"], study))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {len(cells)} of {len(cells)} cells never train at their full learning rate")
    with pytest.raises(UserError, match="exceed the budget of 16384 tokens"):
        requested_cells(Request(["train.tokens=16384", "train.warmup_tokens=20e3"], study))


def test_a_plan_says_how_often_each_row_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["activations=minilm", "activations.tokens=4000", "train.tokens=8e3,400e3", "--dry-run"]
    assert main([*TINY, f"out={tmp_path}", *store]) == 0
    assert "each row of the store 1.98 to 100 times, in 2 cells" in capsys.readouterr().out
    assert main([*TINY, f"out={tmp_path}", "--dry-run"]) == 0
    assert "each row" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["sae.n_latents=999999999", "sae.k=1000000"],
        ["activations.synthetic.d_model=1000000", "activations.synthetic.n_features=10000000"],
        ["train.batch_tokens=1000000000", "train.tokens=1e15"],
        ["activations.heldout_tokens=1e12", "train.eval_rows=1000000000000", "train.eval_points=1000"],
    ],
)
def test_a_plan_does_not_allocate_what_it_plans(overrides: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.launch", *TINY, f"out={tmp_path}", *overrides, "--dry-run"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 16000000; exec "$@"', "-", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 cells: 1 pending" in done.stdout
