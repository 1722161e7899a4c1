"""One law for each population: what differs is told apart and said first, and what was left out is listed."""

import json
import os
import re

import numpy as np
import pytest

from analysis import fit, load
from analysis.cli import main
from analysis.notes import has
from analysis.report.page import write_report
from tests.analysis.generate import write_run

WIDTHS = (256, 512, 1024, 2048, 4096)


def _cells(directory, edit=None, factor=1.0, seed=0, ks=(8, 16, 32), widths=WIDTHS):
    """Runs of a law with an exponent of −0.5; `edit` changes the content of `result.json`."""
    for n in widths:
        for k in ks:
            fvu = factor * (0.1 + 2 * n**-0.5 * (k / 8) ** -0.2) * (1 + 0.002 * np.sin(3 * n + k))
            path = write_run(directory, sae="topk", n=n, k=k, seed=seed, fvu=float(fvu)) / "result.json"
            if edit is not None:
                content = json.loads(path.read_text())
                edit(content)
                path.write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    """Pictures take most of a report's time; one test draws them."""
    if "equal_losses" not in request.node.name:
        monkeypatch.setattr("analysis.report.page.all_pictures", lambda findings: [])


def _lead(directory):
    page = write_report(directory).read_text(encoding="utf-8")
    text = re.search(r'<div class="lead">(.*?)</div>', page, re.S)
    assert text is not None
    return [line.strip() for line in re.sub("<[^>]+>", "", text.group(1)).splitlines() if line.strip()], page


def _setting(part, key, value):
    return lambda content: content["config"][part].update({key: value})


SETTINGS = {
    "hook": (_setting("activations", "hook", "mlp_out"), "hook=mlp_out", "hook=resid_post"),
    "layer": (_setting("activations", "layer", 7), "layer=4", "layer=7"),
    "model": (_setting("activations", "model", "gpt2"), "model=gpt2", "model=package:generated"),
    "a setting that cells share": (
        lambda content: content["config"]["train"].update(batch_tokens=64) or content.update(seed=0),
        "train.batch_tokens=512",
        "train.batch_tokens=64",
    ),
    "the store": (lambda content: content.update(store_id="ba9876543210"), "store_id=0123456789ab", "store_id=ba98"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_has_its_own_law(tmp_path, name):
    edit, first, second = SETTINGS[name]
    _cells(tmp_path)
    _cells(tmp_path, edit, factor=2.0, seed=1)
    lead, page = _lead(tmp_path)
    key = first.partition("=")[0]
    assert lead[0].startswith(
        f"The runs differ in {key}. Each setting has a law of its own: {first} (15 runs); {second}"
    )
    laws = [line for line in lead if "Doubling n lowers" in line]
    assert len(laws) == 2 and laws[0].startswith(f"{first}: ") and laws[1].startswith(second)
    assert page.count("<h3>sae_nk, ") == 2
    result = fit(load(tmp_path), starts=4, ci="wald")
    assert result.points == 15 and has(result.notes, "mixed_population")
    assert {entry["reason"] for entry in result.excluded} == {f"another setting than {first}"}


def test_each_cell_is_fitted_at_its_best_rate(tmp_path):
    for i, lr_factor in enumerate((1, 2, 4)):
        _cells(
            tmp_path,
            lambda content, rate=lr_factor: content["config"]["train"].update(lr_factor=rate, lr=0.0),
            factor=1 + 0.1 * abs(i - 1),
            seed=i,
        )
    lead, page = _lead(tmp_path)
    assert "Several learning rates were run: the law is of the best one in each cell." in lead[:2]
    assert page.count("not the best learning rate of its n and k") == 30
    result = fit(load(tmp_path), starts=4, ci="wald")
    assert result.points == 15 and all("-s1-" in run for run in result.runs)


def test_sizes_at_different_rates_are_said_not_to_be_comparable(tmp_path):
    _cells(tmp_path, _setting("train", "lr_factor", 1), widths=WIDTHS[:3])
    _cells(tmp_path, _setting("train", "lr_factor", 4), widths=WIDTHS[3:])
    lead, _ = _lead(tmp_path)
    assert lead[0].startswith("The cells were not run at the same learning rates (train.lr_factor=1")
    assert has(fit(load(tmp_path), starts=4, ci="wald").notes, "mixed_population")


def test_a_run_that_blew_up_is_told_on_top(tmp_path, capsys):
    _cells(tmp_path)
    write_run(tmp_path, sae="topk", n=8192, k=8, fvu=3176.0)
    lead, _ = _lead(tmp_path)
    assert lead[0] == "1 run(s) left out: fvu is not below 1, so predicting the mean is as good."
    assert lead[1].startswith("15 of 16 runs were fitted")
    assert main(["fit", str(tmp_path), "--starts", "4", "--ci", "wald"]) == 0
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("used: 15 of 16 runs (topk-n1024-k16-s0-generated, ") and first.endswith("and 12 more)")
    assert second == "left out: 1 run(s)"
    assert "fvu is 3176.0" in third and "(topk-n8192-k8-s0-generated)" in third


def test_rows_that_were_seen_many_times_are_told(tmp_path):
    _cells(tmp_path, lambda content: content.update(unique_tokens=4000))
    lead, page = _lead(tmp_path)
    assert "Each row of the source was seen 100 times." in lead
    assert "repeated_rows" in page
    _cells(tmp_path / "fresh")
    assert not any("times" in line for line in _lead(tmp_path / "fresh")[0])


@pytest.mark.parametrize("fvu", [0.2, *(pytest.param(fvu, marks=pytest.mark.slow) for fvu in (1e-300, 0.999999))])
def test_equal_losses_have_a_report(tmp_path, fvu):
    for n in WIDTHS:
        for k in (8, 16, 32):
            write_run(tmp_path, sae="topk", n=n, k=k, fvu=fvu)
    assert "not reliable" in " ".join(_lead(tmp_path)[0])


DAMAGE = {
    "text for a number": ({"fvu": "low"}, "fvu must be a number"),
    "list for a number": ({"n_latents": [256]}, "n_latents must be a"),
    "truth for a number": ({"tokens": True}, "tokens must be a number"),
    "number for a text": ({"sae": 5}, "sae must be a text"),
    "text for a truth": ({"converged": "maybe"}, "converged must be true or false"),
    "list for the configuration": ({"config": []}, "config must be an object"),
    "words in pca_fvu": ({"pca_fvu": {"eight": 0.5}}, "pca_fvu.eight must be a number of latents"),
    "a list for run_id": ({"run_id": []}, "run_id must be a text"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_result_is_named_and_the_others_are_shown(tmp_path, name):
    change, says = DAMAGE[name]
    _cells(tmp_path)
    path = tmp_path / "topk-n256-k8-s0-generated" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    table = load(tmp_path)
    assert len(table) == 14
    assert says in table.left_out()[0]["reason"] and table.left_out()[0]["run"] == "topk-n256-k8-s0-generated"
    assert "14 of 15 runs were fitted" in " ".join(_lead(tmp_path)[0])


@pytest.mark.parametrize("content", ["[1, 2]", "null", '{"fvu": "x", "tokens": [], "flops": {}}', "9" * 5000, "\x00"])
def test_damaged_metrics_do_not_end_a_report(tmp_path, content):
    _cells(tmp_path)
    with (tmp_path / "topk-n256-k8-s0-generated" / "metrics.jsonl").open("a") as file:
        file.write(content + "\n" + content + "\n")
    assert any("Doubling n" in line for line in _lead(tmp_path)[0])


def test_the_report_goes_where_it_is_asked(tmp_path, capsys):
    _cells(tmp_path / "sweep")
    assert main(["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").exists() and not (tmp_path / "sweep" / "report.html").exists()
    assert main(["report", str(tmp_path / "sweep"), "--out", str(tmp_path / "none" / "r.html")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'none' / 'r.html'} cannot be written" in error and ".tmp" not in error
    if os.geteuid() == 0:
        return  # root may write everywhere
    (tmp_path / "sweep").chmod(0o555)
    assert main(["report", str(tmp_path / "sweep")]) == 2
    assert "report.html cannot be written: Permission denied; choose another file" in capsys.readouterr().err
