"""Words that tables use for yes and no and for how a run ended: ours, and those of W&B, MLflow and Slurm."""

from __future__ import annotations

import pandas as pd

OURS = frozenset({"done", "diverged", "failed", "unfinished", "unreadable"})
"""Words for how a run ended in records of the harness."""

_YES = frozenset({"true", "t", "yes", "y", "1", "1.0", "on"})
_NO = frozenset({"false", "f", "no", "n", "0", "0.0", "off"})
_MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>", "nat", "-", "–"})

_DONE = _YES | {"done", "finished", "completed", "complete", "success", "succeeded", "successful", "ok", "cd"}
_NOT_DONE = (OURS - {"done"}) | _NO | _MISSING
_NOT_DONE |= {"running", "crashed", "killed", "preempted", "preempting", "pending", "scheduled", "queued", "paused"}
_NOT_DONE |= {
    "error",
    "aborted",
    "stopped",
    "interrupted",
    "incomplete",
    "cancelled",
    "canceled",
    "timeout",
    "deadline",
}
_NOT_DONE |= {
    "out_of_memory",
    "out_of_me",
    "oom",
    "node_fail",
    "boot_fail",
    "launch_failed",
    "reconfig_fail",
    "revoked",
}
_NOT_DONE |= {
    "requeued",
    "requeue_hold",
    "resizing",
    "suspended",
    "configuring",
    "completing",
    "signaling",
    "stage_out",
}
_NOT_DONE |= {"ca", "to", "dl", "nf", "bf", "pr", "pd", "r", "s", "rq", "cg", "f"}


def truths(column: pd.Series) -> tuple[pd.Series, list[str]]:
    """A column of words for yes and no as True, False and None (missing or not understood), and the words that are
    not understood."""
    words = _words(column)
    unknown = sorted(set(words) - _YES - _NO - _MISSING)
    values = words.map(lambda word: True if word in _YES else False if word in _NO else None)
    return values.astype(object).where(values.notna(), None), unknown


def ended_well(column: pd.Series) -> tuple[pd.Series, list[str]]:
    """Whether each run was trained to its end, and the words that are not understood (they count as no)."""
    words = _words(column)
    return words.isin(_DONE), sorted(set(words) - _DONE - _NOT_DONE)


def is_ours(column: pd.Series) -> bool:
    """Whether a column holds nothing but our own words for how a run ended."""
    return set(_words(column)) <= OURS


def _words(column: pd.Series) -> pd.Series:
    """Lower case, without blanks and `RunStatus.`, and without what Slurm adds: "CANCELLED by 1000", "CANCELLED+"."""
    words = column.astype(object).map(lambda value: " ".join(str(value).lower().split()))
    words = words.str.replace(r"^.*\.(?=[a-z])", "", regex=True)
    return words.str.replace(r"( by \S+|\+)$", "", regex=True)
