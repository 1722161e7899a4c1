"""The Hugging Face hub: whether it answers, which commit a name means, and its libraries without their advice."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from harness.errors import UserError

HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__bases__[0])
"""What a failed request raises: `OSError`, or the base class of the HTTP client's errors, if that is another one."""
PROBE_SECONDS = 5.0
"""Timeout of a request."""
_PROBED_FILE = {"model": "config.json", "dataset": "README.md"}


@functools.cache
def online() -> bool:
    """Whether the hub answers. Probed once per process: the libraries themselves would retry for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except HUB_ERRORS:
        return False
    return True


def resolve_commit(kind: str, name: str, revision: str) -> str:
    """The commit of `revision` (empty: the default branch) of a hub repository, from the hub or the local cache.

    `kind` is `model` or `dataset`. Raises `UserError` when neither the hub nor the cache knows it.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        try:
            path = hf_hub_download(
                name, _PROBED_FILE[kind], repo_type=kind, revision=revision or None, local_files_only=not online()
            )
            return Path(path).parent.name  # …/snapshots/<commit>/<file>
        except EntryNotFoundError:
            if not online():
                raise
            sha = HfApi().repo_info(name, repo_type=kind, revision=revision or None, timeout=PROBE_SECONDS).sha
            assert sha is not None
            return sha
    except HFValidationError as error:
        raise UserError(f"{kind} {name!r} is neither a directory nor a valid hub name") from error
    except HUB_ERRORS as error:
        raise unreachable(f"{kind} {name!r}", error) from error


def repository_file(name: str, commit: str, file: str) -> Path | None:
    """A small file of a model at a commit, from the hub or the local cache; None if neither has it."""
    try:
        return Path(hf_hub_download(name, file, revision=commit, local_files_only=not online()))
    except HUB_ERRORS:
        return None


def unreachable(what: str, error: BaseException) -> UserError:
    """The error for a model or dataset that the hub does not give, with what the user can do."""
    if not online():
        return UserError(
            f"{what} is no local directory, is not in the local cache, and the hub ({constants.ENDPOINT}) cannot be "
            f"reached: check the connection and HF_HUB_OFFLINE, give a local directory, or use "
            f"activations=minilm, which needs no hub"
        )
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{what} cannot be loaded from the hub; check the name, revision and access rights: {reason}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence advice and progress bars of the Hugging Face libraries. Errors are still raised."""
    import transformers

    names = ("transformers", "datasets", "huggingface_hub", "fsspec", "httpx", "urllib3")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = transformers.utils.logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars[0]:
            transformers.utils.logging.enable_progress_bar()
        if bars[1]:
            enable_progress_bars()
