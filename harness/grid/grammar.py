"""One override in Hydra's grammar: a text stays as it was typed, and an error says what is wrong where."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import (
    InputStream,  # pyright: ignore[reportPrivateImportUsage]
    OverrideLexer,  # pyright: ignore[reportPrivateImportUsage]
    OverridesParser,
)
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException

from harness.errors import UserError
from harness.grid.schema import is_list, is_text

MOST_CELLS = 100_000
"""More cells than this are refused before any is made."""

PLAIN = re.compile(r"""["'[]|.*\$\{|(?!(true|false|null|inf|nan)$)[a-z_/][\w./-]*$""", re.IGNORECASE)
"""A text that means itself in Hydra's grammar, or has its quotes."""


def read_override(text: str) -> Override:
    """Parse one override. A text field takes what was typed: `83e2010` and `true` stay texts. Raises `UserError`."""
    override = _parse(text)
    if not is_text(override.key_or_group) or override.is_delete():
        return override
    quoted = _with_quoted_texts(text, override.key_or_group)
    return override if quoted == text else _parse(quoted)


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"cannot read the override '{text}' ({_reason(text, error)}); {_remedy(text)}") from error


def _reason(text: str, error: HydraException) -> str:
    """What the parser says, and the place."""
    first, *_ = str(error).split(" expecting {")[0].splitlines()
    cause = error.__cause__
    token = getattr(cause, "offendingToken", None)
    place = getattr(cause, "startIndex", None) if token is None else token.start
    if place is None or place >= len(text):
        return first
    return f"{first}, character {place + 1}"


def _remedy(text: str) -> str:
    key, equals, value = text.partition("=")
    if not is_text(key) or not equals:
        return "write KEY=VALUE, and several values as KEY=A,B"
    if is_list(key):
        items = ",".join(_quoted(item.strip()) for item in value.strip("[]").split(","))
        return f"put each text in quotes: {shlex.quote(f'{key}=[{items}]')}"
    return f"put the text in quotes: {shlex.quote(f'{key}={_quoted(value)}')}"


def _quoted(text: str) -> str:
    escaped = text.strip("\"'").replace('"', '\\"')
    return f'"{escaped}"'


def _with_quoted_texts(text: str, key: str) -> str:
    """The override with quotes around all that the grammar would read as a number or a yes or no."""
    start = text.index("=") + 1
    value = text[start:]
    if value.startswith(("range(", "interval(")):  # their arguments are numbers
        return text
    result, position = text[:start], 0
    for begin, end, kind in _lone_tokens(value):
        if kind == OverrideLexer.NULL:
            raise UserError(
                f"'{text}': a text is never null; write {key}= for an empty one, "
                f"or {shlex.quote(f'{key}={_quoted(value)}')} for the word"
            )
        result += value[position:begin] + _quoted(value[begin:end])
        position = end
    return result + value[position:]


def _lone_tokens(value: str) -> Iterator[tuple[int, int, int]]:
    """(begin, end, kind) of every number, yes or no and null in `value` that is not a part of a longer text."""
    lexer = OverrideLexer(InputStream(value))
    lexer.mode(OverrideLexer.VALUE_MODE)
    lone = (OverrideLexer.FLOAT, OverrideLexer.INT, OverrideLexer.BOOL, OverrideLexer.NULL)
    between = (
        *(OverrideLexer.COMMA, OverrideLexer.POPEN, OverrideLexer.PCLOSE),
        *(OverrideLexer.BRACKET_OPEN, OverrideLexer.BRACKET_CLOSE),
    )
    together: list[Any] = []
    for token in [*lexer.getAllTokens(), None]:
        if token is not None and token.type not in between:
            together += [token] if token.type != OverrideLexer.WS else []
            continue
        if len(together) == 1 and together[0].type in lone:
            yield together[0].start, together[0].stop + 1, together[0].type
        together = []


def swept_values(override: Override) -> tuple[list[str], list[Any]]:
    """The values of a sweep as texts in Hydra's grammar and as Python values. Raises `UserError`."""
    if not override.is_discrete_sweep():
        raise UserError(
            f"'{override.input_line}': an interval has no list of values; write KEY=A,B or KEY=range(A,B,STEP)"
        )
    if isinstance(sweep := override.value(), RangeSweep):
        _check_length(sweep, override)
    texts = [str(text) for text in override.sweep_string_iterator()]
    if is_text(override.key_or_group):  # functions such as choice() drop the quotes of their arguments
        texts = [text if PLAIN.match(text) else _quoted(text) for text in texts]
    if not texts:
        raise UserError(f"'{override.input_line}' matches nothing; write KEY=A,B")
    values = list(override.sweep_iterator())
    if not all(isinstance(value, int | float) for value in values):  # quoted strings, lists, dicts, null
        values = OverridesParser.create().parse_override(f"x=[{','.join(texts)}]").value()
        assert isinstance(values, list)
    return texts, values


def _check_length(sweep: RangeSweep, override: Override) -> None:
    """Raises `UserError` for a range that is too long to be listed."""
    start, stop, step = (math.nan if part is None else float(part) for part in (sweep.start, sweep.stop, sweep.step))
    length = (stop - start) / step if step else math.inf
    if not length <= MOST_CELLS:
        raise UserError(
            f"'{override.input_line}' has {length:,.0f} values, and a launch has at most {MOST_CELLS:,} cells; "
            "take a larger step: range(A,B,STEP)"
        )
