"""A `transformers` model that runs up to a hook point and stops there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
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
from harness.errors import UserError


def load_tokenizer(location: Location) -> Any:
    """The model's tokenizer, without its limit on lengths: contexts are cut by `lm.contexts`."""
    import transformers

    with quiet(), _loading(location, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location.source, **_where(location))
    tokenizer.model_max_length = int(1e30)
    return tokenizer


class HookedModel(NamedTuple):
    """A model and one of its hook points."""

    model: nn.Module
    hook: Hook
    device: torch.device
    precision: str
    """`fp32` or `bf16`: the precision of the forward."""
    name: str
    """Class of the model, e.g. `BertModel`."""
    flops_per_token: float
    """2 per weight of the blocks that run, plus 4·context·d per block for attention; embeddings are not counted."""

    @torch.no_grad()
    def activations(
        self,
        tokens: Int[Tensor, "contexts length"],
        mask: Int[Tensor, "contexts length"] | None,
    ) -> Float[Tensor, "contexts length d"]:
        """The value at the hook point; the forward stops there. `mask` is 1 on tokens and 0 on padding."""

        def stop_here(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        module = self.model.base_model.get_submodule(self.hook.module)  # pyright: ignore
        handle = module.register_forward_hook(stop_here)
        try:
            self.model(input_ids=tokens, attention_mask=mask)
        except _Reached as reached:
            value = reached.value.reshape(*tokens.shape, -1)  # some blocks flatten contexts and positions
            return value if self.hook.module_scale == 1 else value * self.hook.module_scale
        finally:
            handle.remove()
        raise UserError(f"the forward of {self.name} does not pass the hooked module; choose another activations.hook")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Autocast for a series of forwards: each weight is rounded to bf16 once and cached."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield


class _Reached(Exception):
    """Carries the value out of the forward at the hook."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def load_model(
    cfg: ActivationsConfig, location: Location, precision: str, device: torch.device, *, head: bool = False
) -> HookedModel:
    """Load the model and find the hook; with `head`, the one that predicts the next token as well.

    Raises `UserError` for a model, layer, hook or head that does not exist.
    """
    import transformers

    arguments = {**_where(location), "dtype": torch.float32, "output_loading_info": True}
    with quiet(), _loading(location, "model"):
        try:
            automatic: Any = transformers.AutoModelForCausalLM if head else transformers.AutoModel
            loaded: Any = automatic.from_pretrained(location.source, **arguments)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            loaded = transformers.AutoModelForCausalLM.from_pretrained(location.source, **arguments)
    model, info = loaded
    model.eval()
    name, blocks = find_blocks(model)
    if cfg.layer >= len(blocks):
        raise UserError(
            f"activations.layer={cfg.layer}: {cfg.model} has {len(blocks)} blocks, numbered 0 to {len(blocks) - 1}"
        )
    if head and info["missing_keys"]:
        raise UserError(
            f"activations.model={cfg.model} has no weights that predict the next token (no "
            f"{min(info['missing_keys'])}), so it has no losses; take a causal language model, e.g. activations=smollm2"
        )
    absent = [key for key in info["missing_keys"] if _runs(key, name, cfg.layer)]
    if absent:
        raise UserError(f"activations.model={cfg.model}: the checkpoint has no weights for {absent[0]} (and others)")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and cfg.context > limit:
        raise UserError(f"activations.context={cfg.context} is longer than the model's {limit} positions; lower it")
    hook = find_hook(cfg, model)
    weights = sum(p.numel() for b in blocks[: cfg.layer + 1] for p in b.parameters() if p.dim() >= 2)
    attention = 4 * cfg.context * model.config.get_text_config().hidden_size * (cfg.layer + 1)
    return HookedModel(model.to(device), hook, device, precision, type(model).__name__, float(2 * weights + attention))


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


def _runs(key: str, blocks: str, layer: int) -> bool:
    """Whether the weight `key` is used before the hook: it is an embedding, or in a block up to `layer`."""
    if key.startswith(f"{blocks}."):
        return int(key.removeprefix(f"{blocks}.").split(".")[0]) <= layer
    return re.search(r"embed|wte|wpe", key) is not None


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
