"""The report in a real headless browser, wide and as narrow as a phone: laid out, nothing cut, nothing fetched."""

import base64
import json
import re
import subprocess

import pytest

from analysis.report.page import write_report
from tests.analysis.generate import write_sweep
from tests.browser import BROWSER, needs_browser

pytestmark = needs_browser

MEASURE = """<script>
addEventListener("load", () => {
  const seen = {width: innerWidth, page: document.documentElement.scrollWidth, broken: [], outside: [], fetched: []};
  for (const img of document.images) if (!img.complete || !img.naturalWidth) seen.broken.push(img.alt);
  for (const box of document.querySelectorAll("h1, h2, h3, p, img, figcaption, .scroll")) {
    const at = box.getBoundingClientRect();
    if (at.left < -0.5 || at.right > innerWidth + 0.5 || at.width < 1) seen.outside.push(box.outerHTML.slice(0, 60));
  }
  const shown = [...document.querySelectorAll("h1, h2, h3, figure, .scroll, .lead")].filter(b => b.checkVisibility());
  const flow = shown.map(b => b.getBoundingClientRect());
  seen.overlaps = 0;
  for (let i = 0; i < flow.length; i++) for (let j = i + 1; j < flow.length; j++)
    if (flow[i].left < flow[j].right - 1 && flow[j].left < flow[i].right - 1 &&
        flow[i].top < flow[j].bottom - 1 && flow[j].top < flow[i].bottom - 1) seen.overlaps++;
  for (const entry of performance.getEntriesByType("resource"))
    if (!entry.name.startsWith("data:")) seen.fetched.push(entry.name);
  seen.images = document.images.length;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""

FRAME = """<!doctype html><body><script>
const packed = text => btoa(unescape(encodeURIComponent(text)));
addEventListener("message", event => document.body.setAttribute("data-seen", packed(event.data)));
</script><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe></body>"""
"""A window cannot be narrower than 500 px, a frame can."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_sweep(tmp_path_factory.mktemp("sweeps") / "quick"))


@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(page, width, tmp_path):
    (tmp_path / "page.html").write_text(
        page.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>"), encoding="utf-8"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    command += ["--window-size=1400,1000", "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert match, done.stderr[-600:]
    seen = json.loads(base64.b64decode(match.group(1)))
    assert seen["width"] == width and seen["page"] <= width
    assert seen["images"] >= 8 and not seen["broken"]
    assert not seen["outside"] and not seen["overlaps"] and not seen["fetched"]
