"""What every field of the schema has in common."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.config import BOUNDS, Config, from_container, to_container
from tests.training.members import small_config


def fields(kind: type) -> list[str]:
    """Keys such as `sae.aux_alpha` of the fields that hold a value of this type, or a list of such."""
    keys = []

    def walk(section: Any, where: str) -> None:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{where}{field.name}.")
            elif field.type in (kind.__name__, f"list[{kind.__name__}]"):
                keys.append(f"{where}{field.name}")

    walk(small_config(), "")
    return keys


def with_value(key: str, value: Any) -> Config:
    container = to_container(small_config())
    *parents, name = key.split(".")
    section = container
    for parent in parents:
        section = section[parent]
    section[name] = [value] if isinstance(section[name], list) else value
    return from_container(container)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("key", fields(float))
def test_every_number_is_finite(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key.split(".")[-1]):
        with_value(key, value)


@pytest.mark.parametrize("text", ["one\ntouch planted\n", "a\rb", "a\x00b", "a\u2028b"])
@pytest.mark.parametrize("key", [key for key in fields(str) if key != "cluster.setup"])
def test_no_text_has_control_characters(key: str, text: str) -> None:
    with pytest.raises(ValueError, match="|".join(key.split("."))):
        with_value(key, text)


def test_every_number_has_its_bounds() -> None:
    assert sorted(BOUNDS) == sorted([*fields(int), *fields(float)])


@pytest.mark.parametrize("key", sorted(BOUNDS))
def test_numbers_beyond_their_bounds_are_refused(key: str) -> None:
    lowest, highest = BOUNDS[key]
    whole = key in fields(int)
    for value in (lowest - 1, -1, highest * 2 + 1, 10**300):
        with pytest.raises(ValueError, match=rf"{key}=\S+ must be at least \S+ and at most"):
            with_value(key, int(value) if whole else float(value))


def test_a_frozen_text_means_itself() -> None:
    for text in ("${oc.env:HOME}", "$HOME/${sae.k}", r"a\${b}", r"a\\${b}"):
        assert with_value("tracker.entity", text).tracker.entity == text


def test_the_lists_are_complete() -> None:
    assert {"sae.aux_alpha", "train.tokens", "activations.heldout_tokens", "cluster.pack_minutes"} <= set(fields(float))
    assert {"tracker.tags", "sweep", "cluster.partition", "activations.model"} <= set(fields(str))


def test_a_line_break_in_an_override_is_no_line_of_a_job_script(tmp_path: Path) -> None:
    override = "tracker.tags=['one\ntouch planted\n']"
    command = [
        sys.executable,
        "-m",
        "harness.launch",
        "cluster=slurm",
        "activations=synthetic",
        "sae=topk",
        "sae.n_latents=64",
        "sae.k=4",
    ]
    done = subprocess.run(
        [*command, "train.tokens=1e6", f"out={tmp_path}", override],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "tracker.tags" in done.stderr and "control characters" in done.stderr
    assert list(tmp_path.iterdir()) == []
