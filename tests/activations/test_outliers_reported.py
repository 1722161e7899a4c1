"""Rows that were dropped are told by the plan, by `status`, by the record and by the report."""

import json
from pathlib import Path

import pytest

from analysis.report.page import write_report
from harness.launch import main
from harness.status import main as status
from tests.tiny import TINY


def test_what_was_dropped_is_said_everywhere(
    models_on_disk: dict[str, Path], text_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [word for word in TINY if not word.startswith("activations")]
    words = [
        *("activations=lm", f"activations.model={models_on_disk['bert']}", "activations.layer=1"),
        *("activations.text=files", f"activations.text_paths=[{text_files}/*.txt]", "activations.context=16"),
        *("activations.tokens=3000", "activations.heldout_tokens=512", "activations.outlier_factor=1"),
        *("activations.dtype=fp32", "activations.lm_precision=fp32", *kept, f"out={tmp_path}"),
    ]
    assert main([*words, "--dry-run"]) == 0
    assert "layer 1: rows whose norm is above 1 times the median will be dropped" in capsys.readouterr().out
    assert main(words) == 0
    (manifest,) = tmp_path.glob("_activations/*/manifest.json")
    outliers = json.loads(manifest.read_text())["description"]["outliers"]
    said = f"dropped {outliers['dropped']['train']:,} training and {outliers['dropped']['heldout']:,} held-out rows"
    assert outliers["dropped"]["train"] > 0 and said in capsys.readouterr().err
    (result,) = tmp_path.glob("t/*/result.json")
    assert said in json.loads(result.read_text())["notes"][0]
    assert status([str(tmp_path / "t")]) == 0
    assert said in capsys.readouterr().out
    assert said in write_report(tmp_path / "t").read_text(encoding="utf-8")
    assert main([*words, "sae.k=4", "--dry-run"]) == 0
    assert said in capsys.readouterr().out
