"""A real headless browser without a network: a page is opened from the file system and its DOM is read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs a browser: apt-get install chromium")


def dump(address: str, profile: Path, budget_ms: int = 4000) -> tuple[str, str]:
    """The DOM of a page after `budget_ms` of its own time, and what the browser logged."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--hide-scrollbars"]
    command += [
        "--enable-logging=stderr",
        "--window-size=1400,1000",
        f"--virtual-time-budget={budget_ms}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, done.stderr
