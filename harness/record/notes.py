"""Notes of a run, such as a checkpoint that was refused. They are kept over all attempts."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError
from harness.files import write_text_atomic
from harness.record import names
from harness.record.provenance import now
from harness.schema import read_text


def add_note(run_dir: Path, text: str) -> None:
    """Add a dated line to `notes.txt` of the run. Called by the rank that writes."""
    lines = [*read_notes(run_dir), f"{now()} {text}"]
    write_text_atomic(run_dir / names.NOTES, "".join(f"{line}\n" for line in lines))


def read_notes(run_dir: Path) -> list[str]:
    """All notes of a run, oldest first. A file that cannot be read is a note itself: it must not end a training."""
    try:
        return read_text(run_dir / names.NOTES).splitlines()
    except FileNotFoundError:
        return []
    except UserError as error:
        return [str(error)]
