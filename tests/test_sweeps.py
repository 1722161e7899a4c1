"""`python -m sweeps` and the Makefile: from variables to a report."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.config import ARCHITECTURES
from harness.sweep.request import requested_cells
from sweeps.__main__ import OVERRIDES, main, parser, request
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[1]
SMALL = [text for text in TINY if text.split("=")[0] not in ("activations", "sae.n_latents", "sae.k", "sweep")]


def arguments(out: Path) -> list[str]:
    return ["--activations", "synthetic", "--out", str(out), "--width", "32,64,128", "--k", "1,2,4", *SMALL]


def test_empty_values_are_ignored() -> None:
    empty = [word for name in ("study", "arch", *OVERRIDES) for word in (f"--{name}", "")]
    assert request(parser().parse_args(empty)) == request(parser().parse_args([]))
    assert request(parser().parse_args([])).overrides == []


def test_every_option_reaches_its_key() -> None:
    texts = "--width 512 --k 4 --arch switch --experts 2,4 --activations synthetic --tokens 2e5 --seeds 7,8 --sweep s"
    cells = requested_cells(request(parser().parse_intermixed_args([*texts.split(), "--out", "o", "train.threads=3"])))
    assert {c.config.sae.architecture for c in cells} == {"switch"}
    assert {(c.config.sae.n_experts, c.config.train.seed) for c in cells} == {(2, 7), (2, 8), (4, 7), (4, 8)}
    config = cells[0].config
    assert (config.sae.n_latents, config.sae.k, config.train.tokens) == (512, 4, 2e5)
    assert (config.activations.kind, config.sweep, config.out, config.train.threads) == ("synthetic", "s", "o", 3)


def test_a_study_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path)) == 0
    report = tmp_path / "quick/report.html"
    assert "fixed tokens, not converged" in report.read_text()
    output = capsys.readouterr()
    assert str(report) in output.out + output.err

    assert main(arguments(tmp_path)) == 0
    assert re.search(r"all \d+ cells already done", capsys.readouterr().err)


def test_the_report_is_written_even_when_a_cell_diverges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(tmp_path), "--arch", "topk", "--width", "32,64", "--k", "1", "train.lr=1e30,1e-2"]) == 1
    assert (tmp_path / "quick/report.html").is_file()
    assert "some cells are not done" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(tmp_path), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "pending" in plan and "judging by downstream, geometry comes afterwards" in plan
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_architectures() -> None:
    assert all(name in parser().format_help() for name in ARCHITECTURES)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_help_lists_every_target() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(targets) == set(re.findall(r"make ([a-z-]+)  ", text))
    assert {"help", "setup", "sweep", "test", "test-all", "check", "report", "status", "notebook"} <= set(targets)


@needs_make
def test_make_passes_every_variable() -> None:
    values = {
        **{"WIDTH": "256,512", "K": "8", "ARCH": "topk", "EXPERTS": "4", "STUDY": "standard", "SWEEP": "mine"},
        **{"ACTIVATIONS": "gpt2", "TOKENS": "1e5", "SEEDS": "0,1", "CLUSTER": "local", "DP": "1", "SHARD": "1"},
        "OUT": "elsewhere",
    }
    command = ["make", "-n", "sweep", *(f"{name}={value}" for name, value in values.items())]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name, value in values.items():
        assert f'--{name.lower()} "{value}"' in text


@needs_make
def test_a_missing_venv_module_is_one_clear_line(tmp_path: Path) -> None:
    """A Python without ensurepip leaves half an environment behind; the Makefile must not."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "requirements.lock").write_text("")
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in -c) exit 0;; esac\nmkdir -p .venv/bin; ln -sf /bin/false .venv/bin/python\nexit 1\n'
    )
    fake.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == ("error: cannot make .venv: apt install python3-venv, then run make again")
    assert not (tmp_path / ".venv").exists()

    fake.write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(["make", "setup", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert "must be Python 3.11 to 3.13" in done.stderr.splitlines()[0]


def test_a_law_that_is_not_known_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text("law: nope\ngrids: [{overrides: [sae=topk, sae.n_latents=32, sae.k=2]}]\n")
    assert main(["--study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), *SMALL]) == 2
    assert "law 'nope' is not known" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_that_names_metrics_judges_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "judged.yaml"
    study.write_text("evaluate: [geometry]\noverrides: [train=quick]\ngrids: [{overrides: [sae=topk]}]")
    options = ["--study", str(study), "--activations", "synthetic", "--out", str(tmp_path), "--width", "32", "--k", "2"]
    assert main([*options, *SMALL]) == 0
    assert len(list(tmp_path.glob("judged/*/quality/geometry.json"))) == 1
    assert "Quality of the features" in (tmp_path / "judged/report.html").read_text()

    study.write_text("evaluate: [beauty]\noverrides: [train=quick]\ngrids: [{overrides: [sae=topk]}]")
    assert main([*options, *SMALL]) == 0
    assert "not evaluated: --metrics beauty is not known" in capsys.readouterr().err
