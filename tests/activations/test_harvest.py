"""The store that comes out: right rows, same bytes however it was made."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.activations.lm.contexts import kept_positions, open_contexts
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_model
from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.activations.statistics import layernorm_rows
from harness.activations.store.assemble import assemble
from harness.activations.store.harvest import Plan, _check_disk, describe, forward_units, prepare, unit_path
from harness.activations.store.identity import store_id
from harness.activations.store.values import check_once, facts_of, norms, note_on_norms
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.process.signals import Interrupted, StopFlag


def opened(cfg: ActivationsConfig, out: Path) -> ActivationSource:
    return open_source(cfg, out, progress=False, stop=StopFlag())


def all_rows(source: ActivationSource) -> torch.Tensor:
    assert source.train_rows is not None
    return source.stream(0, source.train_rows, torch.device("cpu")).batch(0)


def sorted_rows(rows: torch.Tensor) -> np.ndarray:
    return np.array(sorted(rows.double().tolist()))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_rows_are_the_hidden_states_of_the_kept_positions(
    tiny: ActivationsConfig, models_on_disk: dict[str, Path], tmp_path: Path, family: str
) -> None:
    cfg = dataclasses.replace(tiny, model=str(models_on_disk[family]))
    partial = tmp_path / "partial"
    partial.mkdir()
    plan, _ = prepare(cfg, partial, StopFlag())
    model = transformers.AutoModel.from_pretrained(cfg.model, dtype=torch.float32).eval()
    contexts = open_contexts(partial, "train")
    expected = []
    for number in range(contexts.count):
        ids = np.array(contexts.ids[contexts.offsets[number] : contexts.offsets[number + 1]])
        kept = np.flatnonzero(kept_positions(ids, plan.dropped_ids, True))
        kept = kept[: contexts.rows[number + 1] - contexts.rows[number]]
        with torch.no_grad():
            states = model(torch.from_numpy(ids)[None].long(), output_hidden_states=True).hidden_states
        expected.append(states[cfg.layer + 1][0, kept])
    source = opened(cfg, tmp_path)
    assert source.train_rows == cfg.tokens and source.d_model == 16
    np.testing.assert_allclose(sorted_rows(all_rows(source)), sorted_rows(torch.cat(expected)), rtol=2e-4, atol=2e-5)


def test_a_store_of_another_precision_is_named(
    tiny: ActivationsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision in ("fp32", "bf16"):
        cfg = dataclasses.replace(tiny, lm_precision=precision)
        open_source(cfg, tmp_path, progress=True, stop=StopFlag())
    assert "were computed in fp32, not in activations.lm_precision=bf16" in capsys.readouterr().err


def test_statistics_are_those_of_the_stored_rows(tiny: ActivationsConfig, tmp_path: Path) -> None:
    source = opened(dataclasses.replace(tiny, dtype="bf16"), tmp_path)
    rows = all_rows(source)
    assert rows.dtype == torch.bfloat16
    for layernorm in (False, True):
        x = layernorm_rows(rows.double()) if layernorm else rows.double()
        statistics = source.statistics(layernorm)
        assert statistics.count == 3000 and statistics.mean.dtype == torch.float64
        torch.testing.assert_close(statistics.mean, x.mean(dim=0), rtol=1e-12, atol=1e-14)
        assert statistics.mean_sq_norm == pytest.approx(float(x.square().sum(1).mean()), rel=1e-12)
        assert statistics.variance == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), rel=1e-10)
        held = torch.cat([rows for rows, _ in source.heldout(70)])
        held = (layernorm_rows(held.double()) if layernorm else held.double()) - statistics.mean
        squares = torch.linalg.svdvals(held).square()
        assert statistics.explained is not None
        torch.testing.assert_close(statistics.explained, squares.cumsum(0) / squares.sum())
    assert source.sample().dtype == torch.float32 and len(source.sample()) == 3000


def test_layernorm_rule_of_a_constant_row_is_zero() -> None:
    rows = layernorm_rows(torch.tensor([[3.0, 3.0], [1.0, -1.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.0, 0.0], [0.5**0.5, -(0.5**0.5)]]))


def test_held_out_rows_carry_their_documents_in_a_mixed_order(tiny: ActivationsConfig, tmp_path: Path) -> None:
    cfg = dataclasses.replace(tiny, shard_rows=100)
    source = opened(cfg, tmp_path)
    batches = list(source.heldout(70))
    rows, document = torch.cat([x for x, _ in batches]), torch.cat([d for _, d in batches])
    assert len(rows) == source.heldout_rows == 300 and document.dtype == torch.int64
    assert len(document[:100].unique()) > 0.8 * len(document.unique())  # a prefix meets nearly all documents
    again = list(source.heldout(70))
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(batches, again, strict=True))
    assert len({tuple(row) for row in rows.tolist()} & {tuple(row) for row in all_rows(source).tolist()}) == 0


def test_the_order_does_not_depend_on_the_size_of_shards(tiny: ActivationsConfig, tmp_path: Path) -> None:
    large = all_rows(opened(dataclasses.replace(tiny, shard_rows=10_000), tmp_path / "large"))
    small = all_rows(opened(dataclasses.replace(tiny, shard_rows=333), tmp_path / "small"))
    assert torch.equal(large, small)


def test_the_store_is_shuffled(tiny: ActivationsConfig, tmp_path: Path) -> None:
    """Neighbours in the store come from unrelated places of the text: no correlation beyond that of any two rows."""
    rows = all_rows(opened(tiny, tmp_path))
    rows = rows - rows.mean(dim=0)
    neighbours = float((rows[:-1] * rows[1:]).sum() / rows[:-1].square().sum())
    assert abs(neighbours) < 0.05


def test_a_store_is_made_once_and_says_what_it_holds(tiny: ActivationsConfig, tmp_path: Path) -> None:
    source = opened(tiny, tmp_path)
    directory = tmp_path / "_activations" / store_id(tiny)
    assert source.id == store_id(tiny)
    assert sorted(path.name for path in directory.parent.iterdir()) == [directory.name]  # no lock, no partial
    made = (directory / "manifest.json").stat().st_mtime_ns
    opened(tiny, tmp_path)
    assert (directory / "manifest.json").stat().st_mtime_ns == made
    described = source.description
    assert described["hook"] == "resid_post" and described["layer"] == 1 and described["precision"] == "fp32"
    assert described["drop_first_position"] is True and described["prefix_tokens"] == 1
    assert described["harvest_flops"] > 0 and source.dictionary is None
    manifest = json.loads((directory / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]["train"]] == [1000, 1000, 1000]
    assert (directory / "train-00000.safetensors").stat().st_mode & 0o777 == manifest_mode(directory)


def manifest_mode(directory: Path) -> int:
    return (directory / "manifest.json").stat().st_mode & 0o777


BIG = {"tokens": 9000, "heldout_tokens": 600, "context": 8}
"""For several work units of 1600 tokens."""

WORKER = textwrap.dedent("""
    import os, signal, sys, torch
    from pathlib import Path
    import harness.activations.store.harvest as harvest
    from harness.activations.open import open_source
    from harness.config import ActivationsConfig
    from harness.parallel import Solo
    from harness.process.signals import StopFlag
    torch.set_num_threads(1)
    harvest.UNIT_TOKENS = 1600
    settings, mode, out = eval(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    cfg = ActivationsConfig(**settings)
    if mode == "kill":
        done = 0
        def forward_units(*arguments):
            def die(rows):
                global done
                done += rows
                if done > 4000:
                    os.kill(os.getpid(), signal.SIGKILL)
            harvest.forward_units(*arguments[:4], die, *arguments[5:])
        import harness.activations.open as opening
        opening.forward_units = forward_units
        open_source(cfg, out, progress=False, stop=StopFlag())
    elif mode == "whole":
        open_source(cfg, out, progress=True, stop=StopFlag())
    else:
        plan, hooked = harvest.prepare(cfg, out, StopFlag())
        shards = Solo()
        shards.rank, shards.size = int(mode), 2
        harvest.forward_units(plan, hooked, out, StopFlag(), lambda rows: None, shards)
""")


def run_worker(cfg: ActivationsConfig, mode: str, out: Path) -> subprocess.CompletedProcess[str]:
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "synthetic"}
    return subprocess.run(
        [sys.executable, "-c", WORKER, repr(fields), mode, str(out)], capture_output=True, text=True, timeout=120
    )


def manifest_of(directory: Path) -> str:
    return (directory / "manifest.json").read_text()


@pytest.mark.slow
def test_killed_or_divided_the_store_is_the_same(
    tiny: ActivationsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.activations.store.harvest.UNIT_TOKENS", 1600)
    cfg = dataclasses.replace(tiny, **BIG)
    opened(cfg, tmp_path / "whole")
    expected = manifest_of(tmp_path / "whole" / "_activations" / store_id(cfg))

    killed = run_worker(cfg, "kill", tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    root = tmp_path / "killed" / "_activations"
    partial = root / f"{store_id(cfg)}.partial"
    units = sorted((partial / "units").glob("*.safetensors"))
    assert len(units) > 2 and not (root / store_id(cfg)).exists()
    made = units[0].stat().st_mtime_ns
    resumed = threading.Event()

    class Watch(StopFlag):
        """Sees, at the first forward after the resume, that finished units were kept."""

        @property
        def requested(self) -> bool:
            resumed.set()
            assert not units[0].exists() or units[0].stat().st_mtime_ns == made
            return False

    open_source(cfg, tmp_path / "killed", progress=False, stop=Watch())
    assert resumed.is_set()
    assert manifest_of(root / store_id(cfg)) == expected
    assert sorted(path.name for path in root.iterdir()) == [store_id(cfg)]

    divided = tmp_path / "divided"
    divided.mkdir()
    plan, _ = prepare(cfg, divided, StopFlag())
    for worker in ("0", "1"):
        done = run_worker(cfg, worker, divided)
        assert done.returncode == 0, done.stderr
    assemble(plan, divided, cfg.shard_rows, describe(cfg, plan), StopFlag())
    assert manifest_of(divided) == expected


def test_a_request_to_stop_interrupts_and_the_same_call_goes_on(
    tiny: ActivationsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.activations.store.harvest.UNIT_TOKENS", 800)
    expected = all_rows(opened(tiny, tmp_path / "whole"))

    class After(StopFlag):
        looks = 0

        @property
        def requested(self) -> bool:
            self.looks += 1
            return self.looks > 25

    with pytest.raises(Interrupted):
        open_source(tiny, tmp_path, progress=False, stop=After())
    assert not (tmp_path / "_activations" / store_id(tiny)).exists()
    assert torch.equal(all_rows(opened(tiny, tmp_path)), expected)


def test_a_torn_unit_is_made_again(tiny: ActivationsConfig, tmp_path: Path) -> None:
    expected = all_rows(opened(tiny, tmp_path / "whole"))
    partial = tmp_path / "_activations" / f"{store_id(tiny)}.partial"
    partial.mkdir(parents=True)
    plan, hooked = prepare(tiny, partial, StopFlag())
    forward_units(plan, hooked, partial, StopFlag(), lambda rows: None)
    torn = unit_path(partial, "train", 0)
    torn.write_bytes(torn.read_bytes()[:-100])
    assert torch.equal(all_rows(opened(tiny, tmp_path)), expected)


def test_a_half_made_store_of_an_earlier_version_is_continued(tiny: ActivationsConfig, tmp_path: Path) -> None:
    """It kept its plan in `plan.json`."""
    expected = manifest_of(tmp_path / "whole" / "_activations" / opened(tiny, tmp_path / "whole").id)
    partial = tmp_path / "_activations" / f"{store_id(tiny)}.partial"
    partial.mkdir(parents=True)
    plan, hooked = prepare(tiny, partial, StopFlag())
    forward_units(plan, hooked, partial, StopFlag(), lambda rows: None)
    (partial / "harvest.json").rename(partial / "plan.json")
    units = {path.name: path.stat().st_mtime_ns for path in (partial / "units").iterdir()}
    assert prepare(tiny, partial, StopFlag())[0] == plan
    assert not (partial / "harvest.json").exists()
    forward_units(plan, hooked, partial, StopFlag(), lambda rows: None)
    assert {path.name: path.stat().st_mtime_ns for path in (partial / "units").iterdir()} == units
    opened(tiny, tmp_path)
    store = tmp_path / "_activations" / store_id(tiny)
    assert manifest_of(store) == expected
    assert not (store / "plan.json").exists() and not (store / "units").exists()


def test_a_finished_store_keeps_no_temporary_file_of_a_killed_attempt(tiny: ActivationsConfig, tmp_path: Path) -> None:
    partial = tmp_path / "_activations" / f"{store_id(tiny)}.partial"
    partial.mkdir(parents=True)
    prepare(tiny, partial, StopFlag())
    (partial / ".train-00001.safetensors.4711.tmp").write_bytes(b"half a shard")
    opened(tiny, tmp_path)
    names = {path.name for path in (tmp_path / "_activations" / store_id(tiny)).iterdir()}
    shards = {f"train-{number:05d}.safetensors" for number in range(3)} | {"heldout-00000.safetensors"}
    assert names == shards | {"statistics.safetensors", "manifest.json", "verified.json", "checked.json"}


def test_two_processes_that_need_the_same_store_harvest_it_once(tiny: ActivationsConfig, tmp_path: Path) -> None:
    fields = {f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny) if f.name != "synthetic"}
    command = [sys.executable, "-c", WORKER, repr(fields), "whole", str(tmp_path)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    logs = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    assert sum("harvested 3,000 training" in log for log in logs) == 1
    assert len(list((tmp_path / "_activations").iterdir())) == 1


def test_the_disk_is_checked_before_harvesting(tiny: ActivationsConfig, tmp_path: Path) -> None:
    plan, _ = prepare(tiny, tmp_path, StopFlag())
    enormous = plan._replace(rows={"train": 10**13, "heldout": 1})
    assert isinstance(enormous, Plan)
    with pytest.raises(UserError, match=r"harvesting needs [\d,]+ MB in .* set activations.dir to a larger disk"):
        _check_disk(enormous, tmp_path)


def test_an_unwritable_place_is_one_line(tiny: ActivationsConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write activations to"):
        opened(tiny, tmp_path / "file")


def test_values_that_fp16_cannot_hold_are_refused(
    tiny: ActivationsConfig, models_on_disk: dict[str, Path], tmp_path: Path
) -> None:
    cfg = dataclasses.replace(tiny, model=str(models_on_disk["gpt2"]), dtype="fp16")
    hooked = load_model(cfg, locate(cfg), "fp32", torch.device("cpu"))
    hooked.model.get_input_embeddings().weight.data *= 1e6  # pyright: ignore
    hooked.model.save_pretrained(tmp_path / "huge")  # pyright: ignore
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "huge" / name).write_bytes((models_on_disk["gpt2"] / name).read_bytes())
    with pytest.raises(UserError, match=r"set activations\.dtype=bf16"):
        opened(dataclasses.replace(cfg, model=str(tmp_path / "huge")), tmp_path)


def test_a_tokenizer_of_another_model_is_refused(
    tiny: ActivationsConfig, models_on_disk: dict[str, Path], tmp_path: Path
) -> None:
    cfg = dataclasses.replace(tiny, model=str(models_on_disk["gpt2"]))
    hooked = load_model(cfg, locate(cfg), "fp32", torch.device("cpu"))
    hooked.model.resize_token_embeddings(50)  # pyright: ignore
    hooked.model.save_pretrained(tmp_path / "small")  # pyright: ignore
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((models_on_disk["gpt2"] / name).read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        opened(dataclasses.replace(cfg, model=str(tmp_path / "small")), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 7}, "has 3 blocks"),
        ({"context": 2}, "no room beside the special tokens"),
        ({"heldout_tokens": 1}, "the 1 held-out rows of activations are all equal"),
        ({"tokens": 1, "heldout_tokens": 20}, "the 1 training rows of activations are all equal"),
    ],
)
def test_a_refused_harvest_leaves_nothing_behind(
    tiny: ActivationsConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(dataclasses.replace(tiny, **change), tmp_path)
    assert list((tmp_path / "_activations").iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_shard_of_values_beyond_sense_is_refused_at_every_opening(
    tiny: ActivationsConfig, tmp_path: Path, split: str, value: float
) -> None:
    opened(tiny, tmp_path)
    shard = tmp_path / "_activations" / store_id(tiny) / f"{split}-00000.safetensors"
    tensors = load_file(shard)
    tensors["x"][7, 3] = value
    save_file(tensors, shard)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{shard.name} holds activations of (nan|inf|1e\+30)"):
            check_once(shard.parent)


def test_values_are_checked_once(tiny: ActivationsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tiny, tmp_path)
    opened(tiny, tmp_path)
    monkeypatch.setattr("harness.activations.store.values.facts_of", None)
    opened(tiny, tmp_path)


def test_norms_of_a_few_huge_rows_are_noted(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 16, generator=generator)
    even = norms("train", [facts_of(rows, tmp_path)])
    assert note_on_norms(even) is None
    norm = rows.double().norm(dim=1)
    assert even["median"] == pytest.approx(float(norm.quantile(0.5)), rel=1e-6)
    rows[:10] *= 1000
    sink = norms("train", [facts_of(part, tmp_path) for part in rows.split(300)])
    norm = rows.double().norm(dim=1).sort().values
    assert sink["top_share"] == pytest.approx(float(norm[-10:].square().sum() / norm.square().sum()), rel=1e-6)
    assert "1 % of the training rows hold 100.0% of the sum of squared norms" in str(note_on_norms(sink))
