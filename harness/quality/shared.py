"""What does not depend on the SAE: rows, text, values at the hook, moments. Computed once, kept in `<out>/_quality/`.

The file names carry a hash of everything that decides the content: model, hook, text, tokens, precision.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from harness.activations.lm.contexts import Special, special_tokens
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_tokenizer, resolve_precision
from harness.activations.lm.splice import LOGITS, SplicedModel, load_spliced
from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.activations.store.identity import recipe
from harness.config import ActivationsConfig
from harness.errors import Unavailable, UserError
from harness.files import write_tensors_atomic
from harness.process.claim import Owner, claim
from harness.process.device import pick_device
from harness.process.signals import Interrupted, StopFlag
from harness.progress import Progress
from harness.quality.text import heldout_contexts
from harness.record import names

VERSION = 1
"""Raised when the same settings would give another text or other values."""
MASSIVE = 10.0
"""A row whose norm is above this many times the median norm is massive: no SAE is judged on it, and in splicing it
keeps its own value. So does position 0, whose norm is far from that of the others in most models."""
_ROWS = 8192


class Rows(NamedTuple):
    """Held-out rows without massive ones."""

    x: Float[Tensor, "rows d"]
    document: Int[Tensor, " rows"]
    """Number of the document, from 0 without gaps."""
    mean: Float[Tensor, " d"]
    """Of training rows: the prediction whose fvu is 1."""
    kept_share: float

    @property
    def documents(self) -> int:
        return int(self.document.max()) + 1


class Reference(NamedTuple):
    """Of a sample of training rows without massive ones, fp32."""

    mean: Float[Tensor, " d"]
    directions: Float[Tensor, "d d"]
    """Principal directions in rows, that of the largest variance first."""
    median_norm: float

    def ordinary(self, norms: Float[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """Which rows are not massive."""
        return norms <= MASSIVE * self.median_norm


class Text(NamedTuple):
    """Contexts of held-out documents and what the model computes at the hook."""

    ids: Int[Tensor, "contexts length"]
    document: Int[Tensor, " contexts"]
    hidden: Float[Tensor, "contexts length d"]
    kept: Bool[Tensor, "contexts length"]
    """What an SAE is judged on and what is replaced: not position 0, no special tokens, no massive rows."""
    content: Bool[Tensor, "contexts length"]
    """Positions that are no special tokens."""

    @property
    def documents(self) -> int:
        return int(self.document.max()) + 1


class Shared:
    """Opened lazily: a metric that needs only weights loads neither rows nor a model."""

    def __init__(
        self,
        cfg: ActivationsConfig,
        out: Path,
        tokens: int,
        stop: StopFlag,
        progress: Progress,
        judge: str = "embedding",
    ) -> None:
        self.judge = judge
        """Who judges explanations, see `judges.make_judge`."""
        self.cfg, self.out, self.tokens, self.stop, self.progress = cfg, out, tokens, stop, progress
        self.device = pick_device("auto")

    def tick(self, done: float, **fields: float) -> None:
        """Show how far a metric is. Raises `Interrupted` when asked to stop."""
        if self.stop.requested:
            raise Interrupted
        self.progress.update(done, fields)

    @functools.cached_property
    def source(self) -> ActivationSource:
        return open_source(self.cfg, self.out, progress=True, stop=self.stop)

    @functools.cached_property
    def reference(self) -> Reference:
        rows = self.source.sample().float()
        norms = rows.norm(dim=1)
        median = float(norms.median())
        rows = rows[norms <= MASSIVE * median].double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        _, directions = torch.linalg.eigh(centred.T @ centred)
        return Reference(mean.float(), directions.flip(1).T.contiguous().float(), median)

    @functools.cached_property
    def rows(self) -> Rows:
        """At most `tokens` held-out rows."""
        parts, owners, seen = [], [], 0
        for x, document in self.source.heldout(_ROWS):
            room = self.tokens - seen
            if room <= 0:
                break
            parts.append(x[:room].float())
            owners.append(document[:room])
            seen += len(parts[-1])
        x, document = torch.cat(parts), torch.cat(owners)
        kept = self.reference.ordinary(x.norm(dim=1))
        _, document = torch.unique(document[kept], return_inverse=True)
        return Rows(x[kept], document, self.reference.mean, float(kept.double().mean()))

    @property
    def has_model(self) -> bool:
        return self.cfg.kind == "lm"

    @functools.cached_property
    def precision(self) -> str:
        """Of the language model: that in which the rows were harvested."""
        return self.source.description.get("precision") or resolve_precision(self.cfg, self.device)

    @functools.cached_property
    def model(self) -> SplicedModel:
        """Raises `UserError` where there is no causal language model."""
        self.require_model()
        return load_spliced(self.cfg, self.precision, self.device)

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether there is a language model that predicts next tokens."""
        try:
            return self.model is not None
        except UserError:
            return False

    def require_model(self) -> None:
        if not self.has_model:
            raise Unavailable("synthetic activations have no language model: this metric needs one")

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(locate(self.cfg))

    @functools.cached_property
    def special(self) -> Special:
        return special_tokens(self.tokenizer)

    @functools.cached_property
    def text_key(self) -> str:
        """Hash of everything that decides `text`."""
        settings = {name: value for name, value in recipe(self.cfg).items() if name != "tokens"}
        settings |= {"share": self.source.description.get("heldout_share"), "judged": self.tokens}
        settings |= {"precision": self.precision, "quality": VERSION}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def model_key(self, further: dict[str, Any]) -> str:
        """Hash of model, hook, precision and `further` settings, without those of the text and of its rows."""
        text = ("text", "tokens", "heldout_tokens", "seed", "dtype", "drop_first_position", "window_tokens")
        settings = {name: value for name, value in recipe(self.cfg).items() if name not in text}
        settings |= {"precision": self.precision, **further}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def text(self) -> Text:
        """Raises `UserError` where there is no language model."""
        self.require_model()
        tensors = self.cached(f"text-{self.text_key}", self._make_text)
        norms = tensors["hidden"].norm(dim=-1)
        content = ~torch.isin(tensors["ids"], torch.tensor(self.special.dropped))
        kept = content & self.reference.ordinary(norms)
        kept[:, 0] = False
        return Text(tensors["ids"], tensors["document"], tensors["hidden"], kept, content)

    def _make_text(self) -> dict[str, Tensor]:
        about = {**self.source.description, **recipe(self.cfg)["text"]}
        ids, document = heldout_contexts(self.cfg, self.tokenizer, self.special, about, self.tokens, self.stop)
        hidden = []
        self.progress.start("values at the hook", ids.numel())
        for start, end in self.batches(*ids.shape):
            hidden.append(self.model.hidden(ids[start:end].to(self.device)).cpu())
            self.tick(end * ids.shape[1])
        self.progress.finish("")
        return {"ids": ids, "document": document, "hidden": torch.cat(hidden)}

    def batches(self, contexts: int, length: int) -> list[tuple[int, int]]:
        """First and last + 1 of the contexts of each batch, with at most `LOGITS` logits."""
        size = max(1, LOGITS // (length * self.model.vocabulary))
        return [(start, min(start + size, contexts)) for start in range(0, contexts, size)]

    def cached(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that were made before, or are made now. A file that cannot be read is made again."""
        path = self.out / names.SHARED / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)

        def told(owner: Owner | None) -> None:
            self.progress.note(f"waiting for {path}, which {owner or 'another process'} makes")

        # jobs of one array start together: the first computes, the others wait for it
        with claim(path.with_suffix(".lock"), wait=True, stop=self.stop, on_wait=told):
            if path.is_file():
                try:
                    return load_file(path)
                except (OSError, SafetensorError):
                    self.progress.note(f"{path} is damaged and is made again")
            tensors = make()
            write_tensors_atomic(path, tensors)
        return tensors
