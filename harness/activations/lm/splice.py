"""A causal language model with the value at its hook replaced: only the blocks after the hook run again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harness import budget
from harness.activations.lm.hook import find_blocks
from harness.activations.lm.location import locate
from harness.activations.lm.model import HookedModel, load_model
from harness.config import ActivationsConfig

LOGITS = 2**26
"""Most logits of one batch: 256 MB."""
_CHECKED_TOKENS = 8
_EQUAL = 1e-4
"""How far logits of the two routes may differ, relative to the largest one."""


class SplicedModel:
    """Logits of a causal model from values at the hook.

    After `resid_post` the hook's value is the whole state, so the blocks up to the hook are skipped. Where a model does
    not allow that (which is checked once, on a few tokens), and for other hooks, the whole model runs and a hook
    replaces the value.
    """

    def __init__(self, hooked: HookedModel, layer: int, hook: str) -> None:
        self.hooked = hooked
        self._model: Any = hooked.model
        _, self._blocks = find_blocks(self._model.base_model)
        self._last = layer
        self._skips = False
        ids = torch.arange(_CHECKED_TOKENS, device=hooked.device)[None] + 5
        self.vocabulary: int = self._model(input_ids=ids[:, :1], use_cache=False).logits.shape[-1]
        if hook == "resid_post":
            hidden = self.hidden(ids)
            whole = self.logits(ids, hidden)
            self._skips = True
            try:
                difference = float((self.logits(ids, hidden) - whole).abs().max() / whole.abs().max())
            except Exception:  # whatever a model's code raises where its blocks are not what it expects
                difference = float("inf")
            self._skips = difference <= _EQUAL

    @property
    def skips(self) -> bool:
        """Whether the blocks up to the hook are skipped."""
        return self._skips

    def hidden(self, ids: Int[Tensor, "contexts length"]) -> Float[Tensor, "contexts length d"]:
        """The value at the hook, fp32."""
        with self.hooked.computing():
            return _precise(self.hooked.activations(ids, None))

    @torch.no_grad()
    def logits(
        self,
        ids: Int[Tensor, "contexts length"],
        hidden: Float[Tensor, "contexts length d"],
        *,
        exact: bool = False,
    ) -> Float[Tensor, "contexts length vocabulary"]:
        """Logits, fp32, when the value at the hook is `hidden` (`ids` give the shape, and the part before the hook).

        `exact`: in fp32 even if the model computes in bf16, for differences that its rounding would drown.
        """
        precision = nullcontext() if exact else self.hooked.computing()
        with self._skipping(hidden) if self._skips else self._replacing(hidden), precision:
            return self._model(input_ids=ids, use_cache=False).logits.float()

    def suffix_flops(self, context: int) -> float:
        """Of a token of a context, see `budget.suffix_flops`."""
        blocks, head = self._blocks[self._last + 1 :], self._model.get_output_embeddings()
        weights = sum(p.numel() for part in (*blocks, head) for p in part.parameters() if p.dim() >= 2)
        return budget.suffix_flops(weights, len(blocks), self._model.config.get_text_config().hidden_size, context)

    def outputs(
        self, ids: Int[Tensor, "contexts length"], hidden: Float[Tensor, "contexts length d"]
    ) -> tuple[Float[Tensor, "contexts length vocabulary"], list[Float[Tensor, "contexts length d"]]]:
        """Logits, and the values after each block that comes after the hook, in fp32 or better; gradients go back to
        `hidden` where they are recorded. For `resid_post`."""
        later: list[Tensor] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            later.append((output if isinstance(output, Tensor) else output[0]).reshape(hidden.shape))

        handles = [block.register_forward_hook(note) for block in self._blocks[self._last + 1 :]]
        try:
            with self._skipping(hidden) if self._skips else self._replacing(hidden), self.hooked.computing():
                logits = self._model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return _precise(logits), [_precise(value) for value in later]

    def continuations(
        self,
        ids: Int[Tensor, " length"],
        hidden: Float[Tensor, "length d"],
        position: int,
        values: Float[Tensor, "variants d"],
    ) -> Iterator[Float[Tensor, "variants later vocabulary"]]:
        """Logits from `position` (at least 1) on when the value there is each of `values`, in parts of at most `LOGITS`
        logits. In fp32, for differences that rounding to bf16 would drown.

        What stands before `position` is the same for all variants and is computed once, where blocks can be skipped.
        """
        past = self._past(ids[None, :position]) if self._skips else None
        for part in values.split(max(1, LOGITS // (len(ids) * self.vocabulary))):
            new = hidden.repeat(len(part), 1, 1)
            new[:, position] = part
            each = ids.expand(len(part), -1)
            if past is None:
                yield self.logits(each, new, exact=True)[:, position:]
            else:
                yield self._continued(each[:, position:], new[:, position:], past)

    @torch.no_grad()
    def _past(self, ids: Int[Tensor, "1 length"]) -> Any:
        import transformers

        past = transformers.DynamicCache(config=self._model.config)
        self._model(input_ids=ids, past_key_values=past, use_cache=True)
        return past

    @torch.no_grad()
    def _continued(self, ids: Tensor, hidden: Tensor, past: Any) -> Tensor:
        past = copy.deepcopy(past)
        past.batch_repeat_interleave(len(ids))
        with self._skipping(hidden):
            return self._model(input_ids=ids, past_key_values=past, use_cache=True).logits.float()

    @contextmanager
    def _skipping(self, hidden: Tensor) -> Iterator[None]:
        originals = list(self._blocks[: self._last + 1])
        for place, block in enumerate(originals):
            self._blocks[place] = _Stored(block, hidden)
        try:
            yield
        finally:
            for place, block in enumerate(originals):
                self._blocks[place] = block

    @contextmanager
    def _replacing(self, hidden: Tensor) -> Iterator[None]:
        scale = self.hooked.hook.module_scale

        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            whole = isinstance(output, Tensor)
            old = output if whole else output[0]
            new = (hidden / scale).to(old.dtype).reshape(old.shape)
            return new if whole else (new, *output[1:])

        module = self._model.base_model.get_submodule(self.hooked.hook.module)
        handle = module.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _precise(value: Tensor) -> Tensor:
    """In fp32, or in fp64 as it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class _Stored(nn.Module):
    """Stands in for a block: returns a stored value. Other attributes are the block's (models read some of them)."""

    def __init__(self, block: nn.Module, value: Tensor) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_value"] = block, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *_arguments: Any, **_named: Any) -> Tensor:
        return self.__dict__["_value"]


def load_spliced(cfg: ActivationsConfig, precision: str, device: torch.device) -> SplicedModel:
    """The causal model of `cfg`. Raises `UserError` as `load_model`, and for a model without a next-token head."""
    return SplicedModel(load_model(cfg, locate(cfg), precision, device, head=True), cfg.layer, cfg.hook)
