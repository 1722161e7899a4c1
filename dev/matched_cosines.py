"""How alike the dictionaries of finished SAEs are: `python -m dev.matched_cosines RUN_OR_SWEEP…`.

For each pair A, B with equally many latents: the mean cosine of decoder rows under the one-to-one matching with the
largest sum (Hungarian), the share of matches above 0.7 (Paulo & Belrose, arXiv 2501.16615), and the mean cosine of rows
of equal number, which tells how far a fine-tuned SAE has turned from its start. Random rows are the floor.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from harness.quality.subjects import subjects_of
from harness.record.rundir import read_config
from harness.saes.trained import load
from harness.terminal import say

ALIKE = 0.7


class Likeness(NamedTuple):
    matched: float
    """Mean cosine of matched rows."""
    alike: float
    """Share of matched rows above `ALIKE`."""
    same_number: float
    """Mean cosine of rows of equal number."""


def likeness(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Likeness:
    """Of two dictionaries; rows need not have norm 1."""
    a, b = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (a, b))
    cosines = a @ b.T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    matched = cosines[torch.from_numpy(rows), torch.from_numpy(columns)]
    return Likeness(float(matched.mean()), float((matched > ALIKE).double().mean()), float(cosines.diagonal().mean()))


def main(targets: list[str]) -> None:
    subjects = [subject for target in targets for subject in subjects_of(Path(target))[0]]
    dictionaries = {}
    for subject in subjects:
        sae = load(subject.directory)
        objective = read_config(subject.directory).train.objective
        dictionaries[f"{subject.directory.parent.name}/{subject.name} {objective}"] = sae.W_dec
    first = next(iter(dictionaries.values()))
    dictionaries["random rows"] = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    for (name, a), (other, b) in itertools.combinations(dictionaries.items(), 2):
        if a.shape == b.shape:
            found = likeness(a, b)
            told = f"{found.matched:.3f} matched, {found.alike:.1%} alike, {found.same_number:.3f} same number"
            say(f"{told}  {name} | {other}")


if __name__ == "__main__":
    main(sys.argv[1:])
