"""Labelled texts of the package `sae-probes`, and what the model computes on them.

The package is installed apart (`make setup-probes`) and read where it lies: its texts have licences of their own and
are copied nowhere, only activations are kept. Its classes were balanced by drawing rows again, so the same text may
stand in training and test: texts are made unique, those with two labels are dropped, and halves are of different texts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.errors import UserError
from harness.quality.shared import Shared

VERSION = 1
"""Raised when the same settings would give other rows."""
SETS = (
    *("5_hist_fig_ismale", "6_hist_fig_isamerican", "7_hist_fig_ispolitician", "21_headline_istrump"),
    *("22_headline_isobama", "23_headline_ischina", "24_headline_isiran", "26_headline_isfrontpage", "36_sciq_tf"),
    *("41_truthqa_tf", "42_temp_sense", "44_phys_tf", "47_reasoning_tf", "48_cm_correct", "49_cm_isshort"),
    *("50_deon_isvalid", "51_just_is", "52_virtue_is", "54_cs_tf", "56_wikidatasex_or_gender", "57_wikidatais_alive"),
    *("58_wikidatapolitical_party", "59_wikidata_occupation_isjournalist", "60_wikidata_occupation_isathlete"),
    *("61_wikidata_occupation_isactor", "62_wikidata_occupation_ispolitician", "65_high-school", "70_prime-factors"),
    *("76_trial-court", "78_north-america", "87_glue_cola", "89_glue_mrpc", "90_glue_qnli", "91_glue_qqp"),
    *("92_glue_sst2", "94_ai_gen", "95_toxic_is", "96_spam_is", "100_news_fake", "105_click_bait", "106_hate_hate"),
    *("107_hate_offensive", "110_aimade_humangpt3", "113_movie_sent", "119_us_state_TX", "125_world_country_Italy"),
    *("126_art_type_book", "133_context_type_Causality", "136_glue_mnli_entailment", "139_news_class_Politics"),
    *("146_disease_class_cardiovascular diseases", "148_twt_emotion_worry", "151_it_tick_HR Support"),
    *(
        "154_athlete_sport_football",
        "157_amazon_5star",
        "158_code_C",
        "159_code_Python",
        "161_agnews_0",
        "163_agnews_2",
    ),
)
"""Binary sets: one of each question, without those that repeat another or leave fewer than 200 texts of a class."""
POOLED = (
    *("59_wikidata_occupation_isjournalist", "61_wikidata_occupation_isactor", "62_wikidata_occupation_ispolitician"),
    *("157_amazon_5star", "158_code_C", "159_code_Python", "161_agnews_0", "163_agnews_2"),
)
"""Those like the sets of SAEBench (professions, reviews, languages of code, news): all their tokens are kept."""
MOST_TEXTS = 1000
"""Per set."""
POOLED_TEXTS = 256
"""Texts of a pooled set whose tokens are kept."""
_BATCH = 4096
"""Tokens of a forward, padding included."""


class SetRows(NamedTuple):
    """What the model computes on the texts of a set."""

    last: Float[Tensor, "texts d"]
    """The value at the last token."""
    label: Bool[Tensor, " texts"]
    train: Bool[Tensor, " texts"]
    tokens: Float[Tensor, "tokens d"] | None
    """Of pooled sets: the values at all tokens of the first texts …"""
    owner: Int[Tensor, " tokens"] | None
    """… and the text of each."""


def installed() -> str | None:
    """The version of sae-probes; None if it is not there."""
    try:
        return importlib.metadata.version("sae-probes")
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder() -> Path:
    spec = importlib.util.find_spec("sae_probes")
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise UserError("sae-probes is installed but cannot be found; install it again with make setup-probes")
    return Path(places[0]) / "data" / "cleaned_data"


def read_set(path: Path, most: int) -> tuple[list[str], list[bool], list[bool]]:
    """Texts, labels, and whether each is of the training half: at most `most`, as many of either class.

    Each text is there once; texts with two labels are left out. Which are taken, and for which half, is decided by a
    hash of the text. Raises `UserError` if the file is not what sae-probes 0.4.2 has.
    """
    import pyarrow
    import pyarrow.csv

    try:
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=["prompt", "target"],
                column_types={"prompt": pyarrow.string(), "target": pyarrow.string()},
            ),
        )
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); install sae-probes again with make setup-probes") from None
    targets: dict[str, set[str]] = {}
    for text, target in zip(table["prompt"].to_pylist(), table["target"].to_pylist(), strict=True):
        targets.setdefault((text or "").strip(), set()).add(target)
    values = sorted(set().union(*targets.values()))
    if len(values) != 2:
        raise UserError(f"{path} has {len(values)} classes, not two; install sae-probes again with make setup-probes")
    ordered = sorted(targets, key=lambda text: hashlib.sha256(text.encode()).digest())
    of_class = [[text for text in ordered if targets[text] == {value}] for value in values]
    each = min(most // 2, *map(len, of_class))
    found = [
        (text, label == 1, number % 2 == 0) for label in (0, 1) for number, text in enumerate(of_class[label][:each])
    ]
    # classes alternate, so that the first texts of a set have both
    found = [entry for pair in zip(found[:each], found[each:], strict=True) for entry in pair]
    texts, labels, train = (list(column) for column in zip(*found, strict=True))
    return texts, labels, train


def set_rows(shared: Shared) -> dict[str, SetRows]:
    """Set → its rows, computed once per model and hook. Nothing if sae-probes is not installed."""
    version = installed()
    if version is None:
        shared.progress.note("sae-probes is not installed: probes of token labels only (make setup-probes adds texts)")
        return {}
    most = min(MOST_TEXTS, max(64, shared.tokens // 16))
    key = shared.model_key({"sae-probes": version, "texts": most, "sets": SETS, "quality": VERSION})
    tensors = shared.cached(f"sets-{key}", lambda: _make(shared, most))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        parts.setdefault(name, {})[field] = value
    return {name: SetRows(**{"tokens": None, "owner": None, **parts[name]}) for name in SETS if name in parts}  # pyright: ignore


def _make(shared: Shared, most: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    folder = _folder()
    shared.progress.start("labelled texts", len(SETS))
    for number, name in enumerate(SETS):
        texts, labels, train = read_set(folder / f"{name}.csv.zst", most)
        rows, owner, last = _values(shared, texts)
        kept = owner[last]
        found |= {
            f"{name}/last": rows[last].clone(),
            f"{name}/label": torch.tensor(labels)[kept],
            f"{name}/train": torch.tensor(train)[kept],
        }
        if name in POOLED:
            pooled = torch.isin(owner, kept[:POOLED_TEXTS])
            found |= {
                f"{name}/tokens": rows[pooled].bfloat16(),
                f"{name}/owner": torch.searchsorted(kept, owner[pooled]),
            }
        shared.tick(number + 1)
    shared.progress.finish("")
    return found


def _values(
    shared: Shared, texts: list[str]
) -> tuple[Float[Tensor, "tokens d"], Int[Tensor, " tokens"], Int[Tensor, " kept"]]:
    """Values at the tokens of all texts, the text of each, and where the last tokens of texts are.

    Texts are cut to a context. Position 0, special tokens and massive rows do not count; a text whose last token is
    one of them has no last token.
    """
    prefix, room = shared.special.prefix, shared.cfg.context - len(shared.special.prefix)
    encoded = shared.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [[*prefix, *each[:room]] for each in encoded]
    order = sorted(range(len(ids)), key=lambda text: -len(ids[text]))
    found: list[Tensor] = [torch.empty(0, len(shared.reference.mean)) for _ in ids]
    complete = torch.zeros(len(ids), dtype=torch.bool)
    while order:
        longest = max(1, len(ids[order[0]]))
        size = max(1, _BATCH // longest)
        batch, order = order[:size], order[size:]
        # causal: what stands behind the last token changes nothing
        padded = torch.tensor([[*ids[text], *[0] * (longest - len(ids[text]))] for text in batch])
        hidden = shared.model.hidden(padded.to(shared.device)).cpu()
        kept = shared.reference.ordinary(hidden.norm(dim=-1))
        kept &= ~torch.isin(padded, torch.tensor(shared.special.dropped))
        kept[:, 0] = False
        for row, text in enumerate(batch):
            own, length = kept[row].clone(), len(ids[text])
            own[length:] = False
            found[text] = hidden[row][own]
            complete[text] = length > 0 and bool(own[length - 1])
    counts = torch.tensor([len(rows) for rows in found])
    owner = torch.arange(len(ids)).repeat_interleave(counts)
    last = (counts.cumsum(dim=0) - 1)[complete]
    return torch.cat(found), owner, last
