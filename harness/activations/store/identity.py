"""Which store: its name is the hash of its recipe. No torch.

The recipe is everything that decides the rows: model, hook, text, row counts … It is known before a row is computed, so
two stores of one name were made the same way; their bytes are not what is hashed (the manifest has a sha256 per file).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from harness.activations.lm import gguf
from harness.activations.lm.hub import resolve_commit
from harness.activations.lm.location import Location, locate, read_settings, special_markers, weight_files
from harness.activations.lm.text import file_digest, read_otherwise_before, text_files, tokens_field
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import user_path

RECIPE_VERSION = 1
"""Raise it when the same settings would give other rows of a language model (another order, another cut)."""
SYNTHETIC_VERSION = 2
"""The same for synthetic rows."""
MENDED_HOOKS = {
    *("afmoe", "beam", "bloom", "cpmant", "deepseek_v4", "doge", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo"),
    *("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"),
    *(
        "gemma4_unified_text",
        "glm4",
        "glm4v",
        "glm4v_text",
        "gpt_neox_japanese",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
    ),
    *("granitemoehybrid", "granitemoeshared", "hy_v4", "hyperclovax", "inkling_text", "inkling2_text", "kolibri1"),
    *(
        "lfm3",
        "longcat_flash",
        "minicpm3",
        "minimax",
        "mpt",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "zamba",
        "zamba2",
        "zaya",
    ),
}
"""Model types whose `mlp_out` or `attn_out` earlier versions took from a module that is not what the block adds. Their
recipes say so, so that no store of theirs is used. Which module is right is found by `lm.hook`, not by this list."""
TOKENIZER_FILES = re.compile(r"tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model")


def store_id(cfg: ActivationsConfig) -> str:
    """Recipe hash, 16 hex digits: equal exactly if the rows are meant to be equal. Cached per distinct configuration.

    For a language model the recipe covers the model (hub commit, or hash of the local files), hook, tokenizer, text,
    context, positions, seed, dtype and row counts. Raises `UserError` if model or text cannot be found.
    """
    return recipe_hash(recipe(cfg))


def recipe_hash(settings: dict[str, Any]) -> str:
    """The id of the store with this `recipe`."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def recipe(cfg: ActivationsConfig) -> dict[str, Any]:
    """What `store_id` hashes, readable; the manifest keeps it."""
    return json.loads(_recipe(json.dumps(dataclasses.asdict(cfg), sort_keys=True)))


@functools.lru_cache(maxsize=256)
def _recipe(settings: str) -> str:
    container = json.loads(settings)
    from harness.config import SyntheticConfig

    cfg = ActivationsConfig(**{**container, "synthetic": SyntheticConfig(**container["synthetic"])})
    version = SYNTHETIC_VERSION if cfg.kind == "synthetic" else RECIPE_VERSION
    common = {"version": version, "kind": cfg.kind, "seed": cfg.seed, "dtype": cfg.dtype}
    if cfg.kind == "synthetic":
        rows = {"heldout_tokens": round(cfg.heldout_tokens)}
        # a setting of later versions enters where it gives other rows
        synthetic = {name: value for name, value in container["synthetic"].items() if name != "manifolds" or value}
        return json.dumps({**common, **rows, "synthetic": synthetic})
    location = locate(cfg)
    markers = special_markers(location)
    # what earlier versions did otherwise enters where it gives other rows: other stores keep their ids
    changed = {
        **({"hooked": "what the block adds"} if _hook_was_mended(cfg, location) else {}),
        **({"dropped_markers": markers} if markers else {}),
        **({"lm_dtype": cfg.lm_dtype} if cfg.lm_dtype != "fp32" else {}),
        **({"lm_precision": cfg.rows_precision} if cfg.rows_precision else {}),
        **({"outlier_factor": cfg.outlier_factor} if cfg.outlier_factor else {}),
        **({"window_tokens": round(cfg.window_tokens)} if cfg.keep == "window" else {}),
    }
    return json.dumps(
        {
            **common,
            **changed,
            "model": _model_identity(location),
            "hook": cfg.hook,
            "layer": cfg.layer,
            "text": _text_identity(cfg),
            "context": cfg.context,
            "drop_first_position": cfg.drop_first_position,
            "tokens": round(cfg.tokens),
            "heldout_tokens": round(cfg.heldout_tokens),
        }
    )


def _hook_was_mended(cfg: ActivationsConfig, location: Location) -> bool:
    if cfg.hook == "resid_post":
        return False
    settings = read_settings(location, "config.json")
    if settings is None:
        raise UserError(f"activations.model={cfg.model}: its config.json is neither in the cache nor given by the hub")
    nested = settings.get("text_config")
    types = {settings.get("model_type"), nested.get("model_type") if isinstance(nested, dict) else None}
    return not MENDED_HOOKS.isdisjoint(types)


def _model_identity(location: Location) -> dict[str, str]:
    """Hub name and commit, the hash of a GGUF file, or the hashes of configuration, tokenizer and weights. A path does
    not identify a model."""
    if not location.is_local:
        return {"hub": location.source, "commit": location.commit}
    directory = Path(location.source)
    if (directory / gguf.SOURCE).is_file():
        return {"gguf": (directory / gguf.SOURCE).read_text(encoding="utf-8").strip()}
    weights = weight_files(directory)
    if not weights:
        raise UserError(f"activations.model={location.source}: the directory has no *.safetensors or *.bin weights")
    others = [path for path in sorted(directory.iterdir()) if path.is_file() and TOKENIZER_FILES.fullmatch(path.name)]
    return {
        "weights": _digest_of([directory / "config.json", *weights]),
        "tokenizer": _digest_of(others),
    }


def _text_identity(cfg: ActivationsConfig) -> dict[str, Any]:
    if cfg.mixture:
        return {"mixture": [{**_text_identity(text), "weight": weight} for text, weight in cfg.texts]}
    if cfg.text != "hub":
        contents = sorted(file_digest(path) for path in text_files(cfg))
        hashed = hashlib.sha256("\n".join(contents).encode()).hexdigest()
        identity = {"source": cfg.text, "sha256": hashed, "field": cfg.text_field if cfg.text == "files" else ""}
        if cfg.text == "tokens":
            identity["field"] = tokens_field(cfg)
        if cfg.text == "files" and any(map(read_otherwise_before, text_files(cfg))):
            identity["documents"] = "without BOM, long rows cut"
        return identity
    directory = Path(user_path(cfg.dataset))
    settings = {"source": "hub", "config": cfg.dataset_config, "split": cfg.split, "field": cfg.text_field}
    if directory.is_dir():
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {**settings, "sha256": _digest_of(files)}
    return {**settings, "dataset": cfg.dataset, "commit": resolve_commit("dataset", cfg.dataset, cfg.dataset_revision)}


def _digest_of(files: list[Path]) -> str:
    lines = [f"{path.name} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
