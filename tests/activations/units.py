"""Half-made stores without a language model: a plan, contexts of one token, and units of small whole numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from harness.activations.shuffle import permute
from harness.activations.store.harvest import Plan, unit_path
from harness.activations.store.identity import recipe_hash

UNIT_ROWS = 32
"""The fewest contexts that a unit can have."""


def half_made(directory: Path, train: int, heldout: int, d_model: int = 4) -> Plan:
    """All units of a store of so many rows, and the plan. A row is a function of its number in the text."""
    (directory / "units").mkdir(parents=True)
    recipe = {"rows": [train, heldout], "d_model": d_model}
    rows = {"train": train, "heldout": heldout}
    plan = Plan(
        id=recipe_hash(recipe),
        recipe=recipe,
        d_model=d_model,
        precision="fp32",
        lm_batch=8,
        context=2**20,
        dtype="fp16",
        seed=0,
        drop_first=False,
        dropped_ids=[],
        prefix_tokens=0,
        suffix_tokens=0,
        rows=rows,
        contexts=rows,
        text={},
        model_class="None",
        flops_per_token=1.0,
    )
    assert plan.contexts_per_unit == UNIT_ROWS
    for split, total in rows.items():
        numbers = np.arange(total)
        np.arange(total, dtype=np.int32).tofile(directory / f"{split}.ids")
        for name in ("offsets", "rows"):
            np.arange(total + 1).tofile(directory / f"{split}.{name}")
        (numbers // 7).tofile(directory / f"{split}.document")
        places = permute(numbers, total, "store", plan.seed, split)
        for unit in range(plan.units(split)):
            own = numbers[unit * UNIT_ROWS : (unit + 1) * UNIT_ROWS]
            order = np.argsort(places[own])
            own = own[order]
            x = (own[:, None] * 7 + np.arange(d_model) ** 2 * 5) % 23 - 11
            tensors = {"x": torch.from_numpy(x).half(), "place": torch.from_numpy(places[own])}
            if split == "heldout":
                tensors["document"] = torch.from_numpy(own // 7)
            save_file(tensors, unit_path(directory, split, unit))
    (directory / "harvest.json").write_text(json.dumps(plan._asdict()))
    return plan
