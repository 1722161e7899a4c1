"""Peers in training: what one learns depends on its peers and on nothing else that shares the job."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from harness.config import Config
from harness.errors import UserError
from harness.process.signals import Interrupted
from harness.record import metrics
from harness.training import loop
from harness.training.mutual import take_step
from harness.training.schedule import mfr_weight_at
from harness.training.state import make_state
from tests.training.members import run, runtime, small_config, source_of
from tests.training.test_pack import StopAtStep, assert_equal_runs, together

COMMON = {"train__tokens": 64 * 24, "train__eval_points": 2, "train__lr": 1e-2}
PEERS = COMMON | {"train__mfr_weight": 20.0, "train__mfr_seeds": [0, 1, 2]}
PLAIN = small_config(**COMMON)


def group(**changes: object) -> dict[str, Config]:
    return {f"m{seed}": small_config(**PEERS | changes, train__seed=seed) for seed in (2, 0, 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    results = together(root, group())
    assert {result["status"] for result in results.values()} == {"done"}
    return root


def test_the_weight_rises_along_a_cosine_over_100_steps() -> None:
    config = group()["m0"]
    assert [mfr_weight_at(config, step) for step in (0, 50, 100, 5000)] == pytest.approx([0, 10, 20, 20])
    assert mfr_weight_at(config, 10) == pytest.approx(20 * 0.0244717, rel=1e-5)


def test_peers_approach_each_other(whole: Path) -> None:
    mutual = [line["mutual"] for line in metrics.read(whole / "m0" / "metrics.jsonl") if "mutual" in line]
    assert mutual[-1] < 0.8 * mutual[0] < 0.8


def test_what_else_is_in_the_job_does_not_matter(whole: Path, tmp_path: Path) -> None:
    """Another group, an SAE without peers; and the order in which the peers stand."""
    others = {"plain": PLAIN} | {f"other {name}": config for name, config in group(train__mfr_weight=0.5).items()}
    together(tmp_path, others | dict(sorted(group().items())))
    for name in group():
        assert_equal_runs(whole / name, tmp_path / name)
    run(tmp_path / "alone", PLAIN)
    assert_equal_runs(tmp_path / "alone", tmp_path / "plain")


def test_all_gradients_are_taken_before_the_first_update() -> None:
    """A step of peers is the step of each beside frozen copies of the others."""
    configs, source = list(group().values()), source_of(PLAIN)
    batch = source.stream(0, 64, torch.device("cpu")).batch(0)

    def states() -> list:
        made = [make_state(config, source, runtime()) for config in configs]
        for state in made:
            state.done = 50
        return made

    members = states()
    take_step(members, batch, runtime())
    for place, member in enumerate(members):
        fresh = states()
        take_step([fresh[place], *(other for other in fresh if other is not fresh[place])], batch, runtime())
        assert torch.equal(fresh[place].params["W_dec"], member.params["W_dec"])


@pytest.mark.parametrize("looks", [3, 31])
def test_killed_and_resumed_bit_for_bit(whole: Path, tmp_path: Path, looks: int) -> None:
    """Also between the final evaluations of three peers."""
    with pytest.raises(Interrupted):
        together(tmp_path, group(), StopAtStep(looks))
    together(tmp_path, group())
    for name in group():
        assert_equal_runs(whole / name, tmp_path / name)


def test_a_kill_between_the_results_of_peers(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def finish_once(member, *arguments) -> None:
        if ended:
            raise KeyboardInterrupt
        ended.append(member.run.run_id)
        finish(member, *arguments)

    finish = loop.finish
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "finish", finish_once)
        together(tmp_path, group())
    assert ended == ["m0"]
    together(tmp_path, group())
    for name in group():
        assert_equal_runs(whole / name, tmp_path / name)


def test_a_run_without_its_peers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.mfr_seeds=\[0, 1, 2\], and the one with train.seed=1"):
        run(tmp_path / "m0", group()["m0"])
    cells = group()
    cells["m1"] = dataclasses.replace(cells["m1"], train=dataclasses.replace(cells["m1"].train, lr=1e-3))
    with pytest.raises(UserError, match="all else equal"):
        together(tmp_path, cells)


def test_peers_diverge_together_at_the_step_of_the_first() -> None:
    configs, source = list(group().values()), source_of(PLAIN)
    members = [make_state(config, source, runtime()) for config in configs]
    stream = source.stream(0, 64, torch.device("cpu"))
    take_step(members, stream.batch(0), runtime())
    members[1].params["b_dec"][3] = torch.nan
    before = members[0].params["W_dec"].clone()
    for step in (1, 2):
        take_step(members, stream.batch(step), runtime())
    assert [member.diverged_at() for member in members] == [1, 1, 1]
    assert torch.equal(members[0].params["W_dec"], before)


def test_the_record_counts_the_comparison(whole: Path) -> None:
    result = json.loads((whole / "m0" / "result.json").read_text())
    # two peers, 64 × 64 cosines of 16 dimensions, 24 steps
    plain = 24 * 64 * _per_token(PLAIN)
    assert result["flops"] - plain == pytest.approx(24 * 2 * 2 * 64 * 64 * 16)


def _per_token(config: Config) -> float:
    from harness import budget

    return sum(budget.flops_per_token(config.sae, 16, 64).values())
