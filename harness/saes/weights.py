"""The weights of a finished SAE on disk: one safetensors file, or several with an index where they take more than 4 GB.

Several files follow the Hugging Face convention: `sae-00002-of-00008.safetensors` holds what the index
`sae.safetensors.index.json` lists for it. A tensor with a row per latent is cut into blocks of rows, one per file:
`W_enc.00002-of-00008`. Their rows in order are the tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from harness.budget import WEIGHTS_FILE_BYTES
from harness.errors import UserError
from harness.files import sha256_of, write_json_atomic, write_tensors_atomic
from harness.parallel import Shards
from harness.process.together import together
from harness.record import names
from harness.schema import FILE_NAME, dict_of, fields, read_json, text

_INDEX = fields({"weight_map": dict_of(FILE_NAME, text(r"[\w.\-]+", "the name of a tensor"))})
_BLOCK = re.compile(r"(.+)\.(\d{5})-of-(\d{5})")


def write_weights(folder: Path, tensors: Mapping[str, Tensor], cut: Collection[str], shards: Shards) -> dict[str, str]:
    """Write the weights of all ranks into `folder`. Returns the sha256 of each file, on every rank.

    `tensors` are this rank's; those named in `cut` are its rows of larger ones. Each rank of the first replica writes
    its own rows, so that nothing of the size of the whole is in the memory of one; weights that fit one file are
    gathered by the first rank. Called by all ranks. Raises `OSError` on every rank if one cannot write.
    """
    own = sum(tensors[name].nbytes for name in cut)
    shared = sum(tensor.nbytes for name, tensor in tensors.items() if name not in cut)
    alone = own * shards.shard + shared <= WEIGHTS_FILE_BYTES
    written: dict[str, str] = {}
    if alone:
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            gathered = shards.gather(tensor) if name in cut else tensor
            if shards.rank == 0:
                whole[name] = gathered
        with together(shards):
            if shards.rank == 0:
                written = _write(folder, names.WEIGHTS, whole)
    else:
        with together(shards):
            if shards.dp_rank == 0:
                each = math.ceil((own + shared) / WEIGHTS_FILE_BYTES)
                for number in range(each):
                    written |= _write_part(folder, tensors, cut, shards.shard_rank, shards.shard, number, each)
    hashes: dict[str, str] = {}
    for answer in shards.texts(json.dumps(written)):
        hashes |= json.loads(answer)
    if not alone:
        with together(shards):
            if shards.rank == 0:
                hashes |= _write_index(folder, hashes)
        hashes |= json.loads(shards.texts(json.dumps(hashes))[0])
    with together(shards):
        if shards.rank == 0:
            _remove_others(folder, hashes)
    return hashes


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    write_tensors_atomic(folder / name, tensors)
    return {name: sha256_of(folder / name)}


def _write_part(
    folder: Path, tensors: Mapping[str, Tensor], cut: Collection[str], rank: int, ranks: int, number: int, each: int
) -> dict[str, str]:
    """Write file `number` of the `each` files of a rank."""
    place = f"{rank * each + number + 1:05d}-of-{ranks * each:05d}"
    part = {f"{name}.{place}": tensors[name].tensor_split(each)[number] for name in cut}
    if rank == number == 0:
        part |= {name: tensor for name, tensor in tensors.items() if name not in cut}
    return _write(folder, _part_name(place), part)


def _part_name(place: str) -> str:
    stem, _, ending = names.WEIGHTS.rpartition(".")
    return f"{stem}-{place}.{ending}"


def _write_index(folder: Path, files: Collection[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    size = 0
    for name in sorted(files):
        for tensor, value in load_file(folder / name).items():
            places[tensor] = name
            size += value.nbytes
    write_json_atomic(folder / names.WEIGHTS_INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return {names.WEIGHTS_INDEX: sha256_of(folder / names.WEIGHTS_INDEX)}


def _remove_others(folder: Path, files: Collection[str]) -> None:
    """Remove weights that an attempt on another mesh, killed before the end, has left."""
    for path in [*folder.glob(_part_name("*")), folder / names.WEIGHTS, folder / names.WEIGHTS_INDEX]:
        if path.name not in files:
            path.unlink(missing_ok=True)


def read_weights(folder: Path, again: str) -> dict[str, Tensor]:
    """The weights in `folder`, whole, on the CPU. `again`: what to do about damage. Raises `UserError`."""
    path = folder / names.WEIGHTS
    if path.is_file():
        return _tensors_of(path, again)
    if not (folder / names.WEIGHTS_INDEX).is_file():
        raise UserError(f"{path} is missing; {again}")
    places = read_json(folder / names.WEIGHTS_INDEX, _INDEX, again)["weight_map"]
    files: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {again}")
        files[name] = _tensors_of(folder / name, again)
    whole: dict[str, Tensor] = {}
    blocks: dict[str, list[Tensor]] = {}
    for tensor, name in sorted(places.items()):
        if tensor not in files[name]:
            raise UserError(f"{folder / name} has no tensor {tensor}; {again}")
        if block := _BLOCK.fullmatch(tensor):
            blocks.setdefault(block[1], []).append(files[name][tensor])
        else:
            whole[tensor] = files[name][tensor]
    return whole | {name: torch.cat(parts) for name, parts in blocks.items()}


def _tensors_of(path: Path, again: str) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {again}") from error
