"""From the tables of an SAE to the columns of its pages: the list of its latents, and shards of 128."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from analysis.gallery.pack import shares, smallest
from analysis.gallery.subjects import Subject
from analysis.gallery.texts import Text

SHARD = 128
"""Latents of a file: what is read to show one."""


def list_columns(table: dict[str, Any], text: Text) -> dict[str, np.ndarray]:
    """What the list of latents shows, sorts and filters by."""
    return {
        "density": table["density"].astype(np.float32),
        "largest": table["largest"].astype(np.float32),
        "nearest": table["nearest_cosine"][:, 0].astype(np.float16),
        "expert": smallest(table["expert"]),
        "words": smallest(text.tokens(table["top_tokens"])),
    }


def shards(table: dict[str, Any], text: Text) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Number and columns of each file. Latents of other tables are shifted by 1, so that 0 stands for none."""
    largest = table["largest"][:, None]
    context, position = np.divmod(table["example_place"], text.length)
    columns: dict[str, np.ndarray] = {
        "count": table["count"].astype(np.uint32),
        "mean": table["mean"].astype(np.float32),
        "mean_square": table["mean_square"].astype(np.float32),
        "skewness": table["skewness"].astype(np.float32),
        "kurtosis": table["kurtosis"].astype(np.float32),
        "quantiles": shares(table["quantiles"], largest),
        "histogram": smallest(table["histogram"]),
        "example_context": smallest(text.contexts(np.where(table["example_place"] < 0, -1, context))),
        "example_position": smallest(np.where(table["example_place"] < 0, 0, position)),
        "example_value": shares(table["example_value"], largest),
        "example_acts": table["example_acts"],
        "nearest": smallest(table["nearest"] + 1),
        "nearest_cosine": table["nearest_cosine"].astype(np.float16),
        "coactive": smallest(table["coactive"] + 1),
        "coactive_correlation": table["coactive_correlation"].astype(np.float16),
        "coactive_share": table["coactive_share"].astype(np.float16),
        "across": smallest(table["across"] + 1),
        "across_cosine": table["across_cosine"].astype(np.float16),
    }
    for name in ("promoted", "suppressed"):
        if name in table:
            columns[name] = smallest(text.tokens(table[name]))
            columns[f"{name}_logit"] = table[f"{name}_logit"].astype(np.float16)
    for number, start in enumerate(range(0, len(largest), SHARD)):
        yield number, {name: column[start : start + SHARD] for name, column in columns.items()}


def notes_of_latents(subject: Subject) -> dict[int, dict[str, Any]]:
    """What other metrics say about single latents: explanation, scores, and labels that a latent knows best."""
    notes: dict[int, dict[str, Any]] = {}

    def note(latent: int, **what: Any) -> None:
        notes.setdefault(int(latent), {}).update(what)

    for line in subject.lines("explanations"):
        note(line["latent"], patterns=line["patterns"], precision=line["precision"], recall=line["recall"])
    for line in subject.lines("detection"):
        if "latent" in line:
            scores = {name: line.get(f"{name}_auc") for name in ("detection", "fuzzing")}
            note(line["latent"], explanation=line["explanation"], **scores)
    for line in subject.lines("probes", "labels"):
        if "latent" in line:
            known = notes.setdefault(int(line["latent"]), {}).setdefault("labels", [])
            known.append(f"{line['label']} ({line['loss']:.3f} nats)")
    return notes


def ablations(subject: Subject, text: Text) -> dict[int, dict[str, Any]]:
    """Latent → the effect of its ablation, with numbers of `text`."""
    found = {}
    for line in subject.lines("examples", "ablation"):
        tokens = [{**change, "token": int(text.tokens(np.array(change["token"])))} for change in line.get("tokens", ())]
        found[int(line["latent"])] = {"kl": line["kl"], "tokens": tokens}
    return found
