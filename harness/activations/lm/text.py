"""Text: documents of the Python standard library, of local files (also of token ids), or of a Hugging Face dataset.

A document is one source file, one .txt file, one line of a .jsonl file, or one row of a .parquet file or a dataset; in
.txt and .jsonl files a long one is cut at line ends. Files may be compressed (.gz, .bz2, .zst). A document is
identified by the hash of its content, so that neither the order nor the choice of held-out documents depends on the
file system.
"""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from harness.activations.lm.hub import HUB_ERRORS, quiet, unreachable
from harness.activations.shuffle import digest64
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import user_path

STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
"""Directories that are not read: the standard library's tests, and what does not belong to it."""
TXT_DOCUMENT_CHARACTERS = 65_536
"""A longer text is cut into several documents, so that one long book can be split for evaluation."""
FILE_KINDS = (".txt", ".jsonl", ".parquet")
TOKEN_KINDS = (".parquet", ".arrow")
"""Files of `text=tokens`."""
TOKENS_FIELD = "input_ids"
"""Their column, unless `text_field` names another."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Endings of compressed files, and what pyarrow calls them."""
CHARACTERS_PER_TOKEN = 4
"""About how many characters of text a token stands for."""
WINDOW_CHARACTERS = 1 << 26
"""Documents are sorted by hash within windows of this size, so that memory stays bounded for any text."""


class Document(NamedTuple):
    text: str
    digest: bytes
    """sha256 of the UTF-8 text, or of the ids."""
    ids: Int[np.ndarray, " tokens"] | None = None
    """Token ids of a text that comes tokenized; `text` is empty then."""

    @property
    def size(self) -> int:
        """Characters, or about as many as its ids stand for."""
        return len(self.text) if self.ids is None else CHARACTERS_PER_TOKEN * len(self.ids)


def documents(cfg: ActivationsConfig, revision: str) -> Iterator[Document]:
    """Distinct documents in an order that depends only on their content and `cfg.seed`.

    For a hub dataset, and for text longer than a window, it also depends on the order of the rows. `revision` is the
    resolved commit of a hub dataset. Raises `UserError` for text that cannot be read.
    """
    seen: set[bytes] = set()
    for document in _ordered(_texts(cfg, revision), cfg.seed):
        if document.digest not in seen:
            seen.add(document.digest)
            yield document


def text_files(cfg: ActivationsConfig) -> list[Path]:
    """The files of `text=stdlib`, `files` or `tokens`. Raises `UserError` if there are none."""
    if cfg.text == "stdlib":
        return _stdlib_files()
    return _matching_files(cfg.text_paths, TOKEN_KINDS if cfg.text == "tokens" else FILE_KINDS)


def tokens_field(cfg: ActivationsConfig) -> str:
    """The column of `text=tokens`."""
    return TOKENS_FIELD if cfg.text_field == "text" else cfg.text_field


def _texts(cfg: ActivationsConfig, revision: str) -> Iterator[str | Int[np.ndarray, " tokens"]]:
    if cfg.text == "hub":
        yield from _dataset_texts(cfg, revision)
        return
    paths = text_files(cfg)
    # the order follows the content, so the same files under other names give the same store
    for path in sorted(paths, key=lambda path: digest64(cfg.seed, file_digest(path))):
        if cfg.text == "stdlib":
            yield from _stdlib_texts(path)
        elif cfg.text == "tokens":
            yield from _token_rows(path, tokens_field(cfg))
        else:
            yield from _file_texts(path, cfg.text_field)


def _ordered(texts: Iterable[str | Int[np.ndarray, " tokens"]], seed: int) -> Iterator[Document]:
    window: list[Document] = []
    characters = 0
    for text in texts:
        if isinstance(text, np.ndarray):
            window.append(Document("", hashlib.sha256(text.tobytes()).digest(), text))
        elif text.strip():
            # a lone surrogate is legal in JSON but has no UTF-8; it becomes a question mark
            encoded = text.encode("utf-8", errors="replace")
            window.append(Document(encoded.decode("utf-8"), hashlib.sha256(encoded).digest()))
        else:
            continue
        characters += window[-1].size
        if characters >= WINDOW_CHARACTERS:
            yield from _by_hash(window, seed)
            window, characters = [], 0
    yield from _by_hash(window, seed)


def _by_hash(window: list[Document], seed: int) -> list[Document]:
    return sorted(window, key=lambda document: digest64(seed, document.digest))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - STDLIB_SKIPPED)
        # _sysconfigdata… is generated by the build and full of paths
        files += [Path(directory, name) for name in names if name.endswith(".py") and "_sysconfigdata" not in name]
    if not files:
        raise UserError(
            f"activations.text=stdlib: no sources under {root}; use activations.text=files with activations.text_paths"
        )
    return sorted(files)


def _stdlib_texts(path: Path) -> Iterator[str]:
    if path.parent.name == "pydoc_data" and path.stem == "topics":
        from pydoc_data.topics import topics

        yield from topics.values()  # the language reference, a document per topic
        return
    try:
        with tokenize.open(path) as file:  # reads the encoding from the coding cookie
            yield file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} of the standard library as text: {error}") from error


def _matching_files(patterns: Iterable[str], kinds: tuple[str, ...]) -> list[Path]:
    paths: set[Path] = set()
    for pattern in patterns:
        literal = Path(user_path(pattern))
        if literal.is_dir():
            raise UserError(
                f"activations.text_paths: {pattern!r} is a directory; name the files in it, "
                f"e.g. {pattern.rstrip('/')}/*.jsonl"
            )
        # a name that exists is no pattern, whatever characters it has
        found = [literal] if literal.exists() else map(Path, glob.glob(str(literal), recursive=True))  # noqa: PTH207
        files = [path for path in found if path.is_file()]
        if not files:
            raise UserError(f"activations.text_paths: no file matches {pattern!r} (from {Path.cwd()})")
        paths.update(path.resolve() for path in files)
    for path in sorted(paths):
        if _kind(path) not in kinds:
            compressed = "" if kinds == TOKEN_KINDS else f" (also compressed: {', '.join(COMPRESSIONS)})"
            raise UserError(
                f"activations.text_paths: {path} is no {', '.join(kinds[:-1])} or {kinds[-1]} file{compressed}; "
                f"convert or exclude it"
            )
    return sorted(paths)


def _kind(path: Path) -> str:
    """The ending of a file, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _file_texts(path: Path, field: str) -> Iterator[str]:
    try:
        if _kind(path) == ".parquet":
            with _opened(path) as file:
                yield from _parquet_texts(path, file, field)
            return
        # Windows programs begin a file with a BOM
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig") as lines:
            yield from _cut(lines.read()) if _kind(path) == ".txt" else _jsonl_texts(path, lines, field)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _opened(path: Path) -> Any:
    """A file to read, unpacked if it is compressed."""
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    import pyarrow

    stream = pyarrow.input_stream(path, compression=COMPRESSIONS[path.suffix])
    # a Parquet file is read from its end
    return io.BytesIO(stream.read()) if _kind(path) == ".parquet" else stream


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > TXT_DOCUMENT_CHARACTERS:
        end = text.rfind("\n", start, start + TXT_DOCUMENT_CHARACTERS) + 1
        end = end if end > start else start + TXT_DOCUMENT_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _jsonl_texts(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4,300 digits
            reason = getattr(error, "msg", None) or str(error).split(";")[0]
            raise UserError(f"{path} line {number} is not JSON: {reason}; repair or remove the line") from error
        yield from _cut(_field(row, field, f"{path} line {number}"))


def _parquet_texts(path: Path, data: Any, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(data) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(field, str(path), file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for row in batch.to_pylist():
                    yield _field(row, field, str(path))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _token_rows(path: Path, field: str) -> Iterator[Int[np.ndarray, " tokens"]]:
    """The lists of token ids in a column of a Parquet or an Arrow file, one document each."""
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in _record_batches(path):
            if field not in batch.schema.names:
                raise _no_field(field, str(path), batch.schema.names)
            if not pyarrow.types.is_integer(getattr(batch.schema.field(field).type, "value_type", pyarrow.null())):
                raise UserError(f"{path}: field {field!r} holds no lists of token ids; set activations.text_field")
            for ids in batch.column(field):
                row = np.asarray(ids.values if ids.is_valid else [], np.int32)
                if row.size and row.min() < 0:
                    raise UserError(f"{path}: field {field!r} holds the id {row.min()}, which is no token")
                if row.size:
                    yield row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _record_batches(path: Path) -> Iterator[Any]:
    """Of a Parquet file, or of an Arrow file or stream, as `datasets` writes them."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(path)) as data:
        try:
            reader = pyarrow.ipc.open_stream(data)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(data)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _dataset_texts(cfg: ActivationsConfig, revision: str) -> Iterator[str]:
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"dataset {cfg.dataset!r}"
    with quiet():
        try:
            rows = datasets.load_dataset(
                cfg.dataset, cfg.dataset_config or None, split=cfg.split, revision=revision or None, streaming=True
            )
            for row in rows:
                yield _field(row, cfg.text_field, where)
        except UserError:
            raise
        except HUB_ERRORS as error:
            raise unreachable(where, error) from error
        except (ValueError, RuntimeError, ImportError, DatasetsError) as error:
            # the first line of what `datasets` raises for a wrong split, configuration or directory, or for a dataset
            # that is a script
            raise UserError(f"{where} (split {cfg.split!r}): {str(error).splitlines()[0]}") from error


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        raise _no_field(field, where, list(row) if isinstance(row, dict) else [])
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, not text; set activations.text_field")
    return value


def _no_field(field: str, where: str, present: list[str]) -> UserError:
    has = ", ".join(map(str, present)) or "no fields"
    return UserError(f"{where} has no field {field!r} (it has {has}); set activations.text_field")


@functools.lru_cache(maxsize=4096)
def read_otherwise_before(path: Path) -> bool:
    """Whether earlier versions took other documents from the file: they kept the BOM of a .txt file, and did not cut a
    long row of a .jsonl file. Raises `UserError`."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".txt":
                return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            return path.suffix == ".jsonl" and any(len(line) > TXT_DOCUMENT_CHARACTERS for line in file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


_digests: dict[tuple[str, int, int], str] = {}


def file_digest(path: Path) -> str:
    """sha256 of a file, cached in the process by path, size and modification time. Raises `UserError`."""
    try:
        status = path.stat()
        key = (str(path), status.st_size, status.st_mtime_ns)
        if key not in _digests:
            with path.open("rb") as file:
                _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return _digests[key]
