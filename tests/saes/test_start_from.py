"""A run that starts from a finished SAE: ours, and ours in the formats of other tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import launch
from harness.errors import UserError
from harness.record.initial import content_hash
from harness.saes.export import export
from harness.saes.trained import load
from tests.saes.test_export import architecture_run, rows

NO_STEP = ["train.tokens=256", "train.batch_tokens=256", "train.lr=1e-30", "sae.dead_after_tokens=1e9"]


def started(source: str, out: Path, name: str, *overrides: str) -> Path:
    """A run of one step that moves nothing, from `source`."""
    active = ["sae.k=0", "sae.target_l0=3"] if name in ("gated", "jumprelu") else ["sae.k=3"]
    arguments = [f"sae={name}", *active, f"train.init_from={source}", *NO_STEP, f"out={out}", *overrides]
    assert launch.main([*SMALL, *arguments]) == 0
    (result,) = out.glob("*/*/result.json")
    return result.parent


SMALL = [
    "activations=synthetic",
    "activations.synthetic.d_model=16",
    "activations.heldout_tokens=1024",
    "sae.n_latents=32",
    "tracker=none",
]


@pytest.mark.parametrize("name", ["topk", "batchtopk", "gated", "jumprelu"])
def test_the_weights_are_those_of_the_source_in_every_format(name: str, tmp_path: Path) -> None:
    run = architecture_run(name, tmp_path / "a")
    about = load(run)
    size = [f"activations.synthetic.d_model={about.sae.d_model}", f"sae.n_latents={about.sae.n_latents}"]
    x, expected = rows(run), about.forward(rows(run))
    sources = [str(run)]
    for form in ("saelens", "dictionary_learning"):
        export(run, form, tmp_path / form)
        sources.append(f"{form}:{tmp_path / form}")
    for number, source in enumerate(sources):
        # other activations, so another scale of the rows: in raw units it must be the same SAE
        other = ["activations.synthetic.noise=0.3"]
        begun = load(started(source, tmp_path / f"b{number}", name, *size, *other))
        if name == "batchtopk":  # every batch gives the threshold a new value, the first one its first
            begun.params["threshold"].copy_(about.params["threshold"] * about.normalizer.scale / begun.normalizer.scale)
        torch.testing.assert_close(begun.forward(x), expected, rtol=1e-4, atol=1e-4)


def test_the_content_is_the_identity_and_not_the_path(tmp_path: Path) -> None:
    run = architecture_run("topk", tmp_path / "a")
    about = load(run)
    size = [f"activations.synthetic.d_model={about.sae.d_model}", f"sae.n_latents={about.sae.n_latents}"]
    begun = started(str(run), tmp_path / "b", "topk", *size)
    copy = tmp_path / run.name
    copy.symlink_to(run)
    assert started(str(copy), tmp_path / "c", "topk", *size).name == begun.name
    assert content_hash(str(run)) == content_hash(str(copy))


def test_what_is_no_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no sae/sae\.safetensors there; give the directory of a finished run"):
        content_hash(str(tmp_path))
    with pytest.raises(UserError, match=r"0 files ae\.pt"):
        content_hash(f"dictionary_learning:{tmp_path}")
    run = architecture_run("topk", tmp_path / "a")
    arguments = ["sae=batchtopk", "sae.k=3", f"train.init_from={run}", *NO_STEP, f"out={tmp_path / 'b'}", *SMALL]
    assert launch.main(arguments) == 1
    assert "is a topk SAE" in capsys.readouterr().err
