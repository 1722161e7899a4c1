"""The text of single tokens, as it stands inside a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token behind another one, with the space that some tokenizers only write there. Parts of a character
    are written as their bytes, e.g. `\\xe2\\x80`."""
    front = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = _decode(tokenizer, front)
    texts = []
    for token in ids:
        text = _decode(tokenizer, [*front, token])
        text = text[len(before) :] if text.startswith(before) else _decode(tokenizer, [token])
        texts.append(_bytes(tokenizer, token) or text if "\ufffd" in text else text)
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _bytes(tokenizer: Any, token: int) -> str:
    """The bytes of a token of a byte-level vocabulary, whose characters stand for one byte each; empty for others."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    of = {character: byte for byte, character in bytes_to_unicode().items()}
    name = str(tokenizer.convert_ids_to_tokens(token))
    return "".join(f"\\x{of[c]:02x}" for c in name) if all(c in of for c in name) else ""
