"""The text on which language models are judged: whole contexts of held-out documents, which no SAE was trained on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from harness.activations.lm.contexts import HELDOUT_SHARES, Special
from harness.activations.lm.documents import documents
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.process.signals import Interrupted, StopFlag

DOCUMENTS = 64
"""Documents that a text is spread over, if there are so many: the standard errors are clustered by document."""


class Contexts(NamedTuple):
    ids: Int[Tensor, "contexts length"]
    document: Int[Tensor, " contexts"]
    """Number of the document, from 0."""


def heldout_contexts(
    cfg: ActivationsConfig, tokenizer: Any, special: Special, about: dict[str, Any], tokens: int, stop: StopFlag
) -> Contexts:
    """About `tokens` tokens in contexts of `cfg.context`, from the documents that the store holds out.

    `about`: `heldout_share` of the store and `commit` of a hub dataset. A document gives at most one part in
    `DOCUMENTS` of the contexts, unless the text is too short for that. Raises `UserError` if no held-out document
    fills a context.
    """
    share, revision = about.get("heldout_share", HELDOUT_SHARES[0]), about.get("commit", "")
    wanted = max(1, tokens // cfg.context)
    found: list[tuple[int, list[list[int]]]] = []
    most = max(1, wanted // DOCUMENTS)
    while True:
        found = []
        total = 0
        for number, document in enumerate(documents(cfg, revision)):
            if stop.requested:
                raise Interrupted
            if int.from_bytes(document.digest[:8], "big") >= share * 2**64:
                continue
            contexts = _cut(document.text, tokenizer, special, cfg.context, min(most, wanted - total))
            if contexts:
                found.append((number, contexts))
                total += len(contexts)
            if total == wanted:
                break
        if total == wanted or most >= wanted:
            break
        most *= 4
    if not found:
        raise UserError(
            f"no held-out document of activations.text={cfg.text} has the {cfg.context} tokens of a context; "
            "give longer text or lower activations.context"
        )
    ids = [context for _, contexts in found for context in contexts]
    owner = [place for place, (_, contexts) in enumerate(found) for _ in contexts]
    return Contexts(torch.tensor(ids), torch.tensor(owner))


_CHARACTERS_PER_TOKEN = 16
"""A document is cut to so many characters per wanted token before it is tokenised: few texts need more."""


def _cut(text: str, tokenizer: Any, special: Special, length: int, most: int) -> list[list[int]]:
    """The first whole contexts of a document, at most `most`."""
    piece = length - len(special.prefix) - len(special.suffix)
    text = text[: _CHARACTERS_PER_TOKEN * piece * most]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - piece + 1, piece)
    return [[*special.prefix, *ids[start : start + piece], *special.suffix] for start in list(starts)[:most]]
