"""A `transformers` model that runs up to a hook point and stops there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harness.activations.lm.hook import Hook, find_blocks, find_hook
from harness.activations.lm.hub import HUB_ERRORS, online, quiet, unreachable
from harness.activations.lm.location import Location
from harness.config import ActivationsConfig
from harness.errors import Unavailable, UserError

LM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types of the language model's weights by their names in the configuration (`activations.lm_dtype`)."""


def load_tokenizer(location: Location) -> Any:
    """The model's tokenizer, without its limit on lengths: contexts are cut by `lm.contexts`."""
    import transformers

    with quiet(), _loading(location, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location.source, **_where(location))
    tokenizer.model_max_length = int(1e30)
    return tokenizer


class HookedModel(NamedTuple):
    """A model and some of its hook points, without the blocks after the last of them."""

    model: nn.Module
    hooks: tuple[Hook, ...]
    device: torch.device
    """Where tokens go."""
    precision: str
    """`fp32` or `bf16`: the precision of the forward."""
    name: str
    """Class of the model, e.g. `BertModel`."""
    flops: tuple[float, ...]
    """Of a token, up to each hook: 2 per weight of the blocks that run, plus 4·context·d per block for attention;
    embeddings are not counted."""

    @property
    def hook(self) -> Hook:
        """The first hook, of those that were asked for."""
        return self.hooks[0]

    def activations(
        self,
        tokens: Int[Tensor, "contexts length"],
        mask: Int[Tensor, "contexts length"] | None,
    ) -> Float[Tensor, "contexts length d"]:
        """The value at the first hook point. `mask` is 1 on tokens and 0 on padding."""
        return self.all_activations(tokens, mask)[0]

    @torch.no_grad()
    def all_activations(
        self,
        tokens: Int[Tensor, "contexts length"],
        mask: Int[Tensor, "contexts length"] | None,
    ) -> list[Float[Tensor, "contexts length d"]]:
        """The values at the hook points, from one forward, which stops at the last of them."""
        reached: dict[int, Tensor] = {}

        def note(number: int, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            # a later block may add to it in place
            reached[number] = value if len(self.hooks) == 1 else value.clone()
            if len(reached) == len(self.hooks):
                raise _Reached

        handles = [
            self.model.base_model.get_submodule(hook.module).register_forward_hook(  # pyright: ignore
                lambda _module, _inputs, output, number=number: note(number, output)
            )
            for number, hook in enumerate(self.hooks)
        ]
        try:
            self.model(input_ids=tokens, attention_mask=mask)
        except _Reached:
            # some blocks flatten contexts and positions
            values = [reached[number].reshape(*tokens.shape, -1) for number in range(len(self.hooks))]
            scales = [hook.module_scale for hook in self.hooks]
            return [value if by == 1 else value * by for value, by in zip(values, scales, strict=True)]
        finally:
            for handle in handles:
                handle.remove()
        raise UserError(f"the forward of {self.name} does not pass the hooked module; choose another activations.hook")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Autocast for a series of forwards: each weight is rounded to bf16 once and cached. Weights that are bf16
        need none."""
        rounds = self.precision == "bf16" and self.model.get_input_embeddings().weight.dtype == torch.float32  # pyright: ignore
        with torch.autocast(self.device.type, torch.bfloat16, enabled=rounds):
            yield


class _Reached(Exception):
    """Ends the forward at the last hook."""


def load_model(
    cfg: ActivationsConfig,
    location: Location,
    precision: str,
    device: torch.device,
    others: Sequence[ActivationsConfig] = (),
    *,
    head: bool = False,
) -> HookedModel:
    """Load the model up to its last hooked block, and find the hooks of `cfg` and of `others`, in this order. With
    `head`, load all of it, the head that predicts the next token as well.

    `others` differ from `cfg` only in layer and hook. Raises `UserError` for a model, layer, hook or head that does not
    exist.
    """
    import transformers

    where, configs = _where(location), [cfg, *others]
    with quiet(), _loading(location, "model"):
        settings = transformers.AutoConfig.from_pretrained(location.source, **where)
        with torch.device("meta"):
            empty = _empty(settings, head)
    name, blocks = find_blocks(empty)
    last = max(each.layer for each in configs)
    if last >= len(blocks):
        raise UserError(
            f"activations.layer={last}: {cfg.model} has {len(blocks)} blocks, numbered 0 to {len(blocks) - 1}"
        )
    limit = getattr(empty.config, "max_position_embeddings", None)
    if limit and cfg.context > limit:
        raise UserError(f"activations.context={cfg.context} is longer than the model's {limit} positions; lower it")
    arguments = {**where, "dtype": LM_DTYPES[cfg.lm_dtype], "output_loading_info": True}
    if cfg.device_map:
        arguments["device_map"] = cfg.device_map
    model_class = type(empty) if head else _cut_after(last, type(empty))
    with quiet(), _loading(location, "model"):
        model, info = model_class.from_pretrained(location.source, config=empty.config, **arguments)
    model.eval()
    if head and info["missing_keys"]:
        raise Unavailable(
            f"activations.model={cfg.model} has no weights that predict the next token (no "
            f"{min(info['missing_keys'])}), so it has no losses; take a causal language model, e.g. activations=smollm2"
        )
    if absent := [key for key in info["missing_keys"] if _runs(key, name)]:
        raise UserError(f"activations.model={cfg.model}: the checkpoint has no weights for {absent[0]} (and others)")
    in_base = find_blocks(empty.base_model)[0]
    hooks = tuple(find_hook(each, model, in_base) for each in configs)
    if not cfg.device_map:
        model.to(device)
    return HookedModel(
        model,
        hooks,
        model.get_input_embeddings().weight.device,
        "bf16" if cfg.lm_dtype == "bf16" else precision,
        type(model).__name__,
        tuple(_flops_per_token(model.get_submodule(name), model.config, each) for each in configs),
    )


def _flops_per_token(blocks: Any, config: Any, cfg: ActivationsConfig) -> float:
    weights = sum(p.numel() for block in blocks[: cfg.layer + 1] for p in block.parameters() if p.dim() >= 2)
    attention = 4 * cfg.context * config.get_text_config().hidden_size * (cfg.layer + 1)
    return float(2 * weights + attention)


def _empty(settings: Any, head: bool) -> Any:
    """The model of a configuration, without a head if there is such a class and none is asked for; on the device of the
    context."""
    import transformers

    automatic: Any = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    try:
        return automatic.from_config(settings, trust_remote_code=False)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)


def _cut_after(layer: int, model_class: Any) -> Any:
    """`model_class` without the blocks after `layer`: `from_pretrained` then never reads their weights.

    The configuration stays that of the whole model, because some architectures scale by the number of blocks.
    """

    def build(self: Any, *arguments: Any, **named: Any) -> None:
        model_class.__init__(self, *arguments, **named)
        del find_blocks(self)[1][layer + 1 :]

    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})


def resolve_precision(cfg: ActivationsConfig, device: torch.device) -> str:
    """`fp32` or `bf16`. `auto` takes bf16 where it is faster: on a GPU and on CPUs with AVX-512 BF16 or AMX."""
    if cfg.lm_precision != "auto":
        return cfg.lm_precision
    return "bf16" if device.type == "cuda" or _cpu_computes_bf16() else "fp32"


@functools.cache
def _cpu_computes_bf16() -> bool:
    # torch has no public query for it; elsewhere than on Linux the user has to set bf16
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text()) is not None


def _runs(key: str, blocks: str) -> bool:
    """Whether the weight `key` is used before the hook: it is an embedding, or in one of the blocks that are left."""
    return key.startswith(f"{blocks}.") or re.search(r"embed|wte|wpe", key) is not None


def _where(location: Location) -> dict[str, Any]:
    # unless told, transformers asks on standard input whether to run code from the model's files
    safely = {"trust_remote_code": False}
    if location.is_local:
        return {"local_files_only": True, **safely}
    return {"revision": location.commit, "local_files_only": not online(), **safely}


@contextmanager
def _loading(location: Location, what: str) -> Iterator[None]:
    """Turn the errors of `transformers` for a wrong or damaged model into one-line `UserError`s."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged, pickled or unknown files raise errors of many classes
        if not location.is_local and isinstance(error, HUB_ERRORS) and not online():
            raise unreachable(f"the {what} of {location.source!r}", error) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            reason = (
                "it needs Python code from the model's own files, which is never run; choose a built-in architecture"
            )
        if "Weights only load failed" in str(error):
            reason = "its pickled weights need code to be loaded, which is never run; convert them to safetensors"
        raise UserError(f"cannot load the {what} of {location.source}: {reason}") from error
