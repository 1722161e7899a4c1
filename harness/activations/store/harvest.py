"""Run the language model over the contexts and write the rows to unit files.

The work is cut into units of fixed contexts. The rows of a unit depend only on the unit, and the place of a row in the
store is a computed permutation of its number. So the store depends neither on how many workers made it nor on how often
they were killed. A harvest has three steps, each safe to repeat: `prepare` (text to contexts, and the plan),
`forward_units` (contexts to unit files) and `assemble` (unit files to shuffled shards, in `store.assemble`).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from harness.activations.lm.contexts import (
    SPLITS,
    Contexts,
    cut_contexts,
    kept_positions,
    open_contexts,
    special_tokens,
)
from harness.activations.lm.location import locate
from harness.activations.lm.model import HookedModel, load_model, load_tokenizer, resolve_precision
from harness.activations.shuffle import permute
from harness.activations.source import DTYPES
from harness.activations.store.identity import recipe, recipe_hash, store_id
from harness.budget import HARVEST_COPIES
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import write_json_atomic, write_tensors_atomic
from harness.parallel import Shards, Solo
from harness.process.device import pick_device
from harness.process.signals import STOP, Interrupted, StopFlag
from harness.schema import FLAG, OBJECT, TEXT, fields, list_of, number, read_json, whole

UNIT_TOKENS = 32_768
"""Tokens of a unit: a kill loses at most these."""

PLAN_FILE = "harvest.json"
"""In a half-made store: the `Plan` of its harvest."""
OLD_PLAN_FILE = "plan.json"
"""Its name in earlier versions, whose half-made stores are continued."""

OnRows = Callable[[int], None]
"""Called with the number of rows after each forward."""


class Plan(NamedTuple):
    """What is fixed before the first forward, so that a resumed harvest gives the same store."""

    id: str
    recipe: dict[str, Any]
    d_model: int
    precision: str
    lm_batch: int
    context: int
    dtype: str
    seed: int
    drop_first: bool
    dropped_ids: list[int]
    prefix_tokens: int
    suffix_tokens: int
    rows: dict[str, int]
    contexts: dict[str, int]
    text: dict[str, Any]
    model_class: str
    flops_per_token: float
    hook: dict[str, Any] | None = None
    """The hooked module, see `lm.hook.Hook`; None in plans of earlier versions."""

    def units(self, split: str) -> int:
        return math.ceil(self.contexts[split] / self.contexts_per_unit)

    @property
    def contexts_per_unit(self) -> int:
        return max(32, UNIT_TOKENS // self.context)


_SPLITS = fields({split: whole(1) for split in SPLITS})
_PLAN = fields(
    {
        **dict.fromkeys(("id", "precision", "dtype", "model_class"), TEXT),
        **{name: whole(1) for name in ("d_model", "lm_batch", "context")},
        **{name: whole() for name in ("seed", "prefix_tokens", "suffix_tokens")},
        "recipe": OBJECT,
        "drop_first": FLAG,
        "dropped_ids": list_of(whole()),
        "rows": _SPLITS,
        "contexts": _SPLITS,
        "text": OBJECT,
        "flops_per_token": number(0),
    }
)


def read_plan(directory: Path) -> Plan | None:
    """The plan of an unfinished harvest; None if none was written. Raises `UserError` when it is damaged."""
    for name in (PLAN_FILE, OLD_PLAN_FILE):
        path = directory / name
        if path.is_file():
            return Plan(**read_json(path, _PLAN, f"delete {directory} to harvest it again"))
    return None


def prepare(cfg: ActivationsConfig, directory: Path, stop: StopFlag) -> tuple[Plan, HookedModel]:
    """Load the model. On the first attempt also cut the text into contexts, check the disk and write the plan.

    Raises `UserError` (model, tokenizer, text, full disk), and `Interrupted` when `stop` is set.
    """
    location = locate(cfg)
    device = pick_device("auto")
    plan = read_plan(directory)
    if plan is not None and plan.id != store_id(cfg):
        raise UserError(f"{directory} is the unfinished harvest of another store ({plan.id}); delete it to begin anew")
    precision = plan.precision if plan else resolve_precision(cfg, device)
    hooked = load_model(cfg, location, precision, device)
    if plan:
        return plan._replace(hook=hooked.hook._asdict()), hooked
    tokenizer = load_tokenizer(location)
    special = special_tokens(tokenizer)
    settings = recipe(cfg)
    cut = cut_contexts(cfg, tokenizer, special, settings["text"].get("commit", ""), directory, stop)
    vocabulary = hooked.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    if cut.largest_id >= vocabulary:
        raise UserError(
            f"the tokenizer of {cfg.model} gives id {cut.largest_id}, its model has {vocabulary} embeddings; "
            f"model and tokenizer do not belong together"
        )
    contexts = {split: open_contexts(directory, split) for split in SPLITS}
    probe = torch.from_numpy(np.array(contexts["train"].ids[: contexts["train"].offsets[1]], np.int64))
    with hooked.computing():
        width = hooked.activations(probe[None].to(device), None).shape[-1]
    plan = Plan(
        id=recipe_hash(settings),
        recipe=settings,
        d_model=width,
        precision=precision,
        lm_batch=cfg.lm_batch,
        context=cfg.context,
        dtype=cfg.dtype,
        seed=cfg.seed,
        drop_first=cfg.drop_first_position,
        dropped_ids=special.dropped,
        prefix_tokens=len(special.prefix),
        suffix_tokens=len(special.suffix),
        rows={split: contexts[split].total_rows for split in SPLITS},
        contexts={split: contexts[split].count for split in SPLITS},
        text={name: value for name, value in cut._asdict().items() if name != "largest_id"},
        model_class=hooked.name,
        flops_per_token=hooked.flops[0],
        hook=hooked.hook._asdict(),
    )
    _check_disk(plan, directory)
    (directory / "units").mkdir(exist_ok=True)
    write_json_atomic(directory / PLAN_FILE, plan._asdict())
    return plan, hooked


def _check_disk(plan: Plan, directory: Path) -> None:
    """Raise `UserError` unless the disk has room for the units and the shards."""
    rows = sum(plan.rows.values())
    needed = round(HARVEST_COPIES * rows * plan.d_model * DTYPES[plan.dtype].itemsize) + 16 * rows + 2**20
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"harvesting needs {needed / 1e6:,.0f} MB in {directory.parent} and {free / 1e6:,.0f} MB are free; "
            f"set activations.dir to a larger disk or lower activations.tokens"
        )


def unit_path(directory: Path, split: str, unit: int) -> Path:
    """Where a unit is written, once it is complete."""
    return directory / "units" / f"{split}-{unit:06d}.safetensors"


def forward_units(
    plan: Plan, hooked: HookedModel, directory: Path, stop: StopFlag, on_rows: OnRows, shards: Shards | None = None
) -> None:
    """Compute the missing units, shared among the ranks of `shards` (default: one process).

    Raises `Interrupted` between two forwards when `stop` is set; the units written so far stay. If a rank stops or
    fails, the others learn it a unit or two later and return early, so the caller has to join them (`together`).
    """
    shards = shards or Solo()
    contexts = {split: open_contexts(directory, split) for split in SPLITS}
    problem: Exception | None = None
    # the same number of rounds on every rank, whichever units exist
    rounds = [(split, first) for split in SPLITS for first in range(0, plan.units(split), shards.size)]
    for split, first in rounds:
        if shards.agree(STOP * (stop.requested or problem is not None)) & STOP:
            break
        unit = first + shards.rank
        path = unit_path(directory, split, unit)
        if problem is not None or unit >= plan.units(split) or path.is_file():
            continue
        try:
            _write_unit(plan, hooked, contexts[split], split, unit, path, stop, on_rows)
        except Exception as raised:
            problem = raised
    if problem is not None:
        raise problem
    if stop.requested:
        raise Interrupted


def _write_unit(
    plan: Plan,
    hooked: HookedModel,
    contexts: Contexts,
    split: str,
    unit: int,
    path: Path,
    stop: StopFlag,
    on_rows: OnRows,
) -> None:
    first = unit * plan.contexts_per_unit
    last = min(first + plan.contexts_per_unit, contexts.count)
    rows = _unit_rows(plan, hooked, contexts, first, last, stop, on_rows)
    numbers = np.arange(contexts.rows[first], contexts.rows[last])
    place = permute(numbers, contexts.total_rows, "store", plan.seed, split)
    order = np.argsort(place)
    tensors = {"x": rows.index_select(0, torch.from_numpy(order)), "place": torch.from_numpy(place[order])}
    if split == "heldout":
        document = np.repeat(contexts.document[first:last], np.diff(contexts.rows[first : last + 1]))
        tensors["document"] = torch.from_numpy(document[order])
    # not durable: `assemble` detects a unit that a power cut damaged, and it is computed again
    write_tensors_atomic(path, tensors, durable=False)


def _unit_rows(
    plan: Plan,
    hooked: HookedModel,
    contexts: Contexts,
    first: int,
    last: int,
    stop: StopFlag,
    on_rows: OnRows,
) -> Float[Tensor, "rows d"]:
    """Rows of the contexts `first` … `last`−1 in order, in the storage dtype, on the CPU."""
    base = int(contexts.rows[first])
    rows = torch.empty(int(contexts.rows[last]) - base, plan.d_model, dtype=DTYPES[plan.dtype])
    with hooked.computing():
        for batch in _length_batches(contexts, first, last, plan.lm_batch):
            if stop.requested:
                raise Interrupted
            lengths = (contexts.offsets[batch + 1] - contexts.offsets[batch]).tolist()
            tokens = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            kept = torch.zeros_like(tokens, dtype=torch.bool)
            for line, (context, length) in enumerate(zip(batch, lengths, strict=True)):
                ids = np.array(contexts.ids[contexts.offsets[context] : contexts.offsets[context + 1]])
                positions = np.flatnonzero(kept_positions(ids, plan.dropped_ids, plan.drop_first))
                tokens[line, :length] = torch.from_numpy(ids)
                mask[line, :length] = 1
                kept[line, positions[: contexts.rows[context + 1] - contexts.rows[context]]] = True
            padded = min(lengths) < max(lengths)
            value = hooked.activations(tokens.to(hooked.device), mask.to(hooked.device) if padded else None)
            computed = value[kept.to(value.device)].to(rows.dtype).cpu()
            if not torch.isfinite(computed).all():
                raise UserError(
                    f"the model gives values that {plan.dtype} cannot hold (not finite); set activations.dtype=bf16 "
                    f"or fp32, or activations.lm_precision=fp32"
                )
            spans = zip(contexts.rows[batch].tolist(), contexts.rows[batch + 1].tolist(), strict=True)
            into = np.concatenate([np.arange(begin, end) for begin, end in spans]) - base
            rows.index_copy_(0, torch.from_numpy(into), computed)
            on_rows(len(computed))
    return rows


def _length_batches(contexts: Contexts, first: int, last: int, size: int) -> Iterator[np.ndarray]:
    """Numbers of the contexts `first` … `last`−1 in batches of similar length, so that there is little padding."""
    lengths = contexts.offsets[first + 1 : last + 1] - contexts.offsets[first:last]
    order = first + np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def rows_done(plan: Plan, directory: Path) -> int:
    """Rows in the unit files that exist."""
    done = 0
    for split in SPLITS:
        contexts = open_contexts(directory, split)
        for unit in range(plan.units(split)):
            if unit_path(directory, split, unit).is_file():
                first = unit * plan.contexts_per_unit
                last = min(first + plan.contexts_per_unit, contexts.count)
                done += int(contexts.rows[last] - contexts.rows[first])
    return done


def describe(cfg: ActivationsConfig, plan: Plan) -> dict[str, Any]:
    """The `description` of the rows for trackers and exports; the manifest keeps it."""
    settings = dataclasses.asdict(cfg)
    names = ("kind", "model", "hook", "layer", "context", "text", "dtype", "seed", "drop_first_position")
    described = {name: settings[name] for name in names}
    if cfg.text == "hub":
        described |= {"dataset": cfg.dataset, "split": cfg.split}
    return {
        **described,
        "model_class": plan.model_class,
        **(plan.hook or {}),
        "precision": plan.precision,
        "lm_batch": plan.lm_batch,
        "prefix_tokens": plan.prefix_tokens,
        "suffix_tokens": plan.suffix_tokens,
        "dropped_ids": plan.dropped_ids,
        "heldout_share": plan.text["heldout_share"],
        "documents": plan.text["documents"],
        "text_exhausted": plan.text["text_exhausted"],
    }
