"""A real browser, and what it makes of a page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"there is no browser: none of {', '.join(NAMES)} is on the PATH")


def seen(page: Path, script: str, width: int, folder: Path) -> Any:
    """The value of a JavaScript expression on a page of this width.

    The page is shown in a frame, as a window is no narrower than 500.
    """
    measure = f"<script>onload = () => parent.document.documentElement.dataset.seen = JSON.stringify({script})</script>"
    inner = html.escape(page.read_text(encoding="utf-8").replace("</body>", f"{measure}</body>"))
    outer = folder / f"seen-{width}.html"
    outer.write_text(
        '<!doctype html><meta charset="utf-8">'
        f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{inner}"></iframe>',
        encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
         "--window-size=1400,2100", "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, timeout=120)
    match = re.search(r'<html data-seen="([^"]*)"', done.stdout)
    assert match, done.stderr
    return json.loads(html.unescape(match[1]))
