"""The report in a headless browser: it renders, its images decode, hostile tokens do nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report_catalogue
from report_reading import read

from infra.storage import Storage
from tasks import figures
from tasks.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str:
    """The first Chromium on the path.

    A machine without one fails, so that CI cannot quietly stop looking at the page.
    """
    if os.environ.get("FUNCTOK_SKIP_CHROMIUM") == "1":
        pytest.skip("FUNCTOK_SKIP_CHROMIUM=1")
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    pytest.fail(
        f"none of {', '.join(BROWSERS)} is installed: `apt-get install chromium`, or set FUNCTOK_SKIP_CHROMIUM=1"
    )


def chromium(page: Path, profile: Path, *options: str) -> str:
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.chromium
def test_report_opens_in_chromium(tmp_path: Path) -> None:
    storage = report_catalogue.publish(Storage(str(tmp_path / "root"))).storage
    write_report(storage)
    html = read(storage)
    # The probe counts what decoded and how much text was laid out. The policy that forbids scripts is taken
    # out for it, so that hostile tokens have nothing but their escaping between them and execution.
    probe = (
        "<script>addEventListener('load', () => {"
        "const d = document, all = [...d.images];"
        "d.body.dataset.images = all.filter(i => i.complete && i.naturalWidth > 0).length;"
        "d.body.dataset.wide = d.documentElement.scrollWidth <= innerWidth;"
        "d.body.dataset.requests = performance.getEntriesByType('resource')"
        ".filter(e => !e.name.startsWith('data:')).length;"
        "d.body.dataset.shown = d.title;"
        "})</script>"
    )
    page = tmp_path / "probe.html"
    without_policy = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", html)
    page.write_text(without_policy.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom = chromium(page, tmp_path / "profile-1", "--window-size=1200,900", "--dump-dom")
    found = dict(re.findall(r"data-(images|wide|requests|shown)=\"([^\"]*)\"", dom))
    assert found == {"images": "6", "wide": "true", "requests": "0", "shown": "functok report"}

    original, shot = tmp_path / "report.html", tmp_path / "report.png"
    original.write_text(html, encoding="utf-8")
    chromium(original, tmp_path / "profile-2", "--window-size=1200,2400", f"--screenshot={shot}")
    from matplotlib.image import imread

    pixels = imread(shot)
    assert pixels.shape[:2] == (2400, 1200)
    for colour in (figures.FUNCTION, figures.CONTENT):
        wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        drawn = np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.03
        assert drawn.sum() > 200, f"the figures' colour {colour} is not on the page"
