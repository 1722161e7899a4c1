"""The studies of a paper: read from sweep directories, or from small tables that can be kept beside a document.

A study `s` is kept in three files: `s.runs.csv`, a row per run; `s.curves.csv`, the held-out points of each run;
`s.documents.parquet`, what each held-out document adds to ln(fvu) of each run, by which runs are paired. A study whose
SAEs were judged also has `s.quality.csv`, the points of curves of a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.questions.paired import PairedErrors, with_repeats
from analysis.runs.axes import AXES
from analysis.runs.heldout import influences
from analysis.runs.load import read_sweep
from analysis.runs.quality import PREFIX
from analysis.runs.table import SWEEP_ROLES, RunTable
from harness.errors import UserError
from harness.record.quality import read_quality

RUNS, CURVES, DOCUMENTS, QUALITY = ".runs.csv", ".curves.csv", ".documents.parquet", ".quality.csv"

KEPT = (
    *("sae", *SWEEP_ROLES.values(), *AXES, "wall_s", "tokens_per_s", "epochs", "imbalance"),
    *(
        "sae.init",
        "sae.aux_alpha",
        "sae.target_l0",
        "sae.balance_weight",
        "sae.routing",
        "sae.consistency",
        "activations.model",
    ),
    *("train.schedule", "train.decay_fraction", "train.warmup_tokens", "train.until", "train.lr_factor"),
)
"""Columns that are kept; besides them all of `quality.…`."""
COMPARED = ("sae.init", "sae.aux_alpha", "sae.balance_weight", "sae.routing", "sae.consistency")
MAPS = (("progressive", "topk"), ("geometry", "expert_map"))
"""(metric, curve) of what is kept in `.quality.csv`."""


@dataclass(frozen=True)
class Study:
    """One sweep."""

    name: str
    runs: RunTable
    influence: pd.DataFrame
    """(runs, documents), see `runs.heldout.influences`; empty without sums per document."""
    points: pd.DataFrame
    """Points of curves of metrics: run, metric, curve, and what that curve has, such as k and fvu; may be empty."""

    def errors(self, table: RunTable) -> PairedErrors | None:
        """Paired errors of some runs of the study; None if fewer than two can be paired."""
        # settings that a study compares make cells of their own; else their effect would count as noise between repeats
        kept = [name for name in COMPARED if name in table.frame]
        cell = table.frame[["sae", *kept]].astype(str).agg(" ".join, axis=1)
        table = table.but(frame=table.frame.assign(sae=cell))
        known = [run for run in table.column("run").astype(str) if run in self.influence.index]
        return with_repeats(table, known, self.influence.loc[known].to_numpy(dtype=float)) if len(known) > 1 else None


Studies = Mapping[str, Study]


def read_studies(sources: Sequence[Path]) -> dict[str, Study]:
    """The studies by name: those of directories of tables, and each sweep directory as one. Raises `UserError`."""
    studies: dict[str, Study] = {}
    for source in sources:
        if not source.is_dir():
            raise UserError(f"{source} is no directory; name sweep directories, or one with tables (*{RUNS})")
        tables = sorted(source.glob(f"*{RUNS}"))
        found = [_from_tables(path) for path in tables] or [_from_sweep(source)]
        studies |= {study.name: study for study in found}
    return studies


def pick(studies: Studies, *names: str) -> Study | None:
    """The first of these studies that has runs."""
    return next((studies[name] for name in names if name in studies and len(studies[name].runs)), None)


def _from_sweep(directory: Path) -> Study:
    runs = read_sweep(directory)
    logged = [runs.history(str(run)) for run in runs.column("run")]
    runs.frame["imbalance"] = [
        float(lines["imbalance"].dropna().iloc[-1]) if "imbalance" in lines else np.nan for lines in logged
    ]
    paired, influence = influences(runs)
    return Study(directory.name, runs, pd.DataFrame(influence, index=pd.Index(paired, dtype=object)), _points(runs))


def _points(runs: RunTable) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for run, directory in runs.directories.items():
        for metric, curve in MAPS:
            found = read_quality(directory, metric)
            for point in (found or {}).get("curves", {}).get(curve, ()):
                if "cosines" in point:
                    cells = enumerate(point["cosines"])
                    some = [{"expert": point["expert"], "other": i, "cosine": value} for i, value in cells]
                else:
                    some = [point]
                rows += [{"run": run, "metric": metric, "curve": curve, **each} for each in some]
    return pd.DataFrame(rows)


def _held_out(lines: pd.DataFrame) -> pd.DataFrame:
    """Of the logged lines those with a held-out fvu."""
    known = [name for name in ("tokens", "flops", "fvu", "eval_rows") if name in lines]
    return lines[lines["fvu"].notna()][known] if "fvu" in lines else lines[known]


def _from_tables(path: Path) -> Study:
    name, folder = path.name.removesuffix(RUNS), path.parent
    try:
        runs = RunTable(pd.read_csv(path), dict(SWEEP_ROLES), name=name)
        curves = pd.read_csv(folder / f"{name}{CURVES}")
        documents, points = folder / f"{name}{DOCUMENTS}", folder / f"{name}{QUALITY}"
        influence = pd.read_parquet(documents).T if documents.exists() else pd.DataFrame()
        judged = pd.read_csv(points) if points.exists() else pd.DataFrame()
    except (OSError, ValueError) as problem:
        raise UserError(f"the tables of {path} cannot be read ({problem}); write them again from the runs") from None
    by_run = {str(run): part.drop(columns="run") for run, part in curves.groupby("run")}
    runs.histories = {run: lambda part=part: part for run, part in by_run.items()}
    return Study(name, runs, influence, judged)


def write_studies(studies: Studies, folder: Path) -> None:
    """Keep the studies as tables in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, study in studies.items():
        frame = study.runs.frame
        columns = [column for column in frame if column in KEPT or str(column).startswith(PREFIX)]
        kept = frame[[column for column in columns if frame[column].notna().any() or column in SWEEP_ROLES.values()]]
        kept.to_csv(folder / f"{name}{RUNS}", index=False, float_format="%.9g")
        curves = [_held_out(study.runs.history(str(run))).assign(run=run) for run in study.runs.column("run")]
        pd.concat(curves).to_csv(folder / f"{name}{CURVES}", index=False, float_format="%.9g")
        if len(study.influence):
            by_document = study.influence.T.astype(np.float32)
            by_document.to_parquet(folder / f"{name}{DOCUMENTS}", compression="zstd", index=False)
        if len(study.points):
            study.points.to_csv(folder / f"{name}{QUALITY}", index=False, float_format="%.6g")
