"""The explorer in headless Chromium: a journey through it, with a keyboard, in the dark, and nobody else is called."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.csv
import pytest
from browser import asked_in, chromium
from every_panel import ACTIONS, HOSTILE, PAGES
from explored import publish
from republished import Roots
from small_run import small_run

from functok.explorer import app as explorer_app
from functok.explorer import drawing
from functok.explorer.app import LEFT
from functok.explorer.server import Served
from functok.explorer.tables import Stopped
from infra.storage import Storage

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = [pytest.mark.chromium]

SLOW = "SELECT count(*) FROM range(100000000) a, range(1000) b WHERE a.range * b.range % 7 = 1"


@dataclass
class Seen:
    """What pages asked for, and what went wrong on them."""

    asked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage, run = Storage(str(tmp_path_factory.mktemp("root"))), small_run()
    for table in ("tokens", "token_degree", "coverage"):
        run.tables[table].loc[lambda rows: rows.token_id == 3, "token"] = HOSTILE
    publish(storage, run)
    return storage


@pytest.fixture(scope="module")
def served(storage: Storage) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        pages, actions = [*explorer_app.all_pages(), *PAGES], [*explorer_app.all_actions(), *ACTIONS]
        patch.setattr(explorer_app, "all_pages", lambda: pages)
        patch.setattr(explorer_app, "all_actions", lambda: actions)
        with Served(storage, port=0) as served:
            yield served


def opened(context: BrowserContext, served: Served) -> tuple[Page, Seen]:
    """The explorer's first page, by the address that is printed, and what is seen of it and of those after it."""
    seen = Seen()
    page = context.new_page()
    context.on("request", lambda request: seen.asked.append(request.url))
    page.on("pageerror", lambda error: seen.wrong.append(f"{page.url}: {error}"))
    page.on("dialog", lambda dialog: seen.wrong.append(f"{page.url}: {dialog.message}"))
    page.on(
        "console",
        lambda line: seen.wrong.append(f"{page.url}: {line.text}") if line.type == "error" else None,
    )
    page.goto(served.address)
    return page, seen


def click(page: Page, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).first.click()
    page.wait_for_load_state()


def test_a_journey(served: Served, tmp_path: Path) -> None:
    net_log = tmp_path / "net-log.json"
    with chromium(f"--log-net-log={net_log}") as browser:
        context = browser.new_context(viewport={"width": 1300, "height": 900}, accept_downloads=True)
        page, seen = opened(context, served)
        here = f"http://127.0.0.1:{served.port}"
        assert page.url == f"{here}/"
        # Overview: a chart is drawn, and a slider asks for another number of tokens.
        page.locator(".chart svg").first.wait_for()
        slider = page.locator("input[type=range]").first
        slider.focus()
        slider.press("Home")
        page.wait_for_url(re.compile(r"[?&]rank=0\b"))
        # Search, by its key.
        page.keyboard.press("/")
        page.keyboard.type("t1")
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("/search"))
        # The ranking: sorted by a heading, filtered, downloaded.
        click(page, "Tokens")
        page.locator("table.grid thead a").filter(has_text=re.compile("^count")).first.click()
        page.wait_for_url(re.compile("sort="))
        with page.expect_download() as download:
            click(page, "CSV")
        rows = pyarrow.csv.read_csv(download.value.path())
        assert rows.num_rows == page.locator("table.grid tbody tr").count()
        # A token, by the keyboard alone.
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        assert page.evaluate("document.activeElement.closest('tr').rowIndex") == 1
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(r"/token/\d+"))
        token = page.url
        page.keyboard.press("ArrowRight")
        page.wait_for_url(lambda url: "/token/" in url and url != token)
        page.keyboard.press("ArrowLeft")
        page.wait_for_url(lambda url: url.split("?")[0] == token.split("?")[0])
        # A feature, a context, its SQL, and back.
        page.locator("a[href^='/feature/']").first.click()
        page.wait_for_url(re.compile(r"/feature/\d+/\d+"))
        feature = page.url
        page.locator("a[href^='/text/']").first.click()
        page.wait_for_url(re.compile("/text/"))
        click(page, "Show SQL")
        page.locator("#result tbody tr").first.wait_for()
        page.locator("#sql").fill("SELECT layer, count(*) AS n FROM activations GROUP BY layer")
        page.locator("#sql").press("Control+Enter")
        page.locator("#result tbody tr").nth(1).wait_for()
        page.reload()
        assert page.locator("#history button").count() >= 1
        for _ in range(4):
            if page.url != feature:
                page.go_back()
        page.goto(feature)
        # A label is kept, and shown as text.
        label = page.locator("form[method=post] input[name=label]")
        label.fill(HOSTILE)
        page.get_by_role("button", name="Keep").click()
        page.wait_for_load_state()
        assert (
            page.locator("form[method=post] input[name=label]").input_value().startswith("<script>alert(1)")
        )
        # Dark, and still dark on the next page.
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator("#theme").click()
        page.goto(f"{here}/every")
        page.locator(".chart svg").wait_for()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert page.locator(".chart text").first.get_attribute("fill") == page.evaluate(
            "getComputedStyle(document.body).color"
        )
        with page.expect_download() as download:
            click(page, "Save page")
        kept = Path(download.value.path()).read_text()
        context.close()
        assert not seen.wrong, "\n".join(seen.wrong)
        # What was kept needs nobody.
        offline = browser.new_context(offline=True)
        alone = offline.new_page()
        asked: list[str] = []
        offline.on("request", lambda request: asked.append(request.url))
        alone.set_content(kept)
        assert alone.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert all(url.startswith("data:") for url in asked)
    assert {url.split("/")[2] for url in seen.asked if url.startswith("http")} == {f"127.0.0.1:{served.port}"}
    assert asked_in(net_log) <= {f"127.0.0.1:{served.port}"}


@pytest.mark.slow
def test_cancel_ends_the_query_and_keeps_what_was_typed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    told: list[str] = []

    def watched(*asked: Any, run: Any = drawing.drawn, **how: Any) -> Any:
        begun.set()
        try:
            return run(*asked, **how)
        except Stopped as error:
            told.append(error.message)
            raise
        finally:
            ended.set()

    with chromium() as browser:
        page, seen = opened(browser.new_context(), served)
        page.goto(f"http://127.0.0.1:{served.port}/sql?seconds=60")
        monkeypatch.setattr(drawing, "drawn", watched)
        page.locator("#sql").fill(SLOW)
        # Neither Playwright nor the browser's protocol reaches a page that waits for the next one: it clicks itself.
        page.evaluate(
            """() => document.querySelector("#console").addEventListener("submit", () => {
                const cancel = document.querySelector("#cancel");
                setTimeout(() => { if (cancel.checkVisibility()) cancel.click(); }, 3000);
            }, {once: true})"""
        )
        page.get_by_role("button", name="Run").click(no_wait_after=True)
        assert begun.wait(20)
        assert not ended.wait(1)
        assert ended.wait(15)
        assert told == [LEFT]
        # The page is as it was, and asks the next query.
        assert page.locator("#sql").input_value() == SLOW
        assert page.locator("#cancel").is_hidden()
        page.locator("#sql").fill("SELECT 41 + 1 AS answer")
        page.locator("#sql").press("Control+Enter")
        page.locator("#result tbody tr").wait_for()
        assert page.locator("#result tbody td").inner_text() == "42"
        assert not seen.wrong, "\n".join(seen.wrong)


def test_windows_share_one_history(served: Served) -> None:
    with chromium() as browser:
        first, seen = opened(browser.new_context(), served)
        second = first.context.new_page()
        for page in (first, second):
            page.goto(f"http://127.0.0.1:{served.port}/sql")
        for page, sql in ((first, "SELECT 1 AS a"), (second, "SELECT 2 AS b")):
            page.locator("#sql").fill(sql)
            page.locator("#sql").press("Control+Enter")
            page.locator("#result tbody tr").wait_for()
        assert second.locator("#history button").all_text_contents() == ["SELECT 2 AS b", "SELECT 1 AS a"]
        assert not seen.wrong, "\n".join(seen.wrong)


def test_it_works_without_a_script_and_on_a_narrow_window(served: Served) -> None:
    with chromium() as browser:
        context = browser.new_context(java_script_enabled=False, viewport={"width": 380, "height": 800})
        page, seen = opened(context, served)
        page.goto(f"http://127.0.0.1:{served.port}/every")
        assert page.locator("noscript img, figure img").first.evaluate("image => image.naturalWidth") > 100
        page.locator("table.grid thead a").filter(has_text="count").click()
        assert "tokens.sort=-count" in page.url
        page.locator("input[name='tokens.token']").fill("t1")
        page.locator("input[name='tokens.token']").press("Enter")
        page.wait_for_url(re.compile(r"tokens\.token=t1"))
        assert "tokens.sort=-count" in page.url
        # Nothing but what scrolls by itself is wider than the window.
        assert page.locator("main").bounding_box()["width"] <= 380
        assert not [text for text in seen.wrong if "Content Security" in text]


def test_new_tables_are_told(tmp_path: Path) -> None:
    roots = Roots(Storage(str(tmp_path)))
    with chromium() as browser, Served(roots.storage, port=0) as served:
        page, _ = opened(browser.new_context(), served)
        assert page.locator("#news").is_hidden()
        roots.publish_next()
        page.locator("#news").wait_for(timeout=15_000)
        before = page.locator("body").get_attribute("data-generation")
        page.locator("#news a").click()
        page.wait_for_load_state()
        assert page.locator("body").get_attribute("data-generation") != before
