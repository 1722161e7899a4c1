"""The pages in a real headless browser, from the file system and without a network."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
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


MEASURE = """
"use strict";
const seen = {fetched: [], outside: []};
const keys = [];
function report() {
  seen.width = innerWidth;
  seen.page = document.documentElement.scrollWidth;
  seen.shown = location.hash;
  seen.title = document.querySelector("h1").textContent;
  seen.outside = [];
  for (const box of document.querySelectorAll("h1, h2, h3, p, form, label, li, .scroll, .facts, .chart, nav")) {
    const at = box.getBoundingClientRect();
    if (at.left < -0.5 || at.right > innerWidth + 0.5) seen.outside.push(box.outerHTML.slice(0, 80));
  }
  seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("file:"));
  keys.push({...seen});
}
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const settled = () => new Promise(done => setTimeout(done, 700));
addEventListener("load", async () => {
  await settled(); report();
  for (const key of ["j", "k", "u", "/", "u"]) {
    press(key);
    await settled();
    report();
    if (key === "/") { keys.at(-1).focus = document.activeElement.id; document.activeElement.blur(); }
  }
  parent.postMessage(JSON.stringify(keys), "*");
});
"""

FRAME = """<!doctype html><meta charset="utf-8"><body><script>
addEventListener("message", event => document.body.setAttribute("data-seen",
  btoa(String.fromCharCode(...new TextEncoder().encode(event.data)))));
</script><iframe src="measured.html#{where}" style="width: {width}px; height: 900px; border: 0"></iframe></body>"""
"""A window cannot be narrower than 500 px, a frame can."""


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = tmp_path_factory.mktemp("sweep")
    words = [f" word{number}" for number in range(200)] + ["\n", "a" * 60]
    for number in range(3):
        write_examples(sweep / f"switch-n{number}", 400, words, experts=4, seed=number)
    return write_gallery([sweep])[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_keys_work(gallery: Path, width: int, tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    shutil.copytree(gallery.parent, folder)
    page = (folder / "index.html").read_text(encoding="utf-8")
    page = page.replace("</head>", '<script defer src="measure.js"></script></head>')
    (folder / "measured.html").write_text(page, encoding="utf-8")
    (folder / "measure.js").write_text(MEASURE, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("{width}", str(width)).replace("{where}", "switch-n1/7"), encoding="utf-8")
    dom, log = dump(frame.as_uri(), tmp_path / "profile", 9000)
    match = re.search(r'data-seen="([^"]*)"', dom)
    assert match, log[-600:]
    pages = json.loads(base64.b64decode(match[1]))
    assert [each["shown"] for each in pages] == [
        *("#switch-n1/7", "#switch-n1/8", "#switch-n1/7", "#switch-n1", "#switch-n1"),
        "",
    ]
    assert pages[4]["focus"] == "search"
    for each in pages:
        assert each["width"] == width and each["page"] <= width, each
        assert not each["outside"] and not each["fetched"], each


def test_experts_and_features_across_the_sweep(gallery: Path, tmp_path: Path) -> None:
    experts, _ = dump(f"{gallery.as_uri()}#switch-n0/experts", tmp_path / "profile")
    assert experts.count('href="#switch-n0/experts/') == 4 and "Load and tokens of each expert" in experts
    own, _ = dump(f"{gallery.as_uri()}#switch-n0/experts/2", tmp_path / "profile")
    assert "1–100 of 100 latents" in own and '<option value="2" selected="">expert 2</option>' in own
    latent, _ = dump(f"{gallery.as_uri()}#switch-n0/3", tmp_path / "profile")
    assert 'href="#switch-n1/' in latent and 'href="#switch-n2/' in latent
