"""One pass of the model for many hooks: the stores are those of separate harvests, byte by byte."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness.activations.lm.model import HookedModel
from harness.activations.open import open_source
from harness.activations.store.harvest import prepare
from harness.activations.store.identity import store_id
from harness.activations.store.read import Store
from harness.activations.store.values import CHECKED
from harness.activations.store.verify import VERIFIED
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.process.signals import Interrupted, StopFlag
from tests.activations.test_harvest import all_rows, opened

POINTS = [(1, "resid_post"), (0, "resid_post"), (1, "mlp_out"), (2, "attn_out")]


@pytest.fixture
def configs(tiny: ActivationsConfig, models_on_disk: dict[str, Path]) -> list[ActivationsConfig]:
    llama = dataclasses.replace(tiny, model=str(models_on_disk["llama"]), dtype="bf16", outlier_factor=1.2)
    return [dataclasses.replace(llama, layer=layer, hook=hook) for layer, hook in POINTS]


def files_of(out: Path, cfg: ActivationsConfig) -> dict[str, bytes]:
    directory = out / "_activations" / store_id(cfg)
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (CHECKED, VERIFIED)}


class Counted:
    """Counts forwards of the language model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = 0
        original = HookedModel.all_activations

        def counted(model: HookedModel, *arguments: torch.Tensor) -> list[torch.Tensor]:
            self.forwards += 1
            return original(model, *arguments)

        monkeypatch.setattr(HookedModel, "all_activations", counted)


def test_one_pass_gives_the_stores_of_separate_harvests(
    configs: list[ActivationsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    for cfg in configs:
        opened(cfg, tmp_path / "apart")
    apart, counted.forwards = counted.forwards, 0
    open_source(configs[0], tmp_path / "together", progress=False, stop=StopFlag(), others=configs)
    assert counted.forwards * len(configs) == apart
    for cfg in configs:
        assert files_of(tmp_path / "together", cfg) == files_of(tmp_path / "apart", cfg)


def test_a_stopped_pass_goes_on_for_all_hooks(
    configs: list[ActivationsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.activations.store.harvest.UNIT_TOKENS", 800)

    class AfterAUnit(StopFlag):
        @property
        def requested(self) -> bool:
            return any((tmp_path / "out" / "_activations").glob("*.partial/units/*.safetensors"))

    counted = Counted(monkeypatch)
    for cfg in configs:
        opened(cfg, tmp_path / "apart")
    apart, counted.forwards = counted.forwards, 0
    with pytest.raises(Interrupted):
        open_source(configs[0], tmp_path / "out", progress=False, stop=AfterAUnit(), others=configs[1:])
    assert any((tmp_path / "out" / "_activations").glob("*.partial/units/*"))
    open_source(configs[0], tmp_path / "out", progress=False, stop=StopFlag(), others=configs[1:])
    assert counted.forwards < 2 * apart / len(configs)
    for cfg in configs:
        assert files_of(tmp_path / "out", cfg) == files_of(tmp_path / "apart", cfg)
    assert not list((tmp_path / "out" / "_activations").glob("*.*"))


def test_what_differs_in_more_than_the_hook_is_not_taken_along(tiny: ActivationsConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, layer=0, context=8)
    open_source(tiny, tmp_path, progress=False, stop=StopFlag(), others=[other, tiny])
    assert [path.name for path in (tmp_path / "_activations").iterdir()] == [store_id(tiny)]


def test_a_hook_whose_rows_are_refused_does_not_stop_the_others(
    configs: list[ActivationsConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness.activations.open as opening

    assemble = opening.assemble

    def refuse(plan: object, partial: Path, *arguments: object) -> object:
        if partial.name.startswith(store_id(configs[1])):
            raise UserError("all rows are equal")
        return assemble(plan, partial, *arguments)  # pyright: ignore

    monkeypatch.setattr(opening, "assemble", refuse)
    source = open_source(configs[0], tmp_path, progress=False, stop=StopFlag(), others=configs[1:])
    assert source.id == store_id(configs[0])
    made = {path.name for path in (tmp_path / "_activations").iterdir()}
    assert made == {store_id(cfg) for cfg in configs if cfg != configs[1]}


@pytest.mark.parametrize("assembly_bytes", [1, 2**30])
def test_rows_above_the_factor_are_dropped_and_counted(
    tiny: ActivationsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assembly_bytes: int
) -> None:
    """The rows left are those of the full store, in its order, without the large ones."""
    monkeypatch.setattr("harness.activations.store.shards.ASSEMBLY_BYTES", assembly_bytes)
    monkeypatch.setattr("harness.activations.store.harvest.UNIT_TOKENS", 800)
    full = opened(tiny, tmp_path)
    cfg = dataclasses.replace(tiny, outlier_factor=1.0)
    assert store_id(cfg) != store_id(tiny)
    cut = opened(cfg, tmp_path)
    outliers = cut.description["outliers"]
    assert isinstance(cut, Store) and outliers["factor"] == 1.0
    rows = all_rows(full)
    norms = rows.double().norm(dim=1)
    assert outliers["median_norm"] == pytest.approx(float(norms.median()), rel=0.05)
    small = norms <= 1.0 * outliers["median_norm"]
    assert torch.equal(all_rows(cut), rows[small])
    assert cut.train_rows == int(small.sum()) and outliers["dropped"]["train"] == int((~small).sum()) > 0
    assert cut.heldout_rows == full.heldout_rows - outliers["dropped"]["heldout"]
    held, documents = zip(*full.heldout(70), strict=True)
    keep = torch.cat(held).double().norm(dim=1) <= 1.0 * outliers["median_norm"]
    held_cut, documents_cut = zip(*cut.heldout(70), strict=True)
    assert torch.equal(torch.cat(held_cut), torch.cat(held)[keep])
    assert torch.equal(torch.cat(documents_cut), torch.cat(documents)[keep])
    assert cut.statistics(False).count == cut.train_rows


def test_without_a_factor_nothing_is_written_of_outliers(tiny: ActivationsConfig, tmp_path: Path) -> None:
    plan, _ = prepare(tiny, tmp_path, StopFlag())
    assert plan.largest_norm is None
    source = opened(tiny, tmp_path / "out")
    assert "outliers" not in source.description
    shard = load_file(next((tmp_path / "out").glob("_activations/*/train-00000.safetensors")))
    assert list(shard) == ["x"] and np.isfinite(shard["x"].numpy()).all()
