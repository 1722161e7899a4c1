"""Settings are recorded, shown and sent to trackers, so a secret among them is refused. The message never shows it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from harness.config import Config
from harness.errors import UserError

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
"""Environment variables with such names hold secrets."""

LEAST_LENGTH = 8
"""Shorter values are no secrets: they would be found in any text."""

ASSIGNMENT = re.compile(
    r"""(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)["']?\s*[=:]\s*["']?[^\s"'$~/`][^\s"'$`]{7,}""", re.IGNORECASE
)
"""A value given to such a name; not a path, nor what the shell reads from a variable or a command."""

TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}"
    r"|wandb_v1_\w{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})|://[^/\s:@]+:[^/\s:@]+@"
)
"""Tokens that show by their form what they are, and passwords in addresses."""


def refuse_secrets(configs: Iterable[Config]) -> None:
    """Raises `UserError` if a text of a configuration holds a secret."""
    known = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= LEAST_LENGTH]
    seen: set[int] = set()  # cells share their sections

    def walk(section: Any, where: str) -> None:
        for name, setting in vars(section).items():
            if dataclasses.is_dataclass(setting):
                if id(setting) not in seen:
                    seen.add(id(setting))
                    walk(setting, f"{where}{name}.")
                continue
            for text in _flat(setting):
                if isinstance(text, str) and _is_secret(text, known):
                    raise UserError(
                        f"{where}{name} holds a key, token or password, and all settings are recorded and shown; "
                        "export it in the shell that launches, which jobs inherit, or let cluster.setup read it from "
                        "a file"
                    )

    for config in configs:
        walk(config, "")


def _flat(setting: Any) -> list[Any]:
    """The single values of a setting, which may be a list, also of mappings."""
    if isinstance(setting, dict):
        setting = list(setting.values())
    return [value for part in setting for value in _flat(part)] if isinstance(setting, list) else [setting]


def _is_secret(text: str, known: Sequence[str]) -> bool:
    found = ASSIGNMENT.search(text) or TOKEN.search(text)
    return found is not None or any(value in text for value in known)
