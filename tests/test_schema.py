"""What a file must hold: one line names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.schema import (
    FILE_NAME,
    SHA256,
    TEXT,
    dict_of,
    fields,
    list_of,
    number,
    one_of,
    optional,
    read_json,
    sealed,
    whole,
    with_seal,
)

SCHEMA = fields(
    {
        "share": number(0, 1),
        "steps?": whole(1),
        "above?": number(above=0),
        "runs?": list_of(fields({"name": TEXT})),
        "files?": dict_of(SHA256, FILE_NAME),
        "state?": one_of("done", "failed"),
        "fvu?": optional(number(0)),
    }
)


def read(path: Path, content: str | bytes) -> Any:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_json(path, SCHEMA, "remove it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the content must be an object, not list"),
        ("null", "the content must be an object, not null"),
        ("", "Expecting value"),
        ("{}", "share is missing"),
        ('{"share": 2}', "share must be a number from 0 to 1, not 2"),
        ('{"share": true}', "share must be a number, not True"),
        ('{"share": "1"}', "share must be a number, not '1'"),
        ('{"share": NaN}', "NaN is not JSON"),
        ('{"share": -Infinity}', "-Infinity is not JSON"),
        ('{"share": 1e999}', "share must be a number from 0 to 1, not inf"),
        ('{"share": %s}' % ("9" * 5000), "Exceeds the limit"),
        ('{"share": %s}' % ("9" * 4000), "share must be a number from 0 to 1, not a huge whole number"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"share": 1, "steps": 1.5}', "steps must be a whole number, not 1.5"),
        ('{"share": 1, "steps": 1e30}', "steps must be a number from 1 to 9.22337e.18, not 1e.30"),
        ('{"share": 1, "above": 0}', "above must be a number above 0, not 0"),
        ('{"share": 1, "runs": [{"name": "a"}, {}]}', r"runs\[1\].name is missing"),
        ('{"share": 1, "runs": {}}', "runs must be a list"),
        ('{"share": 1, "files": {"../x": "%s"}}' % ("0" * 64), "must be the name of a file in the same directory"),
        ('{"share": 1, "files": {"x": "0"}}', "files.x must be a sha256"),
        ('{"share": 1, "files": {"x\\n\\u001b[31m": "0"}}', "must be the name of a file"),
        ('{"share": 1, "state": "Done"}', "state must be one of done, failed, not 'Done'"),
        ('{"share": 1, "state": "\\ud800"}', "state must be one of"),
        ('{"share": 1, "fvu": -1}', "fvu must be a number from 0"),
        (b'{"share": "\xff"}', "byte 11 is not UTF-8"),
    ],
)
def test_one_line_names_the_file_the_key_and_what_to_do(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "x.json", content)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(f"{tmp_path}/x.json is damaged (") and line.endswith("; remove it")


def test_what_fits_is_returned_with_unknown_keys(tmp_path: Path) -> None:
    content = {"share": 0, "steps": 2**63 - 1, "fvu": None, "files": {"a.b": "0" * 64}, "other": [1]}
    assert read(tmp_path / "x.json", json.dumps(content)) == content


def test_a_seal_finds_every_change_and_may_be_missing() -> None:
    check = sealed(fields({"x": number()}))
    content = with_seal({"x": 0.1, "y": {"b": [1, None], "a": "é"}, "nan": float("nan")})
    read_back = json.loads(json.dumps(content | {"nan": None}))
    check(read_back, "")
    check({"x": 1}, "")
    for change in ({"x": 0.2}, {"y": {}}, {"z": 1}):
        with pytest.raises(ValueError, match="it was changed after it was written"):
            check(read_back | change, "")
