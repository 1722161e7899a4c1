"""Finished runs as one repository of the Hugging Face hub: a folder per run, and a card with a table.

A folder holds the SAE as it is (`sae/`, which `load("hf:…")` reads back bit for bit) and, where SAELens has the
architecture, as SAELens loads it. The configuration is left out: it names places on the machine that trained it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.record import names
from harness.record.result import read_result
from harness.saes.export import export
from harness.saes.hub import parse, speaking
from harness.saes.model_card import Entry, card

LICENSE = "other"
_PRIVATE = ("config", "error", "notes")
"""Of `result.json`: what may name places on a machine."""


def finished_runs(target: Path) -> list[Path]:
    """The run itself, or the finished runs of a sweep. Raises `UserError` if there is none."""
    candidates = [target] if (target / names.SAE).is_dir() else sorted(target.glob("*/"))
    found = [path.resolve() for path in candidates if (path / names.SAE / names.WEIGHTS_CONFIG).is_file()]
    if not found:
        raise UserError(f"{target} holds no finished run; train it first")
    return found


def push(target: Path, address: str, license_id: str = LICENSE) -> str:
    """Publish a run or a sweep in the repository `address`, which is made (privately) if it does not exist; returns the
    URL of the commit.

    Raises `UserError` without a token, for a wrong address, an unfinished run, and what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    wanted = parse(address)
    if wanted.run:
        raise UserError(f"{address}: runs keep their own names; push to hf:{wanted.repository}")
    if get_token() is None:
        raise UserError(
            "there is no token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to one that may write"
        )
    with tempfile.TemporaryDirectory(prefix="publish-") as folder:
        runs = finished_runs(target)
        files = stage(runs, address, license_id, Path(folder))
        with speaking(address):
            api = HfApi()
            api.create_repo(wanted.repository, private=True, exist_ok=True)
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            message = f"Add {len(runs)} SAE(s)"
            return str(api.create_commit(wanted.repository, operations, commit_message=message).commit_url)


def stage(runs: Sequence[Path], address: str, license_id: str, folder: Path) -> Mapping[str, Path]:
    """Path in the repository → file; what has to be written first is written into `folder`."""
    files: dict[str, Path] = {}
    entries: list[Entry] = []
    for run in runs:
        for path in sorted((run / names.SAE).iterdir()):
            files[f"{run.name}/{names.SAE}/{path.name}"] = path
        result = read_result(run) or {}
        public = folder / run.name / names.RESULT
        public.parent.mkdir()
        public.write_text(json.dumps(_public(result), indent=2) + "\n", encoding="utf-8")
        files[f"{run.name}/{names.RESULT}"] = public
        saelens = folder / run.name / "saelens"
        try:
            export(run, "saelens", saelens)
        except UserError:  # SAELens has no such architecture: the card says so
            entries.append(Entry(run, result, saelens=False))
            continue
        files |= {f"{run.name}/{path.name}": path for path in sorted(saelens.iterdir())}
        entries.append(Entry(run, result, saelens=True))
    readme = folder / "README.md"
    readme.write_text(card(entries, address, license_id), encoding="utf-8")
    return {"README.md": readme, **files}


def _public(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in _PRIVATE}
