"""`python -m harness.evaluate`: what is judged, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from harness.evaluate import main
from harness.quality import judge
from harness.quality.metric import Metric
from harness.record.quality import Value, quality_path, read_quality
from harness.saes.export import export


@pytest.fixture
def sweep(topk_run: Path, switch_run: Path, tmp_path: Path) -> Path:
    sweep = tmp_path / "out" / "t"
    for run in (topk_run, switch_run):
        shutil.copytree(run, sweep / run.name)
    return sweep


def test_geometry_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep), "--metrics", "geometry"]) == 0
    assert "2 evaluations done, 0 were there" in capsys.readouterr().err
    for run in sweep.iterdir():
        found = read_quality(run, "geometry")
        assert found is not None and 0 <= found["values"]["duplicates"]["value"] <= 1
        assert (run / "quality" / found["per_latent"]).is_file()
    assert main([str(sweep), "--metrics", "geometry"]) == 0
    assert "0 evaluations done, 2 were there" in capsys.readouterr().err
    assert main([str(sweep), "--metrics", "geometry", "--force"]) == 0
    assert "2 evaluations done" in capsys.readouterr().err


def test_a_changed_result_or_other_weights_are_evaluated_again(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(sweep), "--metrics", "geometry"])
    first, second = sorted(sweep.iterdir())
    path = quality_path(first, "geometry")
    path.write_text(path.read_text().replace('"duplicates"', '"doubles"'))  # its seal is broken
    content = json.loads(quality_path(second, "geometry").read_text())
    del content["sha256"]
    quality_path(second, "geometry").write_text(json.dumps(content | {"weights": "0" * 64}))
    capsys.readouterr()
    assert main([str(sweep), "--metrics", "geometry"]) == 0
    assert "2 evaluations done, 0 were there" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_complete(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(subjects, shared):
        for number, subject in enumerate(subjects):
            yield subject, judge.Outcome(1, {"number": Value(number)})
            shared.stop.request("a test")
            shared.tick(number)

    metric = Metric("geometry", 1, "", run)
    monkeypatch.setitem(judge.METRICS, "geometry", metric)
    assert main([str(sweep), "--metrics", "geometry"]) == 75
    assert sum(quality_path(path, "geometry").is_file() for path in sweep.iterdir()) == 1
    assert main([str(sweep), "--metrics", "geometry"]) == 75
    assert sum(quality_path(path, "geometry").is_file() for path in sweep.iterdir()) == 2
    assert main([str(sweep), "--metrics", "geometry"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no sweep at nowhere"),
        (["saelense:DIR"], "'saelense' is not a kind of SAE; choose from saelens"),
        (["SWEEP", "--metrics", "beauty"], "--metrics beauty is not known; choose from: "),
        (["SWEEP", "--metrics", ","], "--metrics names none"),
        (["SWEEP", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["SWEEP", "--metrics", "geometry", "--judge", "nobody"], "--judge nobody is not known; write embedding"),
    ],
)
def test_wrong_requests(arguments: list[str], words: str, sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep) if word == "SWEEP" else word for word in arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_unfinished_run_is_left_out(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(sweep.iterdir())
    (first / "result.json").unlink()
    assert main([str(sweep), "--metrics", "geometry"]) == 0
    assert f"{first.name} is left out: it is not finished" in capsys.readouterr().err
    assert not (first / "quality").exists() and (second / "quality").exists()
    (second / "result.json").unlink()
    assert main([str(sweep)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


SOURCE = ("activations=synthetic", "activations.synthetic.n_features=32", "activations.heldout_tokens=512")


def test_an_sae_of_another_tool(topk_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(topk_run, "saelens", tmp_path / "theirs")
    target, out = f"saelens:{tmp_path / 'theirs'}", tmp_path / "out"
    command = [target, "--metrics", "refinement,geometry", "--out", str(out), *SOURCE]
    assert main([*command, "activations.synthetic.d_model=16"]) == 0
    [theirs] = (path for path in out.glob("saelens-*"))
    found = read_quality(theirs, "refinement")
    assert found is not None and 0 < found["values"]["fvu_before"]["value"] < 1

    assert main([*command, "activations.synthetic.d_model=8"]) == 1
    assert "is for rows of 16 dimensions, these activations have 8" in capsys.readouterr().err
    # rows of another dictionary: the same width, and no better than the mean
    assert main([*command, "activations.synthetic.d_model=16", "activations.seed=7", "--force"]) == 1
    assert "does not fit these activations: its fvu is" in capsys.readouterr().err
    assert main([target]) == 2
    assert "needs its model and hook: add activations=" in capsys.readouterr().err


def test_saes_of_one_name_are_kept_apart(topk_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other tools call every SAE alike, such as `trainer_0`; and a target may be given twice."""
    for place, scale in (("a", 1.0), ("b", 0.5)):
        export(topk_run, "saelens", tmp_path / place / "trainer_0")
        weights = tmp_path / place / "trainer_0" / "sae_weights.safetensors"
        tensors = load_file(weights)
        save_file({**tensors, "W_dec": tensors["W_dec"] * scale}, weights)
    targets = [f"saelens:{tmp_path / place / 'trainer_0'}" for place in ("a", "b", "a")]
    command = [*targets, "--metrics", "refinement", "--out", str(tmp_path / "out"), *SOURCE]
    assert main([*command, "activations.synthetic.d_model=16"]) == 0
    assert "2 evaluations done" in capsys.readouterr().err
    found = [read_quality(path, "refinement") for path in (tmp_path / "out").glob("saelens-trainer_0-*")]
    assert len({about["values"]["fvu_before"]["value"] for about in found if about}) == 2


def test_metrics_of_a_language_model_are_refused_without_one(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep), "--metrics", "downstream,geometry"]) == 1
    output = capsys.readouterr().err
    assert "error: downstream: synthetic activations have no language model" in output
    assert "2 evaluations done" in output


def test_without_names_the_metrics_that_are_possible_are_taken(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep)]) == 0
    output = capsys.readouterr().err
    assert "left out: downstream: synthetic activations have no language model" in output and "error" not in output
    judged = {path.stem for path in sweep.glob("*/quality/*.json")}
    assert {"geometry", "refinement", "progressive", "mdl", "dimension"} <= judged
