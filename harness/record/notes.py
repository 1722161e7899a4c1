"""Notes of a run, such as a checkpoint that was refused. They are kept over all attempts."""

from __future__ import annotations

from pathlib import Path

from harness.files import write_text_atomic
from harness.record import names
from harness.record.provenance import now


def add_note(run_dir: Path, text: str) -> None:
    """Add a dated line to `notes.txt` of the run. Called by the rank that writes."""
    lines = [*read_notes(run_dir), f"{now()} {text}"]
    write_text_atomic(run_dir / names.NOTES, "".join(f"{line}\n" for line in lines))


def read_notes(run_dir: Path) -> list[str]:
    """All notes of a run, oldest first."""
    path = run_dir / names.NOTES
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
