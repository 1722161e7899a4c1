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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.activations.lm.contexts import (
    SPLITS,
    Contexts,
    cut_contexts,
    link_contexts,
    open_contexts,
    special_tokens,
)
from harness.activations.lm.location import Location, locate
from harness.activations.lm.model import HookedModel, load_model, load_tokenizer, resolve_precision
from harness.activations.lm.rows import OnRows, RowSettings, row_norms, unit_rows
from harness.activations.shuffle import permute
from harness.activations.source import DTYPES
from harness.activations.store.identity import recipe, recipe_hash, store_id
from harness.budget import HARVEST_COPIES
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import write_json_atomic, write_tensors_atomic
from harness.parallel import Shards, Solo
from harness.process.device import pick_device
from harness.process.signals import StopFlag
from harness.process.together import in_turns
from harness.schema import FLAG, OBJECT, TEXT, fields, list_of, number, read_json, whole

UNIT_TOKENS = 32_768
"""Tokens of a unit: a kill loses at most these."""

MEDIAN_TOKENS = 16_384
"""Tokens of the contexts whose rows give the median norm from which outliers are told."""

PLAN_FILE = "harvest.json"
"""In a half-made store: the `Plan` of its harvest."""
OLD_PLAN_FILE = "plan.json"
"""Its name in earlier versions, whose half-made stores are continued."""


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
    median_norm: float | None = None
    """Median norm of a sample of the training rows, with `activations.outlier_factor`; else None."""
    largest_norm: float | None = None
    """Rows with a larger norm are dropped: `outlier_factor` times the median. None: no row is."""

    def units(self, split: str) -> int:
        return math.ceil(self.contexts[split] / self.contexts_per_unit)

    @property
    def row_settings(self) -> RowSettings:
        return RowSettings(self.d_model, self.dtype, self.lm_batch, self.dropped_ids, self.drop_first)

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


def prepare(
    cfg: ActivationsConfig,
    directory: Path,
    stop: StopFlag,
    others: Sequence[tuple[ActivationsConfig, Path]] = (),
) -> tuple[Plan, HookedModel]:
    """Load the model. On the first attempt also cut the text into contexts, check the disk and write the plan.

    `others`, harvested in the same pass, are configurations that differ from `cfg` in layer and hook, and their
    directories; `read_plan` gives their plans. Raises `UserError` (model, tokenizer, text, full disk), and
    `Interrupted` when `stop` is set.
    """
    location = locate(cfg)
    device = pick_device("auto")
    plan = read_plan(directory)
    if plan is not None and plan.id != store_id(cfg):
        raise UserError(f"{directory} is the unfinished harvest of another store ({plan.id}); delete it to begin anew")
    precision = plan.precision if plan else resolve_precision(cfg, device)
    hooked = load_model(cfg, location, precision, device, [other for other, _ in others])
    wanted = [(cfg, directory), *others]
    missing = [number for number, (_, folder) in enumerate(wanted) if read_plan(folder) is None]
    if missing:
        first = plan or _first_plan(cfg, location, directory, hooked, stop)
        medians = _median_norms(cfg, first, hooked, directory, stop)
        for number in missing:
            each, folder = wanted[number]
            if folder != directory:
                link_contexts(directory, folder)
            settings = recipe(each)
            own = first._replace(
                id=recipe_hash(settings),
                recipe=settings,
                hook=hooked.hooks[number]._asdict(),
                flops_per_token=hooked.flops[number],
                median_norm=medians[number],
                largest_norm=None if (median := medians[number]) is None else each.outlier_factor * median,
            )
            _check_disk(own, folder)
            (folder / "units").mkdir(exist_ok=True)
            write_json_atomic(folder / PLAN_FILE, own._asdict())
    plan = plan or read_plan(directory)
    assert plan is not None
    return plan._replace(hook=hooked.hook._asdict()), hooked


def _first_plan(
    cfg: ActivationsConfig, location: Location, directory: Path, hooked: HookedModel, stop: StopFlag
) -> Plan:
    """Cut the text into contexts in `directory`; the plan for the first hook, as far as no row has to be known."""
    tokenizer = load_tokenizer(location)
    special = special_tokens(tokenizer, cfg.text)
    settings = recipe(cfg)
    cut = cut_contexts(cfg, tokenizer, special, settings["text"].get("commit", ""), directory, stop)
    vocabulary = hooked.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    if cut.largest_id >= vocabulary:
        raise UserError(
            f"the {'ids of the text have' if cfg.text == 'tokens' else f'tokenizer of {cfg.model} gives'} id "
            f"{cut.largest_id}, its model has {vocabulary} embeddings; they do not belong together"
        )
    contexts = {split: open_contexts(directory, split) for split in SPLITS}
    probe = torch.from_numpy(np.array(contexts["train"].ids[: contexts["train"].offsets[1]], np.int64))
    with hooked.computing():
        width = hooked.activations(probe[None].to(hooked.device), None).shape[-1]
    return Plan(
        id=recipe_hash(settings),
        recipe=settings,
        d_model=width,
        precision=hooked.precision,
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
    )


def _median_norms(
    cfg: ActivationsConfig, plan: Plan, hooked: HookedModel, directory: Path, stop: StopFlag
) -> list[float | None]:
    """For every hook the median norm of the rows of training contexts that are spread over the text."""
    if not cfg.outlier_factor:
        return [None] * len(hooked.hooks)
    contexts = open_contexts(directory, "train")
    count = min(contexts.count, max(8, MEDIAN_TOKENS // plan.context))
    spread = np.arange(count) * contexts.count // count
    rows = unit_rows(plan.row_settings, hooked, contexts, spread, stop, lambda rows: None)
    return [float(np.median(row_norms(each))) for each in rows]


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
    plan: Plan,
    hooked: HookedModel,
    directory: Path,
    stop: StopFlag,
    on_rows: OnRows,
    shards: Shards | None = None,
    others: Sequence[tuple[Plan, Path]] = (),
) -> None:
    """Compute the missing units, shared among the ranks of `shards` (default: one process).

    `others` are the plans of the other hooks of `hooked`, in its order, and their directories. Raises `Interrupted`
    between two forwards when `stop` is set; the units written so far stay. If a rank stops or fails, the others learn
    it a unit or two later and return early, so the caller has to join them (`together`).
    """
    contexts = {split: open_contexts(directory, split) for split in SPLITS}
    harvests = [(plan, directory), *others]
    units = [(split, unit) for split in SPLITS for unit in range(plan.units(split))]

    def work(number: int) -> None:
        split, unit = units[number]
        paths = [unit_path(folder, split, unit) for _, folder in harvests]
        # a store that is finished or refused by now has no folder of units
        missing = [path.parent.is_dir() and not path.is_file() for path in paths]
        if any(missing):
            numbers = np.arange(contexts[split].count)[unit * plan.contexts_per_unit :][: plan.contexts_per_unit]
            rows = unit_rows(plan.row_settings, hooked, contexts[split], numbers, stop, on_rows)
            for (each, _), path, values, wanted in zip(harvests, paths, rows, missing, strict=True):
                if wanted:
                    _write_unit(each, contexts[split], split, numbers, values, path)

    in_turns(len(units), work, shards or Solo(), stop)


def _write_unit(
    plan: Plan,
    contexts: Contexts,
    split: str,
    numbers: Int[np.ndarray, " contexts"],
    rows: Float[Tensor, "rows d"],
    path: Path,
) -> None:
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    place = permute(
        np.arange(contexts.rows[first], contexts.rows[last]), contexts.total_rows, "store", plan.seed, split
    )
    order, tensors = np.argsort(place), {}
    if plan.largest_norm is not None:
        large = row_norms(rows)[order] > plan.largest_norm
        tensors["dropped"] = torch.from_numpy(place[order[large]])
        order = order[~large]
    tensors |= {"x": rows.index_select(0, torch.from_numpy(order)), "place": torch.from_numpy(place[order])}
    if split == "heldout":
        document = np.repeat(contexts.document[first:last], np.diff(contexts.rows[first : last + 1]))
        tensors["document"] = torch.from_numpy(document[order])
    # not durable: `assemble` detects a unit that a power cut damaged, and it is computed again
    write_tensors_atomic(path, tensors, durable=False)


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
    if cfg.mixture:
        described["mixture"] = cfg.mixture
    elif cfg.text == "hub":
        described |= {"dataset": cfg.dataset, "split": cfg.split}
    if plan.largest_norm is not None:
        described["outliers"] = {"factor": cfg.outlier_factor, "median_norm": plan.median_norm}
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
