"""Which module to hook, and by what its output is multiplied, so that the rows are what a block adds to the stream.

A pre-norm block adds the outputs of its attention and of its MLP to the residual stream: x + attention + MLP = x'.
What is added is not always the output of the module of that name: some modules add the residual themselves, some blocks
normalise the output first or multiply it. So the identity is checked on one context, and the modules that satisfy it
are hooked. A post-norm block has no such identity; there the names decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from harness.config import ActivationsConfig
from harness.errors import UserError

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "output.dense", "fc2")
"""Names of a block's MLP. `output.dense` is BERT's, before the residual and its LayerNorm; `fc2` is the last part of an
MLP that is no module of its own."""
ATTENTION_NAMES = ("self_attn", "attention.output.dense", "attn", "attention", "self_attention", "linear_attn")
"""Names of a block's attention."""
_CONTEXT = 16
"""Tokens on which the identity is checked."""
_OF_STREAM, _OF_CHANGE = 1e-5, 1e-3
"""How far the two sides may differ at each token, relative to the stream and to its change: fp32 rounds the sum to
about 1e-7 of the stream."""


class Hook(NamedTuple):
    """A module, and the factor that the block multiplies its output by before it adds it to the stream."""

    module: str
    """Path relative to the base model, as `get_submodule` takes it, e.g. `h.3.mlp`."""
    module_scale: float
    base_model_prefix: str
    """Name of the base model within the model with a head, e.g. `transformer`; empty if it is not nested in one."""


class _Pass(NamedTuple):
    """One context through a block."""

    before: Float[Tensor, "tokens d"]
    after: Float[Tensor, "tokens d"]
    outputs: dict[str, Float[Tensor, "tokens d"]]
    """Outputs of the modules inside that have the stream's shape, by name, in the order in which they ended."""
    post_norm: bool
    """Whether the block's own output is that of a norm."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks: the outermost ModuleList with one entry per hidden layer.

    Raises `UserError` if there is none.
    """
    count = model.config.get_text_config().num_hidden_layers  # pyright: ignore
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not candidates:
        raise UserError(f"{type(model).__name__} has no list of {count} blocks; this architecture is not supported")
    return min(candidates, key=lambda candidate: candidate[0].count("."))


def find_hook(cfg: ActivationsConfig, model: nn.Module, blocks: str) -> Hook:
    """The module whose output, times `module_scale`, are the rows of `cfg.hook`. `blocks` is the path of the list of
    blocks in the base model.

    Raises `UserError` if the block has no such part, or if no modules add up to what the block adds.
    """
    base: nn.Module = model.base_model  # pyright: ignore
    place = f"{blocks}.{cfg.layer}"
    block = base.get_submodule(place)
    prefix: str = model.base_model_prefix  # pyright: ignore
    if cfg.hook == "resid_post":
        return Hook(place, 1.0, prefix)
    attention, mlp = _named(block, ATTENTION_NAMES), _named(block, MLP_NAMES)
    named = mlp if cfg.hook == "mlp_out" else attention
    if attention is None and mlp is None:
        raise UserError(f"{_where(cfg)} has none (parts: {_parts(block)}); use resid_post")
    passed = _pass(model, block, min(_CONTEXT, cfg.context))
    if passed.post_norm:
        if named is None:
            raise UserError(f"{_where(cfg)} has none (parts: {_parts(block)}); use resid_post")
        return Hook(f"{place}.{named}", 1.0, prefix)
    for found in _solutions(passed, attention, mlp):
        part, scale = found[cfg.hook == "mlp_out"]
        return Hook(f"{place}.{part}", scale, prefix)
    raise UserError(
        f"{_where(cfg)}: no modules add up to what the block adds to the residual stream (parts: {_parts(block)}); "
        f"use resid_post"
    )


def _where(cfg: ActivationsConfig) -> str:
    return f"activations.hook={cfg.hook}: block {cfg.layer} of {cfg.model}"


def _parts(block: nn.Module) -> str:
    return ", ".join(name for name, _ in block.named_children())


def _named(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """The path of the first of `names` that the block has, at its top or else anywhere in it."""
    paths = [path for path, _ in block.named_modules()]
    exact = (name for name in names if name in paths)
    nested = (path for name in names for path in paths if path.endswith(f".{name}"))
    return next(itertools.chain(exact, nested), None)


def _solutions(
    passed: _Pass, attention: str | None, mlp: str | None
) -> Iterator[tuple[tuple[str, float], tuple[str, float]]]:
    """Pairs of attention and MLP, each a module and its factor, that add up; those nearest to the names first."""
    change = passed.after - passed.before
    allowed = _OF_STREAM * passed.before.norm(dim=1) + _OF_CHANGE * change.norm(dim=1)
    ended = list(passed.outputs)
    pairs = [
        (first, second)
        for first, second in itertools.product(_candidates(attention, ended), _candidates(mlp, ended))
        if first != second
    ]
    for first, second in pairs:
        if bool(((change - passed.outputs[first] - passed.outputs[second]).norm(dim=1) <= allowed).all()):
            yield (first, 1.0), (second, 1.0)
    for first, second in pairs:
        parts = torch.stack([passed.outputs[first].flatten(), passed.outputs[second].flatten()], dim=1)
        factors = torch.linalg.lstsq(parts, change.flatten()[:, None], driver="gelsd").solution.flatten()
        # six digits are what fp32 gives; rounded, every rank and every resumed harvest has the same factor
        scales = [float(f"{factor:.6g}") for factor in factors.tolist()]
        fitted = (parts @ torch.tensor(scales, dtype=parts.dtype)).reshape(change.shape)
        if min(scales) > 0 and bool(((change - fitted).norm(dim=1) <= allowed).all()):
            yield (first, scales[0]), (second, scales[1])


def _candidates(named: str | None, ended: list[str]) -> list[str]:
    """Modules that may give the part called `named`: itself, what ends after it (a norm), and what it contains, the
    last first (before it adds the residual). Without a name any module, the last first."""
    if named not in ended:
        return ended[::-1]
    inside = [name for name in ended if name.startswith(f"{named}.")]
    return [*ended[ended.index(named) :], *inside[::-1]]


class _Passed(Exception):
    """Ends the forward after the block."""


@torch.no_grad()
def _pass(model: nn.Module, block: nn.Module, length: int) -> _Pass:
    """Run one context of `length` tokens to the end of `block` and record what passed through it, in float64."""
    embeddings = model.get_input_embeddings().weight  # pyright: ignore
    # ids spread over the lower half of the vocabulary: ids of images and other special inputs lie at its end
    tokens = torch.arange(length, device=embeddings.device) * max(1, embeddings.shape[0] // (2 * length))
    # fp32 in the block, so that the sum can be checked; back in bf16, its weights have their bits again
    dtype = embeddings.dtype
    types = {name: value.dtype for name, value in block.state_dict().items()}
    block.to(torch.float32)
    stream: list[Tensor] = []
    outputs: dict[str, Tensor] = {}
    norms: set[str] = set()

    def begin(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        stream.append(_rows(arguments[0] if arguments else named["hidden_states"]))
        return None if dtype == torch.float32 else (_as_fp32(arguments), _as_fp32(named))

    def note(name: str, module: nn.Module, output: Any) -> None:
        value = _tensor(output)
        if value is not None and value.numel() == stream[0].numel() and value.shape[-1] == stream[0].shape[-1]:
            outputs.setdefault(name, _rows(value))
            if "norm" in type(module).__name__.lower():
                norms.add(name)

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        stream.append(_rows(output))
        raise _Passed

    handles = [
        block.register_forward_pre_hook(begin, with_kwargs=True),
        block.register_forward_hook(end),
        *(
            module.register_forward_hook(lambda module, _inputs, output, name=name: note(name, module, output))
            for name, module in block.named_modules()
            if name
        ),
    ]
    try:
        model(input_ids=tokens[None])
    except _Passed:
        before, after = stream
    except Exception as error:  # whatever the model's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{type(model).__name__} does not run on a text alone ({reason}); choose another model"
        ) from error
    else:
        raise UserError(f"the forward of {type(model).__name__} does not pass its blocks; choose another model")
    finally:
        for handle in handles:
            handle.remove()
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            value.data = value.data.to(types.get(name, dtype if value.is_floating_point() else value.dtype))
    return _Pass(before, after, outputs, any(torch.equal(outputs[name], after) for name in norms))


def _as_fp32(value: Any) -> Any:
    """A value of a block's arguments with its bf16 tensors in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_as_fp32, value))
    return {key: _as_fp32(each) for key, each in value.items()} if isinstance(value, dict) else value


def _tensor(output: Any) -> Tensor | None:
    """The tensor that a module gives, the first of several; None if it gives none."""
    value = output[0] if isinstance(output, tuple) and output else output
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _rows(output: Any) -> Float[Tensor, "tokens d"]:
    """A copy: some blocks add in place."""
    value = _tensor(output)
    assert value is not None
    return value.detach().reshape(-1, value.shape[-1]).to("cpu", torch.float64, copy=True)
