"""Every reader of a finished run, after one of its files was damaged: it succeeds or says in one line what is wrong,
and the other runs of the sweep are shown as before."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from analysis.runs.load import load as load_table
from harness import export, launch, replay, retry, status
from harness.errors import UserError
from harness.mirror import copies
from harness.record import names
from harness.saes.trained import load
from harness.training.jobs import train_jobs
from tests.tiny import TINY


class Sweep(NamedTuple):
    directory: Path
    damaged: Path
    """The run whose files are damaged."""
    other: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert launch.main([*TINY, f"out={out}", "train.seed=0,1"]) == 0
    return out


@pytest.fixture
def sweep(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    """A copy that a test may damage."""
    monkeypatch.setattr(copies, "check", lambda tracker: None)
    monkeypatch.setattr(copies, "open_copy", lambda run_dir, config, live: NoTracker())
    shutil.copytree(finished / "t", tmp_path / "t")
    damaged, other = sorted(path.parent for path in (tmp_path / "t").glob(f"*/{names.CONFIG}"))
    (damaged / names.NOTES).write_text("a note\n")
    (damaged / names.CLAIM).write_text(json.dumps({"host": "x", "machine": "", "pid": 1, "started": 0.0, "token": ""}))
    os.utime(damaged / names.CLAIM, (0, 0))  # of a process that died long ago
    yield Sweep(tmp_path / "t", damaged, other)


class NoTracker:
    next_step, note = 0, ""

    def log(self, line: object) -> None: ...

    def finish(self, summary: object, exit_code: int) -> None: ...


def text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content)

    return write


def change(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content(path.read_bytes()))

    return write


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "absent": Path.unlink,
    "empty": text(""),
    "cut": change(lambda content: content[: len(content) // 2]),
    "a flipped bit": change(lambda content: content[:6] + bytes([content[6] ^ 1]) + content[7:]),
    "no UTF-8": change(lambda content: content[:6] + b"\xff" + content[7:]),
    "a zero byte": change(lambda content: content[: len(content) // 2] + b"\0" + content[len(content) // 2 + 1 :]),
    **{shown: text(shown) for shown in ("[]", "{}", "null", "3", '"text"', "NaN", "[1]", "{}\n[]\n3\n")},
    "5,000 digits": text('{"step": ' + "9" * 5000 + "}\n"),
    "digits that fit no float": text('{"step": ' + "9" * 4000 + "}\n"),
    "half a character": text('{"run_id": "\\ud800", "status": "\\ud800", "error": "\\ud800"}'),
    "deep": text("[" * 100_000),
    "deep objects": text('{"a":' * 100_000),
    "a header that claims terabytes": change(lambda content: (2**43).to_bytes(8, "little") + content[8:]),
    "a directory": instead(Path.mkdir),
    "a link to itself": instead(lambda path: path.symlink_to(path)),
    "a link to nothing": instead(lambda path: path.symlink_to("nowhere")),
    "a pipe": instead(os.mkfifo),
    "a device without end": instead(lambda path: path.symlink_to("/dev/zero")),
}
FILES = (
    *("config.yaml", "result.json", "metrics.jsonl", "provenance.json", "notes.txt", "claim.json"),
    *("sae/config.json", "sae/sae.safetensors", "attempts/1/log.txt", "../study.json", "../plan.json"),
)
VALUES = (None, "text", "../..", [], {}, -1, 0, 1.5, True, float("inf"), 10**300)


def outcome(reader: Callable[[], Any]) -> Any:
    """What a reader returns, or the one line of its refusal."""
    try:
        return reader()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def command(main: Callable[[list[str]], int], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error. A traceback would be raised."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(list(arguments))
    output.getvalue().encode()  # what a terminal in UTF-8 can show
    errors.getvalue().encode()
    return code, output.getvalue(), errors.getvalue()


def read_everything(sweep: Sweep, out: Path) -> None:
    directory, damaged = str(sweep.directory), str(sweep.damaged)
    code, shown, _ = command(status.main, directory, "--json")
    assert code in (0, 2)
    if code == 0:
        assert next(row for row in json.loads(shown) if row["run_id"] == sweep.other.name)["status"] == "done"
        assert command(status.main, directory)[0] == 0
    table = outcome(lambda: load_table(sweep.directory))
    if not isinstance(table, str):
        assert sweep.other.name in set(table.frame["run_id"])
    loaded = outcome(lambda: load(sweep.damaged, ops="reference"))
    code, _, errors = command(export.main, damaged, "--format", "sparsify", "--out", str(out / "out"))
    assert code == (2 if isinstance(loaded, str) else 0), errors
    assert command(replay.main, damaged)[0] in (0, 2)
    assert command(retry.main, directory, "--dry-run")[0] in (0, 2)
    again = [*TINY, f"out={sweep.directory.parent}", "train.seed=0,1"]
    assert command(launch.main, *again, "--dry-run")[0] in (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_survived_or_named(damage: str, name: str, sweep: Sweep, tmp_path: Path) -> None:
    DAMAGES[damage](sweep.damaged / name)
    read_everything(sweep, tmp_path)
    if not name.startswith(".."):
        assert command(status.main, str(sweep.directory))[0] == 0, "one damaged run hides the others"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["result.json", "sae/config.json", "../study.json", "../plan.json", "claim.json"])
def test_a_wrong_value_is_survived_or_named(name: str, sweep: Sweep, tmp_path: Path) -> None:
    path = sweep.damaged / name
    content = json.loads(path.read_text())
    for place, key in enumerate(content):
        without = {other: value for other, value in content.items() if other != key}
        values = VALUES[place % 6 :: 6]  # keys share checks, so each value stands in for a sixth of them
        for changed in (without, *({**content, key: value} for value in values)):
            path.write_text(json.dumps(changed).replace("Infinity", "1e999"))
            try:
                read_everything(sweep, tmp_path)
            except BaseException as error:
                raise AssertionError(f"{name}: {key} = {changed.get(key, 'missing')!r:.40}") from error


def test_a_run_goes_on_whatever_is_damaged_but_its_configuration(sweep: Sweep) -> None:
    """A launch trains what has no result; what only tells of the past does not stop it."""
    for name in ("notes.txt", "claim.json", "metrics.jsonl", "attempts/1/log.txt"):
        (sweep.damaged / "result.json").unlink(missing_ok=True)
        path = sweep.damaged / name
        path.write_bytes(b"\xff[\n")
        os.utime(path, (0, 0))
        assert command(launch.main, *TINY, f"out={sweep.directory.parent}", "train.seed=0,1")[0] == 0, name
        assert json.loads((sweep.damaged / "result.json").read_text())["status"] == "done"


def test_an_exchanged_or_edited_run_is_not_believed(sweep: Sweep, tmp_path: Path) -> None:
    shutil.copy(sweep.other / "result.json", sweep.damaged / "result.json")
    rows = {row["run_id"]: row for row in json.loads(command(status.main, str(sweep.directory), "--json")[1])}
    assert rows[sweep.damaged.name]["status"] == "failed"
    assert f"belongs to run {sweep.other.name}" in rows[sweep.damaged.name]["error"]
    assert rows[sweep.other.name]["status"] == "done"
    read = load_table(sweep.directory)
    assert list(read.frame["run_id"]) == [sweep.other.name]
    assert "unreadable" in read.excluded["reason"].iloc[0]
    with pytest.raises(UserError, match=f"belongs to run {sweep.other.name}"):
        load(sweep.damaged)
    shutil.rmtree(sweep.damaged)
    sweep.other.rename(sweep.damaged)  # whole, under another name
    for reader in (lambda: load(sweep.damaged), lambda: replay.replay(sweep.damaged)):
        with pytest.raises(UserError, match=f"belongs to run {sweep.other.name}"):
            reader()


def test_an_edited_configuration_does_not_train_under_the_old_name(sweep: Sweep) -> None:
    config = sweep.damaged / "config.yaml"
    (sweep.damaged / "result.json").unlink()
    frozen = config.read_text()
    config.write_text(frozen.replace("n_latents: 32", "n_latents: 24"))
    with pytest.raises(UserError, match=r"config\.yaml belongs to run topk-n24-k2-s0-"):
        train_jobs([sweep.damaged])
    # activations enter the name only through the id of their store
    config.write_text(frozen.replace("n_features: 32", "n_features: 48"))
    with pytest.raises(UserError, match="the run was named after"):
        train_jobs([sweep.damaged])
    assert not (sweep.damaged / "result.json").exists()


def test_a_copy_under_a_name_of_its_own_can_be_used(sweep: Sweep, tmp_path: Path) -> None:
    shutil.copytree(sweep.other, tmp_path / "best")
    assert load(tmp_path / "best").origin.hashed
    assert torch.equal(load(tmp_path / "best").W_enc, load(sweep.other).W_enc)


def test_an_edited_result_is_not_believed(sweep: Sweep) -> None:
    path = sweep.other / "result.json"
    path.write_text(path.read_text().replace('"fvu": 0.', '"fvu": 0.0'))
    code, out, _ = command(status.main, str(path.parent.parent))
    assert code == 0 and "it was changed after it was written" in out


def test_a_run_without_hashes_is_used_with_a_note(sweep: Sweep, tmp_path: Path) -> None:
    path = sweep.other / "result.json"
    content = json.loads(path.read_text())
    del content["weights"], content["sha256"]  # as earlier versions wrote it
    path.write_text(json.dumps(content))
    code, _, errors = command(export.main, str(sweep.other), "--format", "sparsify", "--out", str(tmp_path / "out"))
    assert code == 0 and "has no hash of its weights" in errors
