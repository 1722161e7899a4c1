"""The pages in a real headless browser, from the file system and without a network."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from analysis.gallery.write import write_gallery
from tests.browser import dump, needs_browser
from tests.gallery.made_up import write_examples

pytestmark = needs_browser

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'><b>bold</b>",
    "</script><script>alert(1)</script>",
    "javascript:alert(1)",
    "\u202egnp.exe",
    "\x00\x1b[31m\x07",
    "&lt;i&gt;&#0;",
    "\u2028\u2029\ufeff",
    "{{7*7}}${7*7}`",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]
NAME = "topk-<script>document.title='owned'<!--&quot;'"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = tmp_path_factory.mktemp("sweep")
    write_examples(sweep / NAME.replace("/", ""), 20, HOSTILE)
    (sweep / "study.yaml").write_text('title: "<script>document.title=`owned`</script> \u202eevil"\n', encoding="utf-8")
    return write_gallery([sweep])[0]


def test_nothing_of_others_executes(hostile: Path, tmp_path: Path) -> None:
    from urllib.parse import quote

    for where in ("", f"#{quote(NAME, safe='')}", f"#{quote(NAME, safe='')}/0"):
        page, log = dump(hostile.as_uri() + where, tmp_path / "profile")
        title = re.search(r"<title>(.*?)</title>", page, re.S)
        assert title and title[1] != "owned" and title[1] != "Gallery", log[-600:]
        body = page[page.index("<body") :]
        assert "<script" not in body and "<img" not in body and "<b>" not in body
        assert "\u202e" not in page and "\x1b" not in page and "\u2028" not in page
        assert "Content Security Policy" not in log, log[-600:]
        assert 'role="alert"' not in body
    text = html.unescape(re.sub(r"<[^>]+>", "", body))
    for shown in ("<script>document.title='owned'</script>", "⟨U+202E⟩gnp.exe", "⟨U+0000⟩", "&lt;i&gt;&#0;", "😀"):
        assert shown in text, shown


def test_the_policy_forbids_what_is_not_ours(hostile: Path, tmp_path: Path) -> None:
    """The second wall: a script in the page itself, were there one, would not run."""
    content = hostile.read_text(encoding="utf-8")
    broken = hostile.with_name("broken.html")
    inline = "<script>document.documentElement.dataset.ran = 1</script><img src=x onerror='document.body.id=1'>"
    broken.write_text(content.replace("</body>", inline + "</body>"), encoding="utf-8")
    page, log = dump(broken.as_uri(), tmp_path / "profile")
    assert "data-ran" not in page.replace(inline, "") and 'id="1"' not in page
    assert "Content Security Policy" in log
    broken.unlink()
