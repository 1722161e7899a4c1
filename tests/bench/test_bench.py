"""The benchmark as a command, and the arithmetic behind its numbers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from harness.bench.command import WORKER, add_comparisons, installed_peers, main, text
from harness.bench.contender import Process
from harness.bench.flashinfer_topk import VARIABLE, flashinfer_top_k
from harness.bench.measure import _ask_all, floor_ms, gradient_difference, write_data
from harness.bench.peer_worker import Peer, sparsify
from harness.bench.shapes import SHAPES, Shape, parse_shapes
from harness.errors import UserError


def test_shapes_by_name_family_and_size() -> None:
    assert [shape.n for shape in parse_shapes("C1, C2,C3")] == [1024, 4096, 8192]
    assert {shape.experts for shape in parse_shapes("S3")} == {8, 32, 64, 128}
    assert len(parse_shapes("S5")) == 12
    assert parse_shapes("16x64x4x32x2") == [Shape("16x64x4x32x2", 16, 64, 4, 32, 2)]
    assert all(shape.n % shape.experts == 0 for shape in SHAPES.values())


@pytest.mark.parametrize("text", ["C9", "16x64x4", "16x64x40x32x2", "16x64x4x32x3", "0x64x4x32", ""])
def test_unknown_shapes_are_named(text: str) -> None:
    with pytest.raises(UserError, match="shape"):
        parse_shapes(text)


def test_floor_of_the_facts_first_row() -> None:
    """(768, 32768, 32, 8192) in bf16 at 0.52 ms per product and 4.3 TB/s: 1.11 ms."""
    assert floor_ms(SHAPES["S1"], 0.52, 4.3e12, 2) == pytest.approx(1.11, abs=0.01)


def test_a_switch_is_set_beside_the_topk_of_its_size() -> None:
    size = {"d": 8, "n": 64, "k": 4, "batch": 32}
    results = [size | {"n_experts": 1, "step_ms": 6.0}, size | {"batch": 64, "n_experts": 1, "step_ms": 9.0}]
    for experts in (8, 1):
        results.append(size | {"n_experts": experts, "step_ms": 2.0})
        add_comparisons(results)
    assert [result.get("topk_over_switch") for result in results] == [None, None, 3.0, None]


def test_a_result_as_text() -> None:
    times = {f"{part}_ms": 1.0 for part in ("select", "decode", "backward", "optimizer", "other", "auxk_extra")}
    peer = {"version": "1.2", "step_ms": 9.0, "ours_is_faster_by": 3.0, "gradient_difference": 1e-7}
    result = times | {"shape": "C1", "step_ms": 3.0, "step_over_gemm": 2.5, "pct_of_floor": 40.0, "dead": 0.05}
    result |= {"tokens_per_s": 682666.7, "peak_mem_bytes": 5e8, "auxk_step_ratio": 1.3, "topk_over_switch": 2.0}
    result |= {"peers": {"sparsify": peer | {"peak_mem_bytes": 9e8}, "openai": peer | {"peak_mem_bytes": 7e8}}}
    heading, row, *remarks, peers, first, second = text(result).splitlines()
    shown = dict(zip(re.split(" {2,}", heading), row.split(), strict=True))
    assert shown["shape"] == "C1" and shown["step ms"] == "3.0" and shown["% floor"] == "40"
    assert shown["tokens/s"] == "682667" and shown["peak MB"] == "500"
    assert remarks == [
        "  TopK of the same size takes 2.00 times as long",
        "  AuxK with 5% dead latents adds 1.0 ms: a step takes 1.30 times as long",
    ]
    assert re.split(" {2,}", peers.strip())[0] == "peer"
    assert first.split() == ["sparsify", "1.2", "9.0", "3.00×", "1.0e-07", "900"] and second.split()[-1] == "700"


def test_only_installed_peers_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = Path(sys.executable)
    assert installed_peers(here, ["openai"]) == {}
    assert "no openai: it is not installed (environment of" in capsys.readouterr().err
    assert installed_peers(tmp_path / "python", ["sparsify"]) == {} and "make bench-peers" in capsys.readouterr().err


def test_a_peer_that_cannot_be_imported_says_why() -> None:
    whole, broken = Peer(sparsify), Peer(sparsify, "torch", "no.such.module")
    assert whole.missing() is None and whole.version() == "checkout"
    assert broken.missing() == "it cannot be imported: ModuleNotFoundError: No module named 'no'"
    assert Peer(sparsify, "no-such-package").missing() == "it is not installed"


def test_a_worker_that_fails_leaves_its_peers_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.bench.command.REFERENCE_WORKER", "tests.peers.absent")
    assert installed_peers(tmp_path / "python", ["bionemo_like"]) == {}
    assert "no bionemo_like: its worker failed:" in capsys.readouterr().err


def test_a_peer_that_dies_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with Process("mortal", [sys.executable, "-c", "input()"], {}) as mortal:
        peers = {"mortal": mortal}
        assert _ask_all(peers, "round") == {} and not peers
    assert capsys.readouterr().err.startswith("continuing without mortal: mortal ended early")


def test_gradient_difference_fits_the_loss_factor(tmp_path: Path) -> None:
    gradient = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    save_file({"W_enc": gradient, "b_enc": torch.ones(5)}, tmp_path / "ours")
    save_file({"W_enc": -3 * gradient}, tmp_path / "same")
    save_file({"W_enc": gradient.flip(0).contiguous()}, tmp_path / "other")
    assert gradient_difference(tmp_path / "ours", tmp_path / "same") < 1e-7
    assert gradient_difference(tmp_path / "ours", tmp_path / "other") > 0.1


def test_command_writes_what_the_contract_names(tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    command = [sys.executable, "-m", "harness.bench", "--shapes", "16x64x4x64,16x64x4x64x4", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--peers=", "--json", out, "--picture", picture], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert picture.read_text().lstrip().startswith("<?xml")
    written = json.loads(out.read_text())
    assert written["machine"]["threads"] >= 1
    assert [result["n_experts"] for result in written["results"]] == [1, 4]
    for result in written["results"]:
        for key in ("step_ms", "gemm_ms_shape", "select_ms", "decode_ms", "backward_ms", "optimizer_ms"):
            assert result[key] > 0
        assert {"shape", "d", "n", "k", "batch", "pct_of_floor", "peak_mem_bytes", "peers"} <= set(result)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--shapes", "C9"], "unknown shape 'C9'"),
        (["--dead", "1.5"], "--dead 1.5"),
        (["--rounds", "0"], "--rounds 0"),
        (["--clock", "process"], "--clock process"),
        (["--peers", "mine"], "unknown peers mine"),
        (["--json", "no/such/directory/bench.json"], "no/such/directory/bench.json"),
        (["--ops", "triton"], "--ops triton"),
    ],
)
def test_command_refuses_a_wrong_request_in_one_line(
    wrong: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["harness.bench", *wrong])
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(message) and captured.err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    """While it waits for a contender, of rounds that would never end."""
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "harness.bench", "--shapes", "16x64x4x64", "--rounds", str(10**9)]
    command += ["--peers=", "--json", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver, contenders = psutil.Process(process.pid), []
    deadline = time.monotonic() + 120
    while not contenders and time.monotonic() < deadline:
        time.sleep(0.1)
        contenders = driver.children()
    assert contenders, "the contender never started"
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert (printed, errors) == ("", "interrupted; no file was written\n")
    assert not out.exists()
    assert not psutil.wait_procs(contenders, timeout=10)[1]


def test_flashinfer_is_had_or_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.delenv(VARIABLE, raising=False)
    answer = flashinfer_top_k()
    assert isinstance(answer, str) and answer.startswith("flashinfer cannot be imported") and VARIABLE in answer
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent.so"))
    answer = flashinfer_top_k()
    assert isinstance(answer, str) and "absent.so cannot be loaded" in answer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flashinfer_gives_ties_to_the_smaller_index(dtype: torch.dtype) -> None:
    top_k = flashinfer_top_k()
    if isinstance(top_k, str):
        pytest.skip(top_k)
    rows = torch.randn(256, 16384, generator=torch.Generator().manual_seed(0)).relu().to("cuda", dtype)
    rows[0] = 1.0
    values, index = top_k(rows, 32)
    expected = rows.sort(dim=1, descending=True, stable=True).indices[:, :32]
    assert index.sort(dim=1).values.equal(expected.sort(dim=1).values)
    assert values.equal(rows.gather(1, index))


@pytest.mark.parametrize("worker", [["-m", "harness.bench.ours"], [str(WORKER)]], ids=["ours", "peer"])
@pytest.mark.parametrize("sent", ["", '{"threads": 1, '], ids=["nothing", "half a line"])
def test_a_contender_ends_silently_if_its_driver_ends_before_the_task(worker: list[str], sent: str) -> None:
    done = subprocess.run([sys.executable, *worker], input=sent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_contender_ends_silently_if_its_driver_ends_before_the_answer(tmp_path: Path) -> None:
    (shape,) = parse_shapes("16x64x4x64")
    write_data(shape, tmp_path / "data")
    task = {"data": str(tmp_path / "data"), "device": "cpu", "n": shape.n, "d": shape.d, "k": shape.k, "threads": 1}
    task |= {"experts": shape.experts, "ops": "auto", "precision": "fp32", "clock": "wall", "dead": 0.0}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "harness.bench.ours"],
        input=json.dumps(task) + "\npeak\n",
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")
