"""What people look at: statistics, examples, neighbours and effects of every latent, for `python -m analysis gallery`.

One pass of the language model over held-out text gives the activations of all SAEs; they go to the disk and are read
back by blocks of latents, so that all figures are exact and memory does not grow with the text (beyond 24 bytes a
token, and 8 for each SAE). The values at the hook are not kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.activations.lm.location import locate
from harness.activations.lm.model import HookedModel, load_model
from harness.activations.store.identity import recipe
from harness.errors import UserError
from harness.quality.downstream import groups
from harness.quality.features import coactive, latents
from harness.quality.features.codes import CodeFiles
from harness.quality.features.lens import TOKENS, Lens, ablation
from harness.quality.features.token_text import token_texts
from harness.quality.metric import Outcome, Subject
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from harness.quality.text import Contexts, heldout_contexts
from harness.record import names
from harness.record.quality import Value
from harness.saes.trained import TrainedSae

VERSION = 1
NEIGHBOURS = 10
"""Decoder rows of the same SAE that lie nearest."""
ABLATED = 64
"""Random live latents whose strongest activation is ablated."""
_TOKENS = 2048
"""Of one forward."""
_ROWS = 256
"""Latents of a block."""
_ENTRY_BYTES = 24
"""On the disk, of an activation."""


def _text(shared: Shared) -> Contexts:
    about = {**shared.source.description, **recipe(shared.cfg)["text"]}
    return heldout_contexts(shared.cfg, shared.tokenizer, shared.special, about, shared.tokens, shared.stop)


def _model(shared: Shared) -> HookedModel:
    """The causal model, or without a head where there is none (then there is no logit lens)."""
    if shared.is_causal:
        return shared.model.hooked
    return load_model(shared.cfg, locate(shared.cfg), shared.precision, shared.device)


class _Spilled:
    """The activations of all SAEs on the text."""

    def __init__(self, saes: Sequence[TrainedSae], shared: Shared, folder: Path) -> None:
        ids, document = _text(shared)
        self.files = [CodeFiles(folder / str(number), sae.sae.n_latents) for number, sae in enumerate(saes)]
        model, dropped = _model(shared), torch.tensor(shared.special.dropped)
        size = max(1, _TOKENS // ids.shape[1])
        flat = []
        shared.progress.start("activations of the latents", ids.numel())
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            with model.computing():
                hidden = model.activations(part.to(shared.device), None).float()
            kept = ~torch.isin(part, dropped) & shared.reference.ordinary(hidden.norm(dim=-1).cpu())
            kept[:, 0] = False
            rows = hidden[kept.to(hidden.device)]
            for sae, files in zip(saes, self.files, strict=True) if len(rows) else ():
                codes = sae.encode(rows)
                files.add(effective(codes).cpu().numpy(), codes.index.cpu().numpy())
            flat.append(kept.flatten().nonzero().flatten() + start * ids.shape[1])
            shared.tick((start + len(part)) * ids.shape[1])
        for files in self.files:
            files.finish()
        flat = torch.cat(flat).numpy()
        if not len(flat):
            raise UserError("no token of the text is judged: all are special, massive or the first of their context")
        self.places = latents.Place(flat, document.numpy(), ids.numpy().astype(np.int32))


def nearest_rows(unit: Tensor, first: int, last: int) -> dict[str, np.ndarray]:
    """The `NEIGHBOURS` other rows with the largest cosine; −1 where there are fewer."""
    cosines = unit[first:last] @ unit.T
    cosines[torch.arange(last - first), torch.arange(first, last)] = -torch.inf
    found = cosines.topk(min(NEIGHBOURS, len(unit)), dim=1)
    index, cosine = (np.zeros((last - first, NEIGHBOURS), kind) for kind in (np.int32, np.float32))
    index[:] = -1
    width = found.values.shape[1]
    known = (~torch.isinf(found.values)).cpu().numpy()
    index[:, :width] = np.where(known, found.indices.cpu().numpy(), -1)
    cosine[:, :width] = np.where(known, found.values.cpu().numpy(), 0)
    return {"nearest": index, "nearest_cosine": cosine}


def _lens_columns(lens: Lens, rows: Tensor) -> dict[str, np.ndarray]:
    logits = lens(rows)
    columns = {}
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        found = (sign * logits).topk(min(TOKENS, logits.shape[1]), dim=1)
        columns[name] = found.indices.cpu().numpy().astype(np.int32)
        columns[f"{name}_logit"] = (sign * found.values).cpu().numpy()
    return columns


def describe(sae: TrainedSae, files: CodeFiles, places: latents.Place, lens: Lens | None, tick: Any) -> dict[str, Any]:
    """Column → a number or a row of numbers per latent."""
    n = sae.sae.n_latents
    unit = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    parts: list[dict[str, np.ndarray]] = []
    spans = [(first, min(first + _ROWS, n)) for first in range(0, n, _ROWS)]
    for first, last in spans:
        columns = latents.block_columns(files.of_latents(first, last), first, last, places)
        columns |= nearest_rows(unit, first, last)
        if lens is not None:
            # rows of the decoder in the model's own units: a step of one unit along each
            columns |= _lens_columns(lens, unit[first:last])
        parts.append(columns)
        tick(last / 2)
    result = _joined(parts)
    together = []
    for first, last in spans:
        entries = files.of_latents(first, last)
        together.append(coactive.block_columns(files, entries, first, last, result["mean"], result["mean_square"]))
        tick((n + last) / 2)
    result |= _joined(together)
    result["expert"] = (np.arange(n) // sae.sae.latents_per_expert).astype(np.int32)
    result["training_frequency"] = sae.frequency.cpu().numpy()
    result["decoder"] = unit.cpu().numpy().astype(np.float16)
    return result


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _ablations(
    sae: TrainedSae, shared: Shared, columns: dict[str, Any], places: latents.Place, done: int
) -> list[dict[str, Any]]:
    live = np.flatnonzero(columns["count"])
    chosen = np.sort(np.random.default_rng(0).permutation(live)[:ABLATED])
    lines = []
    for latent in chosen.tolist():
        context, position = divmod(int(columns["example_place"][latent, 0]), places.ids.shape[1])
        # causal: what stands behind the token changes nothing
        ids = torch.tensor(places.ids[context, : position + 1][None], dtype=torch.int64, device=shared.device)
        hidden = shared.model.hidden(ids)
        codes = sae.encode(hidden[0, -1:])
        value = float((effective(codes) * (codes.index == latent)).sum())
        scale = sae.normalizer.scale if codes.units is None else float(codes.units.norm)
        effect = ablation(shared.model, ids, hidden, sae.W_dec[latent].cpu() * value * scale)
        lines.append({"latent": latent, "context": context, "position": position, **effect})
        shared.tick(done)
    return lines


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    shared.require_model()
    lens = Lens(shared.model) if shared.is_causal else None
    for group in groups(subjects):
        saes = [subject.load() for subject in group]
        with _room(saes, shared) as folder:
            spilled = _Spilled(saes, shared, folder)
            shared.progress.start("examples", sum(sae.sae.n_latents for sae in saes))
            done = 0
            for subject, sae, files in zip(group, saes, spilled.files, strict=True):
                yield subject, _outcome(sae, shared, files, spilled.places, lens, done)
                done += sae.sae.n_latents


@contextmanager
def _room(saes: Sequence[TrainedSae], shared: Shared) -> Iterator[Path]:
    """A folder for the activations, removed afterwards. Raises `UserError` if the disk is too small."""
    beside = shared.out / names.SHARED
    beside.mkdir(parents=True, exist_ok=True)
    active = sum(sae.sae.k or sae.config.target_l0 or sae.sae.n_latents / 8 for sae in saes)
    needed, free = _ENTRY_BYTES * active * shared.tokens, shutil.disk_usage(beside).free
    if needed > free:
        raise UserError(
            f"examples need {needed / 1e9:.1f} GB in {beside} and {free / 1e9:.1f} GB are free; lower --tokens or "
            "evaluate fewer runs at a time"
        )
    with tempfile.TemporaryDirectory(dir=beside, prefix=".examples-") as folder:
        yield Path(folder)


def _outcome(
    sae: TrainedSae, shared: Shared, files: CodeFiles, places: latents.Place, lens: Lens | None, done: int
) -> Outcome:
    """Of one SAE; `done` latents of other SAEs come before in the progress."""
    columns = describe(sae, files, places, lens, lambda latent: shared.tick(done + latent))
    ablated = _ablations(sae, shared, columns, places, done + sae.sae.n_latents) if lens is not None else []
    return Outcome(
        len(places.flat),
        _values(columns),
        columns,
        curves={"ablation": ablated},
        tables=_text_tables(shared, columns, ablated, places),
    )


def _values(columns: dict[str, Any]) -> dict[str, Value]:
    live = columns["count"] > 0
    density = columns["density"][live]
    return {
        "live": Value(float(live.mean())),
        "density_median": Value(float(np.median(density)) if len(density) else float("nan")),
        "dense": Value(float((columns["density"] > 0.1).mean())),
    }


def _text_tables(
    shared: Shared, columns: dict[str, Any], ablated: Sequence[dict[str, Any]], places: latents.Place
) -> dict[str, dict[str, Any]]:
    """The contexts that examples come from, and the text of every token that is shown."""
    length = places.ids.shape[1]
    shown = columns["example_place"]
    used = np.unique(shown[shown >= 0] // length)
    ids = [places.ids[used].reshape(-1), columns["top_tokens"].reshape(-1)]
    ids += [columns[name].reshape(-1) for name in ("promoted", "suppressed") if name in columns]
    ids.append(np.array([change["token"] for line in ablated for change in line["tokens"]], np.int32))
    tokens = np.unique(np.concatenate(ids))
    tokens = tokens[tokens >= 0]
    return {
        "contexts": {"context": used, "document": places.document[used], "ids": places.ids[used]},
        "tokens": {"token": tokens, "text": token_texts(shared.tokenizer, tokens.tolist())},
    }
