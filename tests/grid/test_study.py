"""Study files: the ones that are shipped, and how the command line reaches into them."""

from collections import Counter
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.grid.cells import make_cells
from harness.grid.study import Study, load_study, study_grids, study_names
from harness.launch import main


def sae_shapes(study: Study, *overrides: str) -> Counter[tuple[str, int, int, int, int]]:
    cells = make_cells(study_grids(study, overrides))
    return Counter(
        (c.config.sae.architecture, c.config.sae.n_latents, c.config.sae.k, c.config.sae.n_experts, c.config.train.seed)
        for c in cells
    )


def test_shipped_studies() -> None:
    assert set(study_names()) == {
        *("quick", "standard", "lr_width", "architectures", "optimisers"),
        *("routing", "description", "layers", "llama_scope", "manifolds", "mfr", "end_to_end"),
        *("gao2024_nk", "gao2024_16m", "gao2024_baselines", "switch2024_flop_matched", "switch2024_width_matched"),
    }


@pytest.mark.parametrize("name", study_names())
def test_every_study_passes_a_dry_run(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--study", name, "--dry-run"]) == 0
    assert "cells:" in capsys.readouterr().out


def test_a_study_names_the_metrics_that_judge_its_runs(tmp_path: Path) -> None:
    quick = load_study("quick")
    assert (quick.evaluate, quick.evaluate_tokens) == (("downstream", "geometry"), 8192)
    assert (load_study("standard").evaluate, load_study("standard").evaluate_tokens) == ((), 0)
    path = tmp_path / "s.yaml"
    path.write_text("evaluate_tokens: 1e4\ngrids: [{overrides: [sae=topk]}]")
    with pytest.raises(UserError, match="evaluate_tokens must be a whole number of tokens, such as 8192, not '1e4'"):
        load_study(str(path))
    path.write_text("evaluate: downstream\ngrids: [{overrides: [sae=topk]}]")
    with pytest.raises(UserError, match="evaluate must be a list of metrics"):
        load_study(str(path))


def test_quick_has_the_grid_that_the_law_needs() -> None:
    shapes = sae_shapes(load_study("quick"))
    topk = {shape for shape in shapes if shape[0] == "topk"}
    widths = {n for _, n, _, _, seed in topk if seed == 0}
    assert len(widths) == 5
    assert max(widths) == 16 * min(widths)
    assert {k for _, _, k, _, _ in topk} == {8, 16, 32}
    assert sum(seed == 1 for *_, seed in topk) >= 3
    assert all(n // experts >= 4 * k for a, n, k, experts, _ in shapes if a == "switch")
    assert "fixed tokens, not converged" in load_study("quick").title


def test_gao2024_grid() -> None:
    shapes = sae_shapes(load_study("gao2024_nk"))
    assert set(shapes) == {
        ("topk", 2**p, k, 1, 0) for p in (11, 13, 15, 17, 19, 21) for k in (8, 16, 32, 64, 128, 256, 512)
    }


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("switch2024_flop_matched", {1: 24576, 2: 49152, 4: 98304, 8: 196608}),
        ("switch2024_width_matched", {1: 24576, 16: 24576, 32: 24576, 64: 24576, 128: 24576}),
    ],
)
def test_switch2024_grids(name: str, widths: dict[int, int]) -> None:
    shapes = sae_shapes(load_study(name))
    expected = {
        ("topk" if experts == 1 else "switch", n, k, experts, 0)
        for experts, n in widths.items()
        for k in (8, 16, 32, 64, 128, 192)
    }
    assert set(shapes) == expected


def test_an_override_replaces_the_same_key_in_the_grids_that_set_it() -> None:
    quick = load_study("quick")
    shapes = sae_shapes(quick, "sae.n_latents=256,512", "sae.k=8", "sae.n_experts=4", "train.seed=5")
    assert set(shapes) == {
        *(("topk", n, 8, 1, 5) for n in (256, 512)),
        *(("switch", n, 8, 4, 5) for n in (256, 512)),
    }


def test_a_key_that_no_grid_sets_reaches_all() -> None:
    cells = make_cells(study_grids(load_study("quick"), ["train.threads=3", "sweep=mine"]))
    assert {(c.config.train.threads, c.config.sweep) for c in cells} == {(3, "mine")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "a study is a mapping"),
        ("question: x", "needs `grids`"),
        ("grids: [{name: a, overrides: [sae=topk]}]\ngird: 1", "unknown key 'gird'"),
        ("grids: [{name: a, overides: [sae=topk]}]", "unknown key 'overides'"),
        ("grids: [{overrides: sae=topk}]", "must be a list of overrides"),
        ("grids: [{overrides: [sae=topk], only: 3}]", "must map a key to a list"),
        ("grids: [", "is not YAML"),
    ],
)
def test_wrong_study_files_say_what_is_wrong(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_study(str(path))
    assert "\n" not in str(error.value)
