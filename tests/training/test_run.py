"""A run from its first step to its result: record, resume, divergence, convergence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness import status
from harness.config import Config, to_container
from harness.process.signals import Interrupted, StopFlag
from harness.record import metrics
from harness.schema import with_seal
from harness.training.state import TrainState
from tests.parallel.trajectory import CATALOGUE
from tests.training.members import run, runtime, small_config, source_of

SWITCH = {
    "sae__architecture": "switch",
    "sae__n_experts": 4,
    "sae__balance_weight": 0.1,
    "train__clip_norm": 0.5,
    "train__ema": 0.9,
    "train__warmup_tokens": 640,
    "train__decay_fraction": 0.3,
}

CONTRACT = {
    *("status", "run_id", "sae", "n_latents", "k", "n_experts", "d_model", "seed", "tokens", "unique_tokens", "steps"),
    *("flops", "params", "fvu", "mse", "l0", "dead_frac", "wall_s", "tokens_per_s", "converged", "config"),
}


class StopAfterSteps(StopFlag):
    """Asks to stop once a member has made that many steps."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        train_step = TrainState.train_step

        def counted(member: TrainState, *arguments) -> None:
            train_step(member, *arguments)
            if member.done == steps:
                self.request()

        monkeypatch.setattr(TrainState, "train_step", counted)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "sae" / "sae.safetensors")


def lines_without_clock(directory: Path) -> list[dict]:
    lines = metrics.read(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("wall_s", "tokens_per_s")} for line in lines]


def test_a_run_leaves_the_record_of_the_contract(tmp_path: Path) -> None:
    config = small_config()
    result = run(tmp_path / "run", config)
    assert set(result) >= CONTRACT
    assert with_seal(result) == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "done" and result["steps"] == 100 and result["tokens"] == 6400
    assert 0 < result["fvu"] < 0.5 and 0 < result["fvu_se"] < 0.1 and result["l0"] <= 4
    assert 0 < result["pca_fvu"]["4"] < 1
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and set(range(10, 101, 10)) <= set(steps)
    evaluations = [line for line in lines if "fvu" in line]
    assert evaluations[-1]["step"] == 100 and evaluations[-1]["fvu"] == result["fvu"]
    assert evaluations[-1]["eval_rows"] == 1500 and evaluations[0]["eval_rows"] == 512
    assert {"recovered", "mean_max_cosine"} <= set(evaluations[0])
    assert not (tmp_path / "run" / "checkpoints").exists()
    file = tmp_path / "run" / "heldout.parquet"
    assert result["heldout_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    sums = pd.read_parquet(file)
    assert list(sums) == ["document", "documents", "rows", "error", "variance"] and len(sums) == 1500
    assert sums["error"].sum() / sums["variance"].sum() == pytest.approx(result["fvu"], rel=1e-12)
    norms = weights(tmp_path / "run")["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(64))


def test_kernels_are_pinned_where_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        run(tmp_path / "run", dataclasses.replace(config, ops="reference"), StopAfterSteps(40, patched))
    resumed = run(tmp_path / "run", config)
    assert config.ops == "auto" and resumed["ops"] == "reference"
    run(tmp_path / "whole", dataclasses.replace(config, ops="reference"))
    for one, two in zip(weights(tmp_path / "run").values(), weights(tmp_path / "whole").values(), strict=True):
        assert torch.equal(one, two)


def test_kernels_that_do_not_run_here_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = small_config()
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        run(tmp_path / "run", config, StopAfterSteps(40, patched))
    (marker,) = tmp_path.glob("run/checkpoints/*/marker.json")
    content = json.loads(marker.read_text())
    assert content["extra"]["run"]["ops"] == "cpu"
    content["extra"]["run"]["ops"] = "triton"
    content = with_seal(content)
    marker.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"made with ops=triton, which does not run here.*ops=reference"):
        run(tmp_path / "run", config)
    assert run(tmp_path / "run", dataclasses.replace(config, ops="reference"))["ops"] == "reference"


RESUMED = [("topk", {}, step) for step in (1, 37, 50, 99, 100)] + [
    ("switch", SWITCH, step) for step in (1, 37, 50, 99, 100)
]
RESUMED.append(("signum", {"train__optimizer": "signum", "train__schedule": "cosine"}, 37))
RESUMED += [(name, changes, 37) for name, changes in CATALOGUE.items()]


@pytest.mark.parametrize(
    ("changes", "stopped_at"), [case[1:] for case in RESUMED], ids=[f"{n}-{s}" for n, _, s in RESUMED]
)
def test_resume_is_bit_identical(changes, stopped_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(**changes)
    run(tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        run(tmp_path / "cut", config, StopAfterSteps(stopped_at, patch))
    assert not (tmp_path / "cut" / "result.json").exists()
    result = run(tmp_path / "cut", config)
    assert result["status"] == "done"
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name
    lines = lines_without_clock(tmp_path / "whole")
    assert lines == lines_without_clock(tmp_path / "cut") and any("gain" in line for line in lines)


def test_a_non_finite_loss_ends_the_run_with_the_weights_from_before(tmp_path: Path) -> None:
    config = small_config(train__lr=1e30, train__tokens=6400)
    result = run(tmp_path / "run", config)
    assert result["status"] == "diverged" and result["fvu"] is None
    assert 0 < result["diverged_at_step"] <= result["steps"] <= 10


def test_weights_that_fail_on_held_out_rows_only_have_diverged_too(tmp_path: Path) -> None:
    result = run(tmp_path / "run", small_config(train__lr=1e6, train__tokens=64 * 5))
    assert result["status"] == "diverged" and result["diverged_at_step"] == 5 and result["fvu"] is None


def test_a_bad_batch_withholds_every_later_update(tmp_path: Path) -> None:
    from harness.ops import choose_ops
    from harness.parallel import Solo
    from harness.training.state import make_state

    config = small_config()
    source = source_of(config)
    ops = choose_ops("reference")
    member = make_state(config, source, runtime(Solo(), ops))
    stream = source.stream(0, 64, torch.device("cpu"))
    member.train_step(stream.batch(0), runtime(Solo(), ops))
    before = {name: tensor.clone() for name, tensor in member.optimizer.state().items()}
    bad = stream.batch(1).clone()
    bad[3, 2] = torch.inf
    member.train_step(bad, runtime(Solo(), ops))
    member.train_step(stream.batch(2), runtime(Solo(), ops))
    assert member.diverged_at() == 1
    for name, tensor in member.optimizer.state().items():
        assert torch.equal(tensor, before[name]), name


def test_until_convergence_stops_before_the_cap(tmp_path: Path) -> None:
    config = small_config(train__until="convergence", train__tokens=64 * 4000, train__convergence_epsilon=0.2)
    result = run(tmp_path / "run", config)
    assert result["converged"] and result["steps"] < 4000
    evaluations = [line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "fvu" in line]
    assert evaluations[-1]["step"] == result["steps"] and evaluations[-1]["eval_rows"] == 1500
    assert len({line["step"] for line in evaluations}) == len(evaluations)
    assert result["gain"] == evaluations[-1]["gain"] < 0.2 and 0 < result["gain_se"] < 0.05


def test_reaching_the_cap_is_not_convergence(tmp_path: Path) -> None:
    config = small_config(train__until="convergence", train__tokens=64 * 60, train__convergence_epsilon=1e-6)
    result = run(tmp_path / "run", config)
    assert not result["converged"] and result["steps"] == 60


def test_a_flop_budget_buys_whole_batches(tmp_path: Path) -> None:
    from harness import budget

    config = small_config(train__tokens=0, train__flops=5e7)
    result = run(tmp_path / "run", config)
    per_batch = 64 * sum(budget.flops_per_token(config.sae, 16, 64).values())
    assert result["steps"] == int(5e7 // per_batch)
    assert result["flops"] == pytest.approx(result["steps"] * per_batch)


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path, caplog, monkeypatch) -> None:
    config = small_config()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        run(tmp_path / "first", config, StopAfterSteps(20, patch))
    other = tmp_path / "second"
    other.mkdir()
    (tmp_path / "first" / "checkpoints").rename(other / "checkpoints")
    result = run(other, config)
    assert result["status"] == "done"
    assert "refused: it belongs to run first" in caplog.text
    (note,) = result["notes"]
    assert note.endswith("checkpoint step-0000000020 refused: it belongs to run first")


def test_a_refused_checkpoint_is_in_the_record_and_shown_by_status(tmp_path: Path, monkeypatch, capsys) -> None:
    config = small_config(train__checkpoint_every_steps=7)
    cut = tmp_path / "sweep" / "run"
    (cut / "attempts" / "1").mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        run(cut, config, StopAfterSteps(20, patch))
    (cut / "config.yaml").write_text(yaml.safe_dump(to_container(config)))
    (file,) = (cut / "checkpoints" / "step-0000000020").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        run(cut, config, StopAfterSteps(30, patch))
    assert status.main([str(tmp_path / "sweep")]) == 0
    assert re.search(r": .*checkpoint step-0000000020 refused: .* bytes instead of", capsys.readouterr().out)
    result = run(cut, config)  # the note is of an earlier attempt
    assert len(result["notes"]) == 1 and "step-0000000020 refused" in result["notes"][0]
    whole = run(tmp_path / "whole", config)
    assert whole["notes"] == [] and lines_without_clock(cut) == lines_without_clock(tmp_path / "whole")


@pytest.mark.slow
def test_synthetic_features_are_recovered(tmp_path: Path) -> None:
    config = small_config(train__tokens=64 * 1500)
    result = run(tmp_path / "run", config)
    assert result["recovered"] > 0.5 and result["mean_max_cosine"] > 0.8


def test_layernorm_reports_both_spaces(tmp_path: Path) -> None:
    result = run(tmp_path / "run", small_config(sae__normalize="layernorm", sae__match_init_norm=True))
    assert 0 < result["fvu"] < 1 and 0 < result["fvu_raw"] < 1
    sums = pd.read_parquet(tmp_path / "run" / "heldout.parquet")
    assert sums["error_raw"].sum() / sums["variance_raw"].sum() == pytest.approx(result["fvu_raw"], rel=1e-12)


def test_precisions(tmp_path: Path) -> None:
    found: dict[str, float] = {}
    for precision in ("fp64", "fp32", "bf16"):
        config: Config = small_config(train__precision=precision, train__tokens=64 * 300)
        found[precision] = run(tmp_path / precision, config)["fvu"]
    assert found["fp32"] == pytest.approx(found["fp64"], rel=1e-2)
    assert found["bf16"] == pytest.approx(found["fp64"], rel=0.1)
