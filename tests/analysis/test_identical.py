"""Copies of a measurement are told from repeats, and from rows that agree by chance."""

import numpy as np
import pandas as pd

from analysis.runs.identical import MOST_RUNS, SAME, without_identical
from analysis.runs.table import RunTable


def table(losses: list[float], **columns: object) -> RunTable:
    frame = pd.DataFrame({"n": 64, "k": 8, "fvu": losses, **columns})
    frame["run"] = [f"r{i}" for i in range(len(frame))]
    return RunTable(frame, {"n": "n", "k": "k", "loss": "fvu", "run": "run"})


def left(losses: list[float], **columns: object) -> int:
    return len(without_identical(table(losses, **columns), ("n", "k")))


def test_copies_are_one_measurement_and_repeats_are_not() -> None:
    loss = 0.123456789
    assert left([loss, loss, loss * (1 + SAME / 2)]) == 1
    assert left([loss, loss * 1.001]) == 2
    assert left([loss, loss], sae=["topk", "switch"]) == 2, "another architecture is another cell"
    assert left([loss, loss], store_id=[None, "a"]) == 2, "a missing value is a value of its own"
    assert left([loss, loss], sae=["topk", "switch"], store_id=None) == 2, "so is one that all lack"
    assert left([0.1234, 0.1234]) == 2, "values of four digits agree by chance"


def test_many_rows_of_a_cell_agree_by_chance() -> None:
    losses = np.exp(0.01 * np.random.default_rng(0).standard_normal(20_000))
    assert left(list(losses)) == len(losses)
    few = [0.123456789 + 1e-5 * number for number in range(MOST_RUNS - 1)]
    assert left([*few, few[0]]) == len(few)
