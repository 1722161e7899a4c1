"""Windows: the same rows at every restart, and never more than two of them on the disk."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.activations.lm.contexts import special_tokens
from harness.activations.lm.documents import documents
from harness.activations.lm.location import locate
from harness.activations.lm.model import load_tokenizer
from harness.activations.open import open_source
from harness.activations.source import ActivationSource
from harness.activations.store.identity import store_id
from harness.activations.window import layout
from harness.activations.window.source import Windows
from harness.activations.window.text import TextWindows
from harness.config import ActivationsConfig
from harness.process.signals import StopFlag

ROWS = 700
CPU = torch.device("cpu")


@pytest.fixture
def cfg(tiny: ActivationsConfig) -> ActivationsConfig:
    return dataclasses.replace(tiny, keep="window", window_tokens=ROWS, dtype="bf16")


def opened(cfg: ActivationsConfig, out: Path) -> Windows:
    source = open_source(cfg, out, progress=False, stop=StopFlag())
    assert isinstance(source, Windows)
    return source


def full_store(cfg: ActivationsConfig, out: Path) -> ActivationSource:
    whole = dataclasses.replace(cfg, keep="store", window_tokens=0)
    return open_source(whole, out, progress=False, stop=StopFlag())


def read(source: Windows, batch: int, steps: range, seed: int = 0) -> torch.Tensor:
    with source.stream(seed, batch, CPU) as stream:
        batches = stream.batches(steps.start)
        return torch.cat([next(batches).clone() for _ in steps])


def as_set(rows: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in rows.float().tolist()}


@pytest.mark.slow
def test_a_batch_depends_on_the_step_alone(cfg: ActivationsConfig, tmp_path: Path) -> None:
    source = opened(cfg, tmp_path)
    whole = read(source, 100, range(30))
    assert source.train_rows == 4 * ROWS
    windows = tmp_path / "_activations" / f"{store_id(cfg)}.windows"
    assert [path.name for path in windows.iterdir()] == [layout.TEXT]
    assert torch.equal(read(source, 100, range(16, 20)), whole[1600:2000])  # from the places that are known
    (windows / layout.TEXT).unlink()
    assert torch.equal(read(source, 300, range(5, 7)), whole[1500:2100])  # and without them
    assert not torch.equal(read(source, 100, range(2), seed=1), whole[:200])
    assert as_set(read(source, 700, range(1), seed=1)) == as_set(whole[:ROWS])


@pytest.mark.slow
def test_windows_are_parts_of_the_text_and_come_again(cfg: ActivationsConfig, tmp_path: Path) -> None:
    """Four windows are all rows that the text is asked for; then the first comes again in another order."""
    rows = read(opened(cfg, tmp_path), ROWS, range(5)).split(ROWS)
    sets = [as_set(window) for window in rows]
    assert sets[4] == sets[0] and not torch.equal(rows[4], rows[0])
    assert all(len(sets[a] & sets[b]) < 0.02 * ROWS for a in range(4) for b in range(a))
    store = open_source(
        dataclasses.replace(cfg, keep="store", window_tokens=0), tmp_path, progress=False, stop=StopFlag()
    )
    stored = as_set(store.stream(0, 3000, CPU).batch(0))
    assert len(sets[0] & stored) > 0.98 * len(sets[0])  # a window ends within a context


def test_statistics_and_heldout_rows_come_from_the_first_rows(cfg: ActivationsConfig, tmp_path: Path) -> None:
    source = opened(cfg, tmp_path)
    assert source.statistics(False).count == ROWS == len(source.sample())
    full = open_source(
        dataclasses.replace(cfg, keep="store", window_tokens=0), tmp_path, progress=False, stop=StopFlag()
    )
    ours, theirs = (torch.cat([x for x, _ in each.heldout(64)]) for each in (source, full))
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_text_that_ends_is_read_again(cfg: ActivationsConfig, tmp_path: Path) -> None:
    long = dataclasses.replace(cfg, tokens=1e6)
    source = opened(long, tmp_path)
    rows = read(source, ROWS, range(18)).split(ROWS)
    assert source.train_rows is not None and source.train_rows < 18 * ROWS
    again = source.train_rows // ROWS
    assert as_set(rows[again]) == as_set(rows[0])
    assert torch.equal(read(source, ROWS, range(again, again + 1)), rows[again])


@pytest.mark.slow
def test_replicas_share_the_windows(cfg: ActivationsConfig, tmp_path: Path) -> None:
    source = opened(cfg, tmp_path)
    whole = read(source, 100, range(3))
    parts = []
    for rank in range(2):
        with source.stream(0, 100, CPU, rank, 2) as stream:
            parts.append(torch.stack([stream.batch(step).clone() for step in range(3)]))
    assert torch.equal(torch.cat(parts, dim=1).reshape(whole.shape), whole)


def test_a_reader_that_leaves_waits_for_no_window(cfg: ActivationsConfig, tmp_path: Path) -> None:
    """The thread that reads ahead waits for a window that is computed only once the one before is trained on."""

    def first_batch() -> torch.Tensor:
        with opened(cfg, tmp_path).stream(0, ROWS, CPU) as stream:
            for batch in stream.batches(0):
                return batch
        raise AssertionError("a stream does not end by itself")

    assert first_batch().shape == (ROWS, 16)


@pytest.mark.slow
def test_outliers_leave_windows_equally_long(cfg: ActivationsConfig, tmp_path: Path) -> None:
    plain = opened(cfg, tmp_path)
    cut = opened(dataclasses.replace(cfg, outlier_factor=1.0), tmp_path)
    outliers = cut.description["outliers"]
    for step in range(2):
        rows, all_rows = (read(source, ROWS, range(step, step + 1)) for source in (cut, plain))
        small = all_rows[all_rows.double().norm(dim=1) <= 1.0 * outliers["median_norm"]]
        assert len(rows) == ROWS > len(small) and as_set(rows) == as_set(small)


def test_the_text_goes_on_where_a_window_ended(cfg: ActivationsConfig, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(locate(cfg))
    special = special_tokens(tokenizer)

    def cutter(start: tuple[int, int]) -> TextWindows:
        return TextWindows(cfg, tokenizer, special, "", 1 / 8, start)

    through, starts, ids = cutter((0, 0)), [], []
    while True:
        starts.append(through.place)
        if not through.cut(tmp_path):
            break
        ids.append((tmp_path / "train.ids").read_bytes())
    assert len(ids) > 5 and len(set(ids)) == len(ids)
    for start, expected in zip(starts, ids, strict=False):
        again = cutter(start)
        assert again.cut(tmp_path) and (tmp_path / "train.ids").read_bytes() == expected
    train = [d for d in documents(cfg, "") if int.from_bytes(d.digest[:8], "big") >= 2**61]
    pieces = sum(-(-len(document.text.split()) // 14) for document in train)
    assert sum(len(part) for part in ids) <= 4 * 16 * pieces


def test_positions_of_a_window_are_a_permutation() -> None:
    rows = layout.shuffled_rows(0, 1000, 1000, 3, 7)
    assert np.array_equal(np.sort(rows), np.arange(1000))
    pieces = [layout.shuffled_rows(a, a + 250, 1000, 3, 7) for a in range(0, 1000, 250)]
    assert np.array_equal(np.concatenate(pieces), rows)
    assert not np.array_equal(rows, layout.shuffled_rows(0, 1000, 1000, 3, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "window"}, "needs keep=window and window_tokens=ROWS"),
        ({"window_tokens": 100}, "needs keep=window and window_tokens=ROWS"),
        ({"keep": "window", "window_tokens": 100, "kind": "synthetic"}, "needs activations.kind=lm"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationsConfig(model="m", **settings)  # pyright: ignore
