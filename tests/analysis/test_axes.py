"""What FLOPs count: derived axes, comparisons at equal FLOPs, conditions, and the commands of questions."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.questions.multiplier import multiplier, on_every_axis
from analysis.report.findings import compared_architectures
from analysis.report.words import multiplier_sentences
from analysis.runs.axes import AXES, at_equal_flops, on_axis
from analysis.runs.curves import evaluations
from analysis.runs.load import load
from analysis.runs.table import RunTable
from analysis.runs.where import choose
from harness.errors import UserError

QUICK = Path(__file__).parent / "data" / "recorded_quick"


@pytest.fixture(scope="module")
def quick():
    return load(QUICK)


def test_axes_follow_from_the_configurations(quick):
    row = quick.frame.set_index("run_id").loc["topk-n1024-k16-s0-eddaa91915"]
    nominal = 8.0 * 256 * 384 * row["tokens"]  # four uses of the 256 latents nearest to d/2, 2·d FLOPs each
    assert row["flops_core"] == pytest.approx(row["flops"] - nominal, rel=1e-12)
    assert row["flops_switch2024"] == 4.0 * 1024 * 384 * row["tokens"]
    assert row["flops_six_per_parameter"] == 6.0 * row["params"] * row["tokens"]
    assert set(AXES) <= set(quick.frame) and quick.frame[list(AXES)].gt(0).all().all()


def test_a_recorded_value_is_not_replaced_and_other_tables_stay(quick):
    assert at_equal_flops(quick).roles["flops"] == "flops_core" and quick.roles["flops"] == "flops"
    own = RunTable(pd.DataFrame({"flops": [1.0, 2.0], "fvu": [0.5, 0.4]}), {"flops": "flops", "loss": "fvu"})
    assert at_equal_flops(own) is own and on_axis(own, "flops_core") is None
    named = quick.but(roles={**quick.roles, "flops": "flops_executed"})
    assert at_equal_flops(named) is named


def test_curves_are_on_the_axis_of_the_table(quick):
    core = at_equal_flops(quick)
    one, other = evaluations(quick), evaluations(core)
    last = other.groupby("run")["flops"].last()
    assert last.to_dict() == core.frame.set_index("run_id")["flops_core"].to_dict()
    ratio = (other["flops"] / one["flops"]).groupby(one["run"])
    assert np.allclose(ratio.min(), ratio.max())


def test_the_multiplier_is_quoted_without_auxk_and_on_every_axis(quick):
    part = quick.where("another k", k=32)
    found = dict(on_every_axis(part, at_loss=multiplier(part).at_loss))
    assert list(found) == list(AXES)
    assert multiplier(part).axis == "flops_core" and multiplier(part).value == found["flops_core"].value
    values = {axis: found[axis].value for axis in ("flops_core", "flops", "flops_executed", "flops_switch2024")}
    assert values == pytest.approx(
        {"flops_core": 1.16, "flops": 1.22, "flops_executed": 0.84, "flops_switch2024": 1.73}, abs=0.01
    )


def test_a_claim_that_depends_on_the_axis_is_marked(quick):
    entries = [entry for entry in compared_architectures(quick) if entry.k == 32 and entry.x == "flops"]
    first, second = multiplier_sentences(entries)
    assert "TopK needs 1.16 [" in first and "times the training FLOPs without AuxK of Switch" in first
    assert (
        second.startswith("This claim depends on what is counted")
        and "0.841 [" in second
        and "in executed FLOPs" in second
    )
    alike = [entry for entry in entries[0].by_axis if entry[0] in ("flops_core", "flops")]
    entries[0].by_axis = alike
    assert len(multiplier_sentences(entries)) == 1


FRAME = pd.DataFrame(
    {"width": [64, 128, 256, 512], "k": [8, 16, 160, 192], "kind": list("abab"), "fvu": [0.5, -1, 0.3, 0.2]}
)


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        (["k<=160"], [64, 256]),
        (["k <= 160", "k>8"], [256]),
        (["n>=256"], [256, 512]),
        (["width < 1e2"], [64]),
        (["kind=a"], [64, 256]),
        (["kind==b"], [512]),
        (["kind!=a"], [512]),
        (["k!=8"], [256, 512]),
        (["k=8.0"], [64]),
        (["k>1000"], []),
    ],
)
def test_conditions(conditions, kept):
    table = RunTable(FRAME, {"n": "width", "k": "k", "loss": "fvu"})
    chosen = choose(table, conditions)
    assert chosen.values("n").tolist() == kept
    assert len(chosen.frame) + len(chosen.excluded) == 4


@pytest.mark.parametrize(
    "condition",
    ["k", "", "=8", "k<=", "k<=many", "k<=nan", "nothing=1", "__import__('os').system('true')", "k<=8 or True", "@k<3"],
)
def test_foreign_text_is_not_evaluated(condition):
    with pytest.raises(UserError):
        choose(RunTable(FRAME, {"n": "width", "k": "k", "loss": "fvu"}), [condition])


def test_notes_count_the_chosen_runs_only():
    table = RunTable(FRAME, {"n": "width", "k": "k", "loss": "fvu"})
    assert "nonpositive_loss" in {entry.code for entry in table.notes}
    assert choose(table, ["k>=160"]).notes == []
    assert [entry.code for entry in choose(table, ["k<160"]).notes] == ["nonpositive_loss"]


def test_rows_without_names_keep_their_numbers_and_repeats_stay_out():
    table = RunTable(pd.concat([FRAME, FRAME.tail(1)], ignore_index=True), {"n": "width", "k": "k", "loss": "fvu"})
    chosen = choose(table, ["k>=160"])
    assert chosen.frame["run"].tolist() == ["row 3", "row 4"]
    assert {entry["run"]: entry["reason"] for entry in chosen.left_out()} == {
        "row 1": "not k>=160",
        "row 2": "not k>=160",
        "row 5": "identical to a row above",
    }


def test_unfinished_runs_keep_their_reason():
    frame = pd.DataFrame({"n": [1, np.nan], "k": [8, np.nan], "status": ["done", "unfinished"], "run": ["a", "b"]})
    table = RunTable(frame, {"n": "n", "k": "k", "status": "status", "run": "run"})
    assert choose(table, ["k=8"]).left_out() == [{"run": "b", "reason": "status unfinished"}]


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        (["multiplier", str(QUICK)], 0, "executed FLOPs"),
        (["multiplier", str(QUICK), "--where", "sae=topk"], 1, ""),
        (
            ["frontier", str(QUICK), "--where", "k<=16"],
            0,
            "training FLOPs without AuxK, the lowest over sae = switch, topk",
        ),
        (["frontier", str(QUICK), "--flops", "wall_s"], 0, "training FLOPs (wall_s)"),
        (["multiplier", str(QUICK), "--at-loss", "nan"], 2, "--at-loss nan must be positive"),
        (["isoflop", str(QUICK), "--budgets", "0"], 2, "--budgets 0 must be at least 1"),
        (["best-rates", str(QUICK)], 1, ""),
        (["isoflop", str(QUICK)], 1, ""),
        (["frontier", str(QUICK), "--where", "k<=x"], 2, ""),
    ],
)
def test_commands(command, code, text, capsys):
    assert main(command) == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err
