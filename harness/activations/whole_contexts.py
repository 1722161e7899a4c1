"""A source of whole contexts: batches for which the language model can tell what replacing their rows does to it.

A store shuffles rows over all texts, so they cannot be put back. Here batch t is the rows of whole contexts, a pure
function of (text recipe, stream seed, t): contexts of full length without special tokens inside, in another order in
every epoch. The model computes their values at the hook in the loop. Statistics, the sample and held-out rows are the
store's, of the same text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.activations.lm.contexts import Special, kept_positions, open_contexts, special_tokens
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_tokenizer
from harness.activations.lm.splice import load_spliced
from harness.activations.shuffle import permute
from harness.activations.source import ActivationSource
from harness.activations.statistics import Statistics
from harness.activations.store.identity import recipe
from harness.activations.window.text import TextWindows
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import replacing

LOGITS = 2**24
"""Most logits of one pass with gradients: the pass holds about ten numbers for each."""
VARIANCE_CONTEXTS = 64
"""First contexts of the text, which give the variance at later blocks."""


class Weights(NamedTuple):
    """Of the terms of an end-to-end objective."""

    kl: float
    later: float


class Effects(NamedTuple):
    """What replacing the rows of a batch does, per replaced row."""

    kl: Float[Tensor, ""]
    """Σ over positions of KL(clean‖spliced), nats."""
    later: Float[Tensor, ""]
    """Mean over later blocks of Σ over positions of ‖h − ĥ‖²/V, V the variance of the clean values after the block; 0
    if it has no weight."""
    gradient: Float[Tensor, "rows d"]
    """Of kl·weight + later·weight with respect to the rows that replace, in the model's own units."""


@dataclass(frozen=True)
class ContextBatch:
    """Whole contexts, of whose positions some are replaced."""

    source: WholeContexts
    ids: Int[Tensor, "contexts length"]
    hidden: Float[Tensor, "contexts length d"]
    """The value at the hook."""
    replaced: Bool[Tensor, "contexts length"]

    @property
    def rows(self) -> Float[Tensor, "rows d"]:
        return self.hidden[self.replaced]

    def effects(self, rows: Float[Tensor, "rows d"], weights: Weights) -> Effects:
        """What the model does with `rows` in place of its own."""
        new = self.hidden.clone()
        new[self.replaced] = rows.to(new)
        parts = [
            self.source.effects(self.ids[part], self.hidden[part], new[part], weights)
            for part in torch.arange(len(self.ids), device=new.device).split(self.source.contexts_per_pass)
        ]
        kl, later, gradient = zip(*parts, strict=True)
        count = len(rows)
        whole = torch.cat(gradient)[self.replaced]
        return Effects(torch.stack(kl).sum() / count, torch.stack(later).sum() / count, whole / count)


class ContextStream:
    """Batches in order. The model computes them when they are asked for, in the thread that trains."""

    def __init__(self, source: WholeContexts, seed: int) -> None:
        self._source, self._seed = source, seed

    def batch(self, step: int) -> ContextBatch:
        source = self._source
        ids = source.ids_of(step, self._seed).to(source.model.hooked.device)
        return ContextBatch(source, ids, source.model.hidden(ids), source.replaced.to(ids.device))

    def batches(self, start_step: int) -> Iterator[ContextBatch]:
        """`batch(start_step)`, `batch(start_step + 1)`, … without end."""
        step = start_step
        while True:
            yield self.batch(step)
            step += 1

    def __enter__(self) -> ContextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class WholeContexts:
    """An `ActivationSource` whose stream gives `ContextBatch`es of `batch_tokens` rows."""

    dictionary = None

    def __init__(
        self, store: ActivationSource, cfg: ActivationsConfig, file: Path, batch_tokens: int, device: torch.device
    ) -> None:
        """`store`: of the same text. `file`: where the token ids are kept. Raises `UserError` where there is no causal
        language model, or too little text for a batch."""
        self._store = store
        self.id, self.d_model, self.heldout_rows = store.id, store.d_model, store.heldout_rows
        self.description: dict[str, Any] = store.description
        self.model = load_spliced(cfg, store.description["precision"], device)
        tokenizer = load_tokenizer(locate(cfg))
        special = special_tokens(tokenizer, cfg.text)
        content = np.full(cfg.context - len(special.prefix) - len(special.suffix), -1)
        pattern = kept_positions(
            np.concatenate([special.prefix, content, special.suffix]).astype(np.int64),
            special.dropped,
            cfg.drop_first_position,
        )
        per_context = int(pattern.sum())
        if not file.is_file():
            ids = _whole_contexts(cfg, tokenizer, special, store.description["heldout_share"], per_context, file.parent)
            with replacing(file) as temporary, temporary.open("wb") as out:
                np.save(out, ids)
        self._ids = _open(file, cfg.context)
        self._kept = torch.from_numpy(pattern)
        contexts = math.ceil(batch_tokens / per_context)
        if contexts > len(self._ids):
            raise UserError(
                f"train.batch_tokens={batch_tokens} takes {contexts} whole contexts, and the text has "
                f"{len(self._ids)}; give longer text, raise activations.tokens or lower batch_tokens"
            )
        self._contexts = contexts
        self.replaced = self._kept.repeat(contexts, 1)
        """Positions of a batch that are rows: the first `batch_tokens` that a store would keep."""
        self.replaced &= self.replaced.flatten().cumsum(dim=0).reshape(self.replaced.shape) <= batch_tokens
        self.train_rows: int | None = len(self._ids) * batch_tokens // contexts
        self.contexts_per_pass = max(1, LOGITS // (cfg.context * self.model.vocabulary))
        self.flops_per_row = self.model.suffix_flops(cfg.context) * contexts * cfg.context / batch_tokens
        """Of the suffix: clean, spliced, and the gradient of the spliced one; closed form."""

    def statistics(self, layernorm: bool) -> Statistics:
        return self._store.statistics(layernorm)

    def sample(self) -> Float[Tensor, "rows d"]:
        return self._store.sample()

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        return self._store.heldout(batch_rows)

    def stream(
        self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1
    ) -> ContextStream:
        assert dp == 1 and batch_tokens == int(self.replaced.sum()), "the configuration was checked"
        return ContextStream(self, seed)

    def ids_of(self, step: int, seed: int) -> Int[Tensor, "contexts length"]:
        """Token ids of batch `step`: a pure function. Positions in the endless stream of contexts are cut into epochs,
        each with its own permutation."""
        place = np.arange(step * self._contexts, (step + 1) * self._contexts)
        epoch, count = place // len(self._ids), len(self._ids)
        chosen = np.concatenate(
            [
                permute(place[epoch == number] % count, count, "contexts", seed, int(number))
                for number in np.unique(epoch)
            ]
        )
        return torch.from_numpy(self._ids[chosen].astype(np.int64))

    def effects(
        self,
        ids: Int[Tensor, "contexts length"],
        hidden: Float[Tensor, "contexts length d"],
        new: Float[Tensor, "contexts length d"],
        weights: Weights,
    ) -> Effects:
        """Sums, not per row, and the gradient with respect to all of `new`."""
        with torch.no_grad():
            logits, before = self.model.outputs(ids, hidden)
            clean = torch.log_softmax(logits, dim=-1)
        value = new.detach().requires_grad_()
        logits, after = self.model.outputs(ids, value)
        kl = (clean.exp() * (clean - torch.log_softmax(logits, dim=-1))).sum()
        later = kl.new_zeros(())
        if weights.later:
            errors = [(a - b).square().sum() / v for a, b, v in zip(after, before, self.later_variance, strict=True)]
            later = torch.stack(errors).mean()
        (gradient,) = torch.autograd.grad(weights.kl * kl + weights.later * later, value)
        return Effects(kl.detach(), later.detach(), gradient)

    @functools.cached_property
    def later_variance(self) -> list[float]:
        """E‖h − E h‖² after each later block, over the rows of the first contexts of the text. Raises `UserError` if
        no block is later."""
        ids = torch.from_numpy(self._ids[:VARIANCE_CONTEXTS].astype(np.int64))
        parts: list[list[Tensor]] = []
        with torch.no_grad():
            for part in ids.to(self.model.hooked.device).split(self.contexts_per_pass):
                _, values = self.model.outputs(part, self.model.hidden(part))
                parts.append([value[:, self._kept.to(value.device)].double().flatten(0, 1) for value in values])
        rows = [torch.cat(column) for column in zip(*parts, strict=True)]
        if not rows:
            raise UserError("train.objective=e2e_downstream: no block comes after the last; take e2e, or another layer")
        return [float((each - each.mean(dim=0)).square().sum(dim=1).mean()) for each in rows]


def _whole_contexts(
    cfg: ActivationsConfig, tokenizer: Any, special: Special, share: float, rows: int, folder: Path
) -> Int[np.ndarray, "contexts length"]:
    """The contexts of the training text that give `rows` rows, as many as have `cfg.tokens` rows with those that give
    fewer."""
    whole = dataclasses.replace(cfg, keep="window", window_tokens=cfg.tokens)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        TextWindows(whole, tokenizer, special, recipe(cfg)["text"].get("commit", ""), share).cut(Path(scratch))
        found = open_contexts(Path(scratch), "train")
        chosen = (np.diff(found.offsets) == cfg.context) & (np.diff(found.rows) == rows)
        starts = found.offsets[:-1][chosen]
        return np.asarray(found.ids)[starts[:, None] + np.arange(cfg.context)]


def _open(file: Path, context: int) -> Int[np.ndarray, "contexts length"]:
    try:
        ids = np.load(file, mmap_mode="r")
        if ids.ndim == 2 and ids.shape[1] == context and ids.dtype == np.int32:
            return ids
        problem = f"it has the shape {ids.shape}"
    except (OSError, ValueError, EOFError) as error:
        problem = " ".join(str(error).split())
    raise UserError(f"{file} cannot be read ({problem}); delete it: it is made again")
