"""Where a language model comes from, and what can be read off it without loading it. No torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from harness.activations.lm.gguf import converted
from harness.activations.lm.hub import repository_file, resolve_commit
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import user_path

_ROLES = ("bos", "eos", "cls", "sep", "pad", "mask", "unk")


class Location(NamedTuple):
    """Where a model is loaded from."""

    source: str
    """A local directory or a hub name."""
    commit: str
    """Resolved hub commit; empty for a directory."""

    @property
    def is_local(self) -> bool:
        return not self.commit


def locate(cfg: ActivationsConfig) -> Location:
    """Find the model `cfg.model`: `package:NAME`, a directory, a GGUF file (converted first), or a hub repository.

    Raises `UserError` if it does not exist or cannot be reached.
    """
    if cfg.model.startswith("package:"):
        return Location(str(_package_directory(cfg.model.removeprefix("package:"))), "")
    directory = Path(user_path(cfg.model))
    if directory.suffix == ".gguf" and directory.is_file():
        return Location(str(converted(directory)), "")
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"activations.model={cfg.model}: the directory has no config.json of a transformers model")
        return Location(str(directory), "")
    return Location(cfg.model, resolve_commit("model", cfg.model, cfg.revision))


def _package_directory(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"activations.model=package:{package}: no such package; pip install {package.replace('_', '-')}"
        )
    for root in map(Path, spec.submodule_search_locations):
        for config in sorted(root.rglob("config.json"), key=lambda path: len(path.parts)):
            if weight_files(config.parent):
                return config.parent
        if files := sorted(root.rglob("*.gguf")):
            return converted(files[0])
    raise UserError(f"activations.model=package:{package}: the package carries no model (transformers or GGUF)")


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a local model: its safetensors files if it has any, else its .bin files."""
    return sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))


def read_settings(location: Location, name: str) -> dict[str, Any] | None:
    """A JSON file of the model, e.g. `config.json`; None if it has none, or neither the hub nor the cache gives it.

    Raises `UserError` for a file that is no JSON object.
    """
    path = (
        Path(location.source) / name if location.is_local else repository_file(location.source, location.commit, name)
    )
    if path is None or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no JSON object; download the model again")
    return settings


def special_markers(location: Location) -> list[str]:
    """Special tokens beyond those with a role (bos, eos, cls, sep, pad, mask, unk), e.g. the markers of a chat."""
    markers: set[str] = set()
    named: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_settings(location, name) or {}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = settings.get(key) or []
            markers.update(map(_content, tokens.values() if isinstance(tokens, dict) else tokens))
        named.update(_content(settings.get(f"{role}_token")) for role in _ROLES)
    return sorted(markers - named)


def _content(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token)


def model_width(cfg: ActivationsConfig) -> int:
    """Width d of the activations, from the configuration of their model; no weights are loaded.

    Raises `UserError` for a model that cannot be found, `OSError` when its configuration cannot be read.
    """
    if cfg.kind == "synthetic":
        return cfg.synthetic.d_model
    location = locate(cfg)
    if location.is_local:
        settings = read_settings(location, "config.json") or {}
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(settings.get(name), int):
                return settings[name]
    from transformers import AutoConfig

    revision = location.commit or None
    return AutoConfig.from_pretrained(location.source, revision=revision, trust_remote_code=False).hidden_size


def needs_hub(cfg: ActivationsConfig) -> bool:
    """Whether the model or the text comes from the Hugging Face hub (or its local cache)."""
    if cfg.kind == "synthetic":
        return False
    local_model = cfg.model.startswith("package:") or Path(user_path(cfg.model)).exists()
    return not local_model or any(text.text == "hub" for text, _ in cfg.texts)
