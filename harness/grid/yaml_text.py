"""Texts in YAML files that YAML takes for something else: `12:00:00` is 43200 to it, `83e2010` infinity, `no` false."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from omegaconf._utils import get_yaml_loader

from harness.errors import UserError
from harness.grid.schema import CONF_DIR, is_text

TEXT = "tag:yaml.org,2002:str"


def check_conf() -> None:
    """Raises `UserError` for a text in `conf/` that lacks its quotes, and for a file that is not YAML."""
    for path in sorted(CONF_DIR.rglob("*.yaml")):
        content = read_text(path, "configuration file")
        package = re.search(r"^#\s*@package\s+(\S+)", content, re.MULTILINE)
        where = package[1] if package else "_group_"
        group = ".".join(path.relative_to(CONF_DIR).parts[:-1])
        prefix = {"_global_": "", "_group_": group}.get(where, where)
        check_texts(content, path, lambda key, prefix=prefix: is_text(f"{prefix}.{key}".lstrip(".")))


def read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from error


def check_texts(content: str, path: Path, wanted: Callable[[str], bool]) -> None:
    """Raises `UserError` if a value at a `wanted` key is no text to YAML. Keys are dotted; items of a list share the
    key of the list. `path` is for the message."""
    try:
        node = yaml.compose(content, Loader=get_yaml_loader())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    for key, scalar in _scalars(node, "") if node else ():
        if scalar.tag != TEXT and wanted(key):
            name, text = key.rsplit(".", 1)[-1], scalar.value.replace('"', '\\"')
            kind = scalar.tag.rpartition(":")[2]
            raise UserError(
                f"{path}, line {scalar.start_mark.line + 1}: {name} is a text, but YAML reads "
                f'{scalar.value or "an empty value"} as {kind}; put it in quotes: "{text}"'
            )


def _scalars(node: yaml.Node, key: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield key, node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item, key)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _scalars(value, f"{key}.{name.value}".lstrip("."))
