"""Models in llama.cpp's GGUF format: converted once into a directory that `transformers` loads as any other.

The directory lies in the cache of the Hugging Face libraries (`HF_HOME`) and is named after the hash of the file. It
holds the dequantised weights in fp32, which are exactly those of the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

from huggingface_hub import constants

from harness.activations.lm.hub import quiet
from harness.activations.lm.text import file_digest
from harness.errors import UserError
from harness.files import fsync_directory, fsync_file, write_text_atomic
from harness.terminal import say

SOURCE = "gguf.sha256"
"""In a converted directory: the hash of the file that it was made of. It stands for the model in recipes, so that
another version of `transformers` gives the same store."""


def converted(file: Path) -> Path:
    """The directory of a GGUF file's model, made if missing. Raises `UserError` for a file that cannot be read."""
    digest = file_digest(file)
    directory = Path(constants.HF_HOME) / "sae-scaling" / f"{file.stem}-{digest[:16]}"
    if not directory.is_dir():
        beside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
        try:
            beside.mkdir(parents=True)
            _convert(file, beside)
            write_text_atomic(beside / SOURCE, digest + "\n")
            mode = (beside / SOURCE).stat().st_mode
            for path in beside.iterdir():
                path.chmod(mode)  # safetensors makes files that only their owner can read
                fsync_file(path)
            fsync_directory(beside)
            _rename(beside, directory)
        except OSError as error:
            raise UserError(
                f"cannot convert {file} into {directory}: {error.strerror or error}; "
                "set HF_HOME to a directory with room"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return directory


def _rename(beside: Path, directory: Path) -> None:
    try:
        beside.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another process was faster, and its copy is as good
            raise
    fsync_directory(directory.parent)


def _convert(file: Path, directory: Path) -> None:
    import torch
    import transformers

    named = {"gguf_file": file.name, "local_files_only": True}
    say(f"converting {file.name} once, into {directory.parent}")
    # the library draws a progress bar, whatever it writes to
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **named)
            model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **named)
        except Exception as error:  # a damaged file raises errors of many classes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load the model of {file}: {reason}") from error
        # transformers would write the quantised form, and cannot
        for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, name):
                delattr(owner, name)
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)
