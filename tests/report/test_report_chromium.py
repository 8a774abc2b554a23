"""The report in a headless browser: it renders, its images decode, hostile tokens do nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import report_catalogue
from browser import chromium
from PIL import Image

from infra.storage import Storage
from tasks.report import charts
from tasks.report.report import write_report


@pytest.mark.chromium
def test_report_opens_in_chromium(tmp_path: Path) -> None:
    storage = report_catalogue.publish(Storage(str(tmp_path / "root"))).storage
    address = Path(write_report(storage)).as_uri()
    requests: list[str] = []
    with chromium() as browser:
        # The policy that forbids scripts is switched off, so that hostile tokens have nothing but their escaping
        # between them and execution.
        page = browser.new_page(viewport={"width": 1200, "height": 900}, bypass_csp=True)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        assert page.title() == "functok report"
        decoded = "[...document.images].filter(image => image.complete && image.naturalWidth > 0).length"
        assert page.evaluate(decoded) == 6
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [url for url in requests if not url.startswith("data:")] == [address]

        page = browser.new_page(viewport={"width": 1200, "height": 2400})
        page.goto(address)
        shot = tmp_path / "report.png"
        page.screenshot(path=shot)
    pixels = np.asarray(Image.open(shot).convert("RGB")) / 255
    assert pixels.shape[:2] == (2400, 1200)
    for colour in (charts.FUNCTION, charts.CONTENT):
        wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        drawn = np.abs(pixels - wanted).max(axis=-1) < 0.03
        assert drawn.sum() > 200, f"the figures' colour {colour} is not on the page"
