"""Write the folder: a page, its scripts, and the data of every SAE in files that are read when they are shown."""

from __future__ import annotations

import datetime
import math
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from analysis.gallery import across
from analysis.gallery.experts import expert_map, experts
from analysis.gallery.latents import SHARD, ablations, list_columns, notes_of_latents, shards
from analysis.gallery.pack import smallest, write_script
from analysis.gallery.subjects import METRIC, Subject, gather, title_of
from analysis.gallery.texts import Text
from harness.errors import UserError
from harness.files import representable

PAGE = "index.html"
_INDEX = "index"
_VALUES = (
    ("downstream", "kl"),
    ("downstream", "delta_ce"),
    ("probes", "loss"),
    ("explanations", "precision"),
    ("explanations", "recall"),
    ("geometry", "duplicates"),
    (METRIC, "live"),
)
"""Qualities that the overview shows, where they were evaluated."""


def write_gallery(targets: Sequence[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    """Write the gallery of `targets` into `out`, by default `gallery` in a single target; return the path of its page
    and notes for the user. An earlier gallery is replaced when the new one is complete.

    Raises `UserError` as `gather` does, for several targets without `out`, and if `out` cannot be written or is a
    folder with something else in it.
    """
    if out is None and len(targets) != 1:
        raise UserError("several targets share no folder: say where the gallery goes with --out")
    out = targets[0] / "gallery" if out is None else out
    if out.exists() and not _is_gallery(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else than a gallery; choose another folder with --out")
    subjects, notes = gather(targets)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
            folder = Path(beside) / "gallery"
            _write(folder, subjects, title_of(targets))
            if out.exists():
                out.rename(Path(beside) / "old")
            folder.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another folder with --out") from error
    return out / PAGE, notes


def _is_gallery(folder: Path) -> bool:
    return (folder / PAGE).is_file() and (folder / "data" / f"{_INDEX}.js").is_file()


def _write(folder: Path, subjects: Sequence[Subject], title: str) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    for source in resources.files("analysis.gallery").joinpath("site").iterdir():
        with resources.as_file(source) as path:
            shutil.copyfile(path, folder / path.name)
    texts = {
        key: Text([each for each in subjects if each.text == key]) for key in {each.text: None for each in subjects}
    }
    for number, text in enumerate(texts.values()):
        columns = {"ids": smallest(text.tokens(text.ids)), "document": smallest(text.document)}
        write_script(data, f"text{number}", columns, words=text.words)
    about = [
        _write_sae(data, number, subjects, texts[subject.text], list(texts).index(subject.text))
        for number, subject in enumerate(subjects)
    ]
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    write_script(data, _INDEX, {}, title=title, written=written, saes=about)


def _write_sae(data: Path, number: int, subjects: Sequence[Subject], text: Text, text_number: int) -> dict[str, Any]:
    """Write the files of an SAE; return its line of the overview."""
    subject = subjects[number]
    table = subject.table("per_latent")
    compared = across.others(subject, subjects)
    table |= across.columns(subject, compared, subjects)
    lines = experts(subject, table, text)
    further = {"notes": notes_of_latents(subject), "ablation": ablations(subject, text)}
    further |= {"experts": lines, "expert_map": expert_map(subject) if lines else []}
    write_script(data, f"{number}/list", list_columns(table, text), **representable(further))
    for part, columns in shards(table, text):
        write_script(data, f"{number}/{part}", columns)
    values = {f"{metric}.{name}": subject.value(metric, name) for metric, name in _VALUES}
    return representable(
        {
            "name": subject.name,
            "sae": subject.setting("sae", "other"),
            "n": len(table["count"]),
            "k": subject.setting("k"),
            "experts": int(table["expert"].max()) + 1,
            "fvu": subject.setting("fvu"),
            "l0": subject.setting("l0"),
            "tokens": subject.qualities[METRIC]["tokens"],
            "values": {name: value for name, value in values.items() if value is not None and math.isfinite(value)},
            "text": text_number,
            "shard": SHARD,
            "width": table["example_acts"].shape[1] // table["example_place"].shape[1],
            "compared": compared,
        }
    )
