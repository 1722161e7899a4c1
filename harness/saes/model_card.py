"""The card of a repository of SAEs: what they were trained on, how good they are, how to load them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
from harness.record import names
from harness.record.quality import read_quality
from harness.schema import OBJECT, read_json

TAGS = ("saelens", "sparse-autoencoder", "sae", "mechanistic-interpretability")
"""What SAELens and the filters of the hub look for."""


class Entry(NamedTuple):
    """A published run."""

    run: Path
    result: dict[str, Any]
    saelens: bool
    """Whether it is there as SAELens loads it, too."""


def card(entries: Sequence[Entry], address: str, license_id: str) -> str:
    """Markdown with the header that the hub reads."""
    abouts = [read_json(entry.run / names.SAE / names.WEIGHTS_CONFIG, OBJECT, "train it again") for entry in entries]
    models = sorted({str(about["activations"].get("model", about["activations"]["kind"])) for about in abouts})
    head = [
        "---",
        "library_name: saelens",
        f"license: {json.dumps(license_id)}",
        "tags:",
        *(f"- {tag}" for tag in TAGS),
    ]
    if len(models) == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", models[0]):
        head.append(f"base_model: {models[0]}")
    return "\n".join([*head, "---", "", *_body(entries, abouts, address, models)]) + "\n"


def _body(entries: Sequence[Entry], abouts: Sequence[dict[str, Any]], address: str, models: Sequence[str]) -> list[str]:
    rows = [_row(entry) for entry in entries]
    first = entries[0].run.name
    lines = [
        f"# Sparse autoencoders of {', '.join(map(_plain, models))}",
        "",
        f"{len(entries)} SAEs, trained with sae-scaling.",
        "",
        "| SAE | architecture | latents | fvu | KL | L0 | dead | SAELens |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "fvu: share of the variance of held-out rows that is not explained. KL: nats per token between the model and "
        "the model with the reconstruction in place. L0: active latents per token. dead: latents that fell silent.",
        "",
        "## What they were trained on",
        "",
        *dict.fromkeys(_trained_on(about) for about in abouts),
        "",
        "## How to load one",
        "",
        "```python",
        "from harness.saes.trained import load",
        f'sae = load("{address}/{first}")',
    ]
    loadable = [entry.run.name for entry in entries if entry.saelens]
    if loadable:
        repository = address.partition(":")[2]
        lines += ["", "from sae_lens import SAE", f'sae = SAE.from_pretrained("{repository}", "{loadable[0]}")']
    lines += [
        "```",
        "",
        "## Commands",
        "",
        "```",
        *dict.fromkeys(map(_command, (entry.run for entry in entries))),
        "```",
    ]
    return lines


def _row(entry: Entry) -> str:
    result = entry.result
    quality = read_quality(entry.run, "downstream")
    kl = quality["values"]["kl"] if quality is not None and "kl" in quality["values"] else None
    dead = result.get("dead_frac")
    cells = [
        f"`{entry.run.name}`",
        str(result.get("sae", "")),
        str(result.get("n_latents", "")),
        _measured(result.get("fvu"), result.get("fvu_se")),
        _measured(kl["value"], kl["se"]) if kl else "–",
        _measured(result.get("l0"), None),
        "–" if dead is None else f"{100 * dead:.1f} %",
        "yes" if entry.saelens else "no",
    ]
    return f"| {' | '.join(map(_plain, cells))} |"


def _measured(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _trained_on(about: dict[str, Any]) -> str:
    source = about["activations"]
    if source["kind"] != "lm":
        return f"- {source['kind']} activations, {about['tokens']:,} tokens"
    text = source.get("dataset") or source.get("text") or "text of its own"
    return (
        f"- {_plain(str(source.get('model')))}, block {source.get('layer')}, {source.get('hook')}, contexts of "
        f"{source.get('context')} tokens of {_plain(str(text))}; {about['tokens']:,} tokens, repeats included"
    )


def _command(run: Path) -> str:
    try:
        found = read_json(run / names.PROVENANCE, OBJECT, "")
    except (UserError, FileNotFoundError):
        return "(not recorded)"
    return str(found.get("command", "(not recorded)")).replace("\n", " ")


def _plain(text: str) -> str:
    """Text that is no table and no markup in Markdown."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
