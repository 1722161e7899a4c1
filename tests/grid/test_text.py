"""A text setting takes the text that was typed; what the grammar or YAML would make of it is refused or put right."""

from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.grid import schema, yaml_text
from harness.grid.cells import Cell, Grid, make_cells
from harness.grid.compose import with_overrides
from harness.grid.study import load_study
from harness.launch import main, parse_only

CELL = ("activations=synthetic", "train.precision=fp32", "sae.n_latents=64", "sae.k=4", "train.warmup_tokens=0")


def cells(*overrides: str, **filters: Any) -> list[Cell]:
    return make_cells([Grid((*CELL, *overrides))], **filters)


def value(cell: Cell, key: str) -> Any:
    found: Any = cell.config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(
    "typed", ["83e2010", "1e5", "007", "1_000", "true", "No", "inf", "nan", "12:30", "0x1F", "1.10"]
)
@pytest.mark.parametrize("key", ["activations.revision", "cluster.partition", "tracker.entity", "sweep", "out"])
def test_a_text_field_takes_what_was_typed(key: str, typed: str) -> None:
    assert value(cells(f"{key}={typed}")[0], key) == typed


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("activations.revision=83e2010,12e4567,abc", ["83e2010", "12e4567", "abc"]),
        ("activations.revision=choice(83e2010,1_0,'a#b')", ["83e2010", "1_0", "a#b"]),
        ("sweep=true,b", ["true", "b"]),
        ("sweep=range(1,3)", ["1", "2"]),
        ("cluster.flags=[83e2010, 1e5, 'x', true, a b]", [["83e2010", "1e5", "x", "true", "a b"]]),
        ("cluster.setup=[1e5],[no]", [["1e5"], ["no"]]),
    ],
)
def test_also_in_lists_and_sweeps(override: str, values: list[Any]) -> None:
    assert [value(cell, override.split("=")[0]) for cell in cells(override)] == values
    assert [value(cell, override.split("=")[0]) for cell in cells(override, "sae.aux_k=${sae.k}")] == values


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("out=/x/o(1)", ["mismatched input '('", "character 9", """'out="/x/o(1)"'"""]),
        ("out=~/runs", ["'~'", "character 5", """'out="~/runs"'"""]),
        ("sweep=epoch=9", ["'='", "character 12", """'sweep="epoch=9"'"""]),
        ("sweep=a#b", ["'#'", "character 8", """'sweep="a#b"'"""]),
        ("activations.text_paths=[/x/lang=en/a.jsonl]", ["""'activations.text_paths=["/x/lang=en/a.jsonl"]'"""]),
        ("sae.k=[1,2", ["KEY=VALUE"]),
        ("cluster.partition=null", ["never null", """'cluster.partition="null"'"""]),
    ],
)
def test_a_grammar_error_has_reason_place_and_remedy(override: str, told: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        cells(override)
    message = str(refusal.value)
    assert all(part in message for part in told), message
    assert "hydra.cc" not in message and "\n" not in message


def test_the_quoted_form_works(tmp_path: Path) -> None:
    for text in ("/x/o(1)", "a#b", "lang=en"):
        assert cells(f'cluster.constraint="{text}"')[0].config.cluster.constraint == text


@pytest.mark.parametrize(
    "line", ["time: 12:00:00", "time: 90:00", "account: 83e2010", "qos: no", "mem: 64", "partition:", "setup: [a, 1e5]"]
)
def test_a_text_in_conf_needs_its_quotes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/slurm.yaml").write_text(f"name: slurm\n{line}\n")
    monkeypatch.setattr(yaml_text, "CONF_DIR", tmp_path)
    with pytest.raises(UserError, match=r"slurm\.yaml, line 2: .* put it in quotes: \""):
        yaml_text.check_conf()


def test_every_section_of_conf_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_text, "CONF_DIR", tmp_path)
    (tmp_path / "config.yaml").write_text("out: 2024\n")
    with pytest.raises(UserError, match="out is a text"):
        yaml_text.check_conf()
    (tmp_path / "config.yaml").write_text("# @package _global_\ntrain: {tokens: 1e6, precision: 32}\n")
    with pytest.raises(UserError, match="precision is a text"):
        yaml_text.check_conf()


@pytest.mark.parametrize(
    "line", ["sweep: 12:30", "title: no", "law: 1e5", "grids: [{only: {activations.revision: [1e5]}}]"]
)
def test_a_text_in_a_study_needs_its_quotes(line: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(line)
    with pytest.raises(UserError, match="put it in quotes"):
        load_study(str(tmp_path / "s.yaml"))


def test_filters_have_the_types_of_the_schema() -> None:
    sweep = ("train.tokens=1e6,2e6", "activations.revision=83e2010,abc")
    assert len(cells(*sweep, only=parse_only(["train.tokens=1e6", "activations.revision=83e2010"]))) == 1
    with pytest.raises(UserError, match=r"train\.tokens=many"):
        cells(*sweep, only=parse_only(["train.tokens=many"]))


def test_paths_expand_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("out", "activations.dir", "cluster.python"):
        for text in ("~/runs", "$HOME/runs", "${HOME}/runs"):
            typed = text.replace("${", "\\${")
            assert value(cells(f'{key}="{typed}"')[0], key) == f"{tmp_path}/runs"
        with pytest.raises(UserError, match="no such environment variable"):
            cells(f"{key}=$NOT_SET/runs")
    assert cells()[0].config.activations.dir == ""


def test_a_sweep_is_counted_before_it_is_listed() -> None:
    for sweep in ("sae.n_latents=range(1,1000000000)", "sae.k=range(0,inf)", "train.seed=shuffle(range(0,1000000000))"):
        with pytest.raises(UserError, match="a launch has at most 100,000 cells"):
            cells(sweep)
    with pytest.raises(UserError, match="4,000,000 combinations"):
        cells("train.seed=range(0,2000)", "stream.seed=range(0,2000)")


def test_single_settings_are_changed_in_the_same_grammar() -> None:
    config = cells()[0].config
    assert with_overrides(config, ["activations.revision=83e2010"]).activations.revision == "83e2010"
    assert with_overrides(config, ["tracker.tags=[1e5]"]).tracker.tags == ["1e5"]
    for wrong in ("sae.k=1,2", "train=quick", "tracker.tag=x"):
        with pytest.raises(UserError):
            with_overrides(config, [wrong])


def test_every_text_of_the_schema_is_known() -> None:
    texts = {key for key in schema.leaf_keys() if schema.is_text(key)}
    assert {"sweep", "out", "ops", "cluster.time", "cluster.setup", "tracker.tags", "activations.text_paths"} <= texts
    assert not texts & {"sae.k", "train.tokens", "cluster.requeue", "activations.synthetic.noise"}


SECRETS = [
    "cluster.setup=['export HF_TOKEN=abcdefgh12345678']",
    "cluster.setup=['export WANDB_API_KEY=0123456789abcdef0123']",
    "tracker.tags=[hf_abcdefghijklmnopqrstuvwxyz]",
    "tracker.entity=the-value-of-a-secret",
    "cluster.flags=['--comment=the-value-of-a-secret']",
    "cluster.container=['https://me:pass1234@example.org/image']",
    "tracker.entity=${oc.env:MY_TOKEN}",
    "out=${oc.env:HOME}/runs",
    "out=$MY_TOKEN/runs",
]


@pytest.mark.parametrize("override", SECRETS)
def test_a_secret_is_no_setting(
    override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_TOKEN", "the-value-of-a-secret")
    assert main([*CELL, f"activations.dir={tmp_path}", override]) == 2
    assert "recorded" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line", ["export HF_TOKEN=$(cat .token)", "source ~/.secrets", "module load cuda", "export KEY=/etc/ssl/key.pem"]
)
def test_what_reads_a_secret_elsewhere_is_no_secret(line: str) -> None:
    assert cells(f'cluster.setup=["{line}"]')[0].config.cluster.setup == [line]
