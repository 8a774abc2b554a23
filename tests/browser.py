"""Headless Chromium, driven by Playwright."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # Only addresses lead somewhere: what asks for a host is seen, and nobody is called.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def executable() -> str:
    """The first Chromium on the path.

    A machine without one fails, so that CI cannot quietly stop looking at the pages.
    """
    if os.environ.get("FUNCTOK_SKIP_CHROMIUM") == "1":
        pytest.skip("FUNCTOK_SKIP_CHROMIUM=1")
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.fail(
        f"none of {', '.join(NAMES)} is installed: `apt-get install chromium`, or set FUNCTOK_SKIP_CHROMIUM=1"
    )


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """A browser. While it is open this thread has a running event loop, so that no flow can run in it."""
    from playwright.sync_api import sync_playwright

    found = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[*ARGUMENTS, *arguments])
        try:
            yield browser
        finally:
            browser.close()


def asked_in(net_log: Path) -> set[str]:
    """The hosts and ports that pages have asked, by the network log; the browser's own errands have no origin."""
    log = json.loads(net_log.read_text())
    names = {number: name for name, number in log["constants"]["logEventTypes"].items()}
    started = [event for event in log["events"] if names[event["type"]] == "URL_REQUEST_START_JOB"]
    told = [event["params"] for event in started if "url" in event.get("params", {})]
    urls = [entry["url"] for entry in told if entry.get("initiator", "not an origin") != "not an origin"]
    assert urls
    return {re.sub(r"^\w+://([^/?#]*).*", r"\1", url) for url in urls if re.match("https?|wss?", url)}
