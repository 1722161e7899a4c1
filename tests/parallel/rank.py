"""One rank of the mesh tests: `python -m tests.parallel.rank OUT`; the environment tells its rank.

One start per world size, many checks inside: starting ranks is what costs time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import save_file

from harness import budget
from harness.ops import choose_ops, reference
from harness.parallel import Shards
from harness.parallel.mesh import Mesh, mesh
from harness.process.rank import ranks_from_environment
from harness.process.signals import SAVE
from harness.record.checkpoint import find_checkpoint, load_tensors, save_checkpoint
from harness.training import evaluate as evaluation
from harness.training.evaluate import evaluate
from harness.training.mutual import take_step
from harness.training.state import make_state
from tests.parallel.preactivations import chosen, selections
from tests.parallel.trajectory import CASES, CATALOGUE, CPU, case_config, trajectory, with_peers
from tests.training.members import runtime, source_of

MESHES = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2), (4, 1)]}
STEPS = dict.fromkeys(CASES, 50) | dict.fromkeys([*CATALOGUE, "topk_mutual", "switch_mutual"], 12)
"""Latents can be dead from step 4, and the list of them is made anew at step 8."""


def selection_is_exact(shards: Shards) -> None:
    """Hypothesis draws the same examples on every rank (derandomised, no database, no shrinking), and a failure on one
    is made known to all, so that the ranks stay in step."""

    @settings(
        max_examples=250,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(selections(shards.shard))
    def check(case: tuple[torch.Tensor, int]) -> None:
        whole, k = case
        tokens, n = whole.shape
        rows = shards.rows(n)
        local = reference.select_preactivations(whole[:, rows], min(k, n // shards.shard))
        values = torch.full((tokens, k), -torch.inf)  # as `Ops.select` pads
        values[:, : local.values.shape[1]] = local.values
        kept = shards.keep(values, k, "selection")
        selected = torch.zeros(tokens, n // shards.shard, dtype=torch.bool)
        for token in range(tokens):
            selected[token, local.index[token, : int(kept[token])]] = True
        wrong = not torch.equal(selected, chosen(whole, k)[:, rows])
        assert int(shards.sum_(torch.tensor(int(wrong)), "all", "scalars")) == 0

    check()


def traffic_equals_the_formula(name: str, shards: Mesh) -> None:
    config = case_config(name, shards.dp, shards.shard)
    config.sae.aux_alpha = 0.0
    source, ops = source_of(config), choose_ops("reference")
    group = with_peers(config, source, runtime(shards, ops))
    member = group[0]
    batch = source.stream(0, 64, CPU, shards.dp_rank, shards.dp).batch(0)
    shards.take_sent()
    take_step(group, batch, runtime(shards, ops))
    formula = budget.bytes_sent_per_step(config, member.sae.d_model)
    line, prefix = member.log_line(shards), "bytes_sent_"
    counted = {name.removeprefix(prefix): sent for name, sent in line.items() if name.startswith(prefix) and sent}
    assert counted.keys() == formula.keys(), (counted, formula)
    for kind, sent in counted.items():
        assert abs(sent - formula[kind]) < 1e-6, (name, kind, sent, formula[kind])


def a_bad_batch_on_one_rank_stops_all(shards: Shards) -> None:
    config = case_config("switch_auxk", shards.dp, shards.shard)
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(shards, ops))
    stream = source.stream(0, 64, CPU, shards.dp_rank, shards.dp)
    member.train_step(stream.batch(0), runtime(shards, ops))
    before = member.params["W_enc"].clone()
    bad = stream.batch(1).clone()
    if shards.dp_rank == shards.dp - 1:
        bad[0, 0] = torch.nan
    member.train_step(bad, runtime(shards, ops))
    member.train_step(stream.batch(2), runtime(shards, ops))
    assert member.diverged_at() == 1
    assert torch.equal(member.params["W_enc"], before)


def weights_that_fail_on_one_rank_stop_all(shards: Shards) -> None:
    for name in ("topk", "switch"):
        config = case_config(name, shards.dp, shards.shard)
        source, ops = source_of(config), choose_ops("reference")
        member = make_state(config, source, runtime(shards, ops))
        if shards.rank == shards.size - 1:
            member.params["W_dec"].fill_(torch.nan)
        stream = source.stream(0, 64, CPU, shards.dp_rank, shards.dp)
        for step in range(2):
            member.train_step(stream.batch(step), runtime(shards, ops))
        assert member.diverged_at() == 0, name


def batches_that_no_axis_divides(shards: Shards) -> None:
    """Held-out rows in batches of which replicas get different numbers, the last one shorter than a replica's share."""
    for name in ("topk", "switch"):
        config = case_config(name, shards.dp, shards.shard)
        source, ops = source_of(config), choose_ops("reference")
        member = make_state(config, source, runtime(shards, ops))
        values = []
        for rows in (4096, 499, 107):  # 1500 rows: 1 batch; 4, the last of 3; 15, the last of 2
            evaluation.EVALUATION_BATCH = rows
            result = evaluate(member.sae, member.params, source, member.normalizer, (1500,), runtime(shards, ops))
            assert result is not None
            values.append(result[0].fvu)
        assert max(values) - min(values) < 1e-12 * values[0], (name, values)


def an_expert_without_tokens_on_any_rank(shards: Shards) -> None:
    config = case_config("switch_auxk", shards.dp, shards.shard)
    config.sae.dead_after_tokens = 1.0
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(shards, ops))
    member.params["W_r"].zero_()
    stream = source.stream(0, 64, CPU, shards.dp_rank, shards.dp)
    for step in range(8):
        member.train_step(stream.batch(step), runtime(shards, ops))
    assert member.diverged_at() is None


def checkpoint_loads_on_this_mesh(shards: Shards, root: Path) -> None:
    """Saved by this mesh and read back, and one that a single process saved is read too."""
    config = case_config("switch_auxk", shards.dp, shards.shard)
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(shards, ops))
    stream = source.stream(0, 64, CPU, shards.dp_rank, shards.dp)
    for step in range(5):
        member.train_step(stream.batch(step), runtime(shards, ops))
    save_checkpoint(root, 5, member.views(shards), {"x": 1}, "run", shards)
    kept = {name: value.clone() for name, value in member.tensors().items()}
    for tensor in member.tensors().values():
        tensor.zero_()
    checkpoint = find_checkpoint(root, "run", shards)
    assert checkpoint is not None and checkpoint.step == 5 and checkpoint.directory is not None
    load_tensors(checkpoint.directory, member.views(shards), shards)
    for name, value in member.tensors().items():
        assert torch.equal(value, kept[name]), name


def saving_is_no_reason_to_stop_an_evaluation(shards: Shards) -> None:
    config = case_config("topk", shards.dp, shards.shard)
    source, ops = source_of(config), choose_ops("reference")
    member = make_state(config, source, runtime(shards, ops))
    shards.agree(SAVE if shards.rank == 0 else 0)
    assert evaluate(member.sae, member.params, source, member.normalizer, (500,), runtime(shards, ops)) is not None
    shards.agree(0)


def main(out: Path) -> None:
    ranks = ranks_from_environment()
    world, port = ranks.world, int(os.environ["MASTER_PORT"])
    for number, (dp, shard) in enumerate(MESHES[world]):
        # one rendezvous for each mesh: a rank that is early must not meet the others in the last one
        os.environ["MASTER_PORT"] = str(port + number)
        with mesh(dp, shard, CPU, ranks) as shards:
            assert isinstance(shards, Mesh)
            here = out / f"dp{dp}-shard{shard}"
            if shards.rank == 0:
                here.mkdir()
            shards.barrier()
            selection_is_exact(shards)
            for name in CASES:
                tensors = trajectory(case_config(name, dp, shard), shards, STEPS[name])
                if shards.rank == 0:
                    save_file(tensors, here / f"{name}.safetensors")
                if name not in CATALOGUE:
                    traffic_equals_the_formula(name, shards)
            tensors = trajectory(case_config("topk_auxk", dp, shard, "fp32"), shards, 200)
            if shards.rank == 0:
                save_file(tensors, here / "topk_auxk_fp32.safetensors")
            a_bad_batch_on_one_rank_stops_all(shards)
            weights_that_fail_on_one_rank_stop_all(shards)
            batches_that_no_axis_divides(shards)
            an_expert_without_tokens_on_any_rank(shards)
            checkpoint_loads_on_this_mesh(shards, here / "checkpoints")
            saving_is_no_reason_to_stop_an_evaluation(shards)
            assert [shards.agree(bits) for bits in (1 << shards.rank, 0, 0)] == [0, (1 << world) - 1, 0]
        left = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
        assert not [thread for thread in left if "gloo" in thread], left


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
