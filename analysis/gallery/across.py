"""The same feature in the other SAEs of a sweep: for each latent, the nearest decoder rows of each.

Where a latent of a narrow SAE has several near rows in a wider one, the feature was split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.gallery.subjects import Subject

OTHERS = 12
"""SAEs that each latent is compared with, at most: first those of the same architecture and k, then the others."""
NEAREST = 3
_ROWS = 1024


def others(subject: Subject, subjects: Sequence[Subject]) -> list[int]:
    """Numbers of the SAEs that `subject` is compared with, in the order of `subjects`."""
    ranked = sorted(
        (number for number, other in enumerate(subjects) if other is not subject),
        key=lambda number: (
            subjects[number].kind != subject.kind,
            subjects[number].setting("n_latents") != subject.setting("n_latents"),
            number,
        ),
    )
    return sorted(ranked[:OTHERS])


def nearest(own: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and cosine of the `NEAREST` rows of `theirs` for each row of `own`, the nearest first; all of norm 1."""
    few = min(NEAREST, len(theirs))
    index = np.zeros((len(own), few), np.int64)
    cosine = np.zeros((len(own), few), np.float32)
    for start in range(0, len(own), _ROWS):
        cosines = own[start : start + _ROWS] @ theirs.T
        best = np.argpartition(-cosines, few - 1, axis=1)[:, :few]
        values = np.take_along_axis(cosines, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        index[start : start + _ROWS] = np.take_along_axis(best, order, 1)
        cosine[start : start + _ROWS] = np.take_along_axis(values, order, 1)
    return index, cosine


def columns(subject: Subject, numbers: Sequence[int], subjects: Sequence[Subject]) -> dict[str, np.ndarray]:
    """`across` and `across_cosine` (n, SAEs, `NEAREST`), in the order of `numbers`; −1 where an SAE has other rows."""
    own = subject.decoder()
    index = np.full((len(own), len(numbers), NEAREST), -1, np.int64)
    cosine = np.zeros(index.shape, np.float32)
    for place, number in enumerate(numbers):
        theirs = subjects[number].decoder()
        if theirs.shape[1] == own.shape[1]:
            found = nearest(own, theirs)
            index[:, place, : found[0].shape[1]], cosine[:, place, : found[0].shape[1]] = found
    return {"across": index, "across_cosine": cosine}
