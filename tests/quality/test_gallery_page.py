"""From a language model to a page in a browser: a planted latent shows exactly what was planted."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from analysis.gallery.write import write_gallery
from harness.quality import examples
from harness.quality.metric import Subject
from harness.quality.shared import Shared
from harness.record.quality import write_quality
from tests.browser import dump, needs_browser
from tests.quality.planted import planted_words

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(embedding_shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared, run = embedding_shared, tmp_path_factory.mktemp("sweep") / "planted"
    sae = planted_words(shared)
    subject = Subject("planted", run, "0", shared.cfg, shared.out, 1, lambda: sae)
    [(_, outcome)] = examples.run([subject], shared)
    about = {"metric": "examples", "version": 1, "settings": {"tokens": 512, "store": "s"}, "weights": "0"}
    about["tokens"] = outcome.tokens
    write_quality(run, about, outcome.values, outcome.per_latent, {}, outcome.curves, outcome.tables)
    return write_gallery([run], run.parent / "gallery")[0]


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def section(markup: str, title: str) -> str:
    match = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", markup, re.S)
    assert match, title
    return match[1]


def test_the_page_of_a_planted_latent(page: Path, embedding_shared: Shared, tmp_path: Path) -> None:
    text = embedding_shared.text
    here = (text.ids == embedding_shared.tokenizer.convert_tokens_to_ids("w7")) & text.kept
    count, judged = int(here.sum()), int(text.kept.sum())
    markup, _ = dump(f"{page.as_uri()}#planted/0", tmp_path / "profile")
    assert "<h1>Latent 0</h1>" in markup
    assert f"<dd>{count} of {judged} tokens</dd>" in markup
    assert f"<dt>density</dt><dd>{float(f'{100 * count / judged:.3g}'):g} %</dd>" in markup
    assert f"Histogram of {count} activations" in markup
    strongest = section(markup, "Strongest contexts")
    documents = len(set(text.document[here.any(dim=1)].tolist()))
    assert strongest.count("<li>") == min(20, documents)
    for part in (strongest, section(markup, "Samples of its activations")):
        hot = re.findall(r'<(?:strong|span) class="heat"[^>]*><bdi>(.*?)</bdi>', part)
        assert hot and {word.strip() for word in hot} == {"w7"}
    silent = section(markup, "Where it is silent")
    assert 'class="heat"' not in silent and "<li>" in silent and "w7 " not in text_of(silent) + " "
    together = section(markup, "Active together")
    assert re.search(r'href="#planted/2">2</a>.*?<td class="number">1</td><td>100 %</td>', together, re.S)
    first = re.search(r"<tbody><tr><td>(.*?)</td>", section(markup, "What it writes"), re.S)
    assert first and text_of(first[1]).strip("␣ ") == "w7"  # the head is the embedding
    assert 'href="#planted/2">2</a>' in section(markup, "Nearest decoder rows")


def test_a_silent_latent_says_so(page: Path, tmp_path: Path) -> None:
    markup, _ = dump(f"{page.as_uri()}#planted/3", tmp_path / "profile")
    assert "It was never active on this text." in markup and "Strongest contexts" not in markup
    listed, _ = dump(f"{page.as_uri()}#planted", tmp_path / "profile")
    assert "1–3 of 3 latents" in listed  # the silent one is shown when it is asked for
    wrong, _ = dump(f"{page.as_uri()}#planted/9", tmp_path / "profile")
    assert "planted has latents 0 to 3, and no 9" in wrong
