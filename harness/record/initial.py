"""Which file an SAE that a run starts from is, and what identifies its content. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError
from harness.files import sha256_of
from harness.record import names

OWN = "run"
_WEIGHTS = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"}
"""Format → name of the file with the weights."""


class Initial(NamedTuple):
    form: str
    """`OWN` or one of the formats of other tools."""
    directory: Path
    weights: Path


def find_initial(text: str) -> Initial:
    """The weights that `train.init_from` names. Raises `UserError` when there are none."""
    form, _, rest = text.partition(":")
    if form in _WEIGHTS:
        directory = Path(rest)
        found = sorted(directory.rglob(_WEIGHTS[form]))
        if len(found) != 1:
            raise UserError(
                f"train.init_from={text}: {len(found)} files {_WEIGHTS[form]} in {directory}, one is needed; name the "
                "directory of one SAE"
            )
        return Initial(form, found[0].parent, found[0])
    weights = Path(text) / names.SAE / names.WEIGHTS
    if not weights.is_file():
        raise UserError(
            f"train.init_from={text}: no {names.SAE}/{names.WEIGHTS} there; give the directory of a finished run, or "
            f"FORMAT:DIR with one of {', '.join(_WEIGHTS)}"
        )
    return Initial(OWN, Path(text), weights)


def content_hash(text: str) -> str:
    """SHA-256 of the weights that `train.init_from` names."""
    initial = find_initial(text)
    try:
        return sha256_of(initial.weights)
    except OSError as error:
        raise UserError(f"{initial.weights} cannot be read ({error.strerror or error})") from error
