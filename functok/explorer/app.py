"""The explorer as an ASGI app: pages by their addresses, downloads, charts, kept pages.

Pages are made in threads, each with a connection of its own; a reader who leaves, or who has waited for too long, has
the query ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from functok.explorer import drawing
from functok.explorer.drawing import Frame
from functok.explorer.grids import Address
from functok.explorer.tables import Reader, Stopped, Tables
from infra.storage import Storage
from schemas.errors import FunctokError
from tasks.explore.vocabulary import Asked, Missing, NotThere, Page, PageAt, Refused

AT_ONCE = 8
"""Readers that are answered at once; others wait."""

PAGE_SECONDS = 30.0
"""How long a page may take."""

OURS = frozenset({"save", "download", "format", "chart"})
"""Values of an address that say how a page is given, not what is on it."""


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """What is shown.

    Attributes:
        tables: The published tables.
        pages: In the order of the menu.
        context: What pages know beside the tables (`Asked.context`).
        page_seconds: How long a page may take.
    """

    tables: Tables
    pages: Sequence[PageAt]
    context: dict[str, Any]
    page_seconds: float = PAGE_SECONDS


def all_pages() -> list[PageAt]:
    """The pages of the spine and of every experiment, published or not: those then say what to add."""
    from functok.explorer.experiments import INDEX
    from schemas.experiments import EXPERIMENTS
    from tasks.explore.pages import PAGES
    from tasks.stages import experiment

    return [*PAGES, INDEX, *(page for name in EXPERIMENTS for page in experiment(name).pages)]


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega Embed, as vl-convert has them; they are put together once, in a second."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle(None)
    return bundle


def build_app(
    storage: Storage, pages: Sequence[PageAt] | None = None, *, page_seconds: float = PAGE_SECONDS
) -> FastAPI:
    """The explorer of a root.

    Args:
        storage: The root.
        pages: The pages; all that there are if not given.
        page_seconds: How long a page may take.

    Raises:
        ConfigError: if nothing is published.
    """
    shown = all_pages() if pages is None else pages
    context: dict[str, Any] = {"storage": storage}
    explorer = Explorer(tables=Tables(storage), pages=shown, context=context, page_seconds=page_seconds)
    app = FastAPI(openapi_url=None)
    pool = ThreadPoolExecutor(AT_ONCE, "explorer")
    for page in shown:
        app.add_api_route(page.path, _endpoint(explorer, page, pool), response_class=Response)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
        if name == "vega.js":
            content: str | bytes = vega()
        else:
            path = drawing.STATIC / name
            if path not in drawing.STATIC.iterdir():
                return Response(status_code=404)
            content = path.read_bytes()
        return Response(content, media_type=kinds[name.rpartition(".")[2]])

    return app


def _endpoint(explorer: Explorer, page: PageAt, pool: ThreadPoolExecutor) -> Callable[..., Any]:
    async def endpoint(request: Request) -> Response:
        def answer(reader: Reader) -> Response:
            return _answer(explorer, page, request, reader)

        return await _answered(explorer, request, pool, answer)

    return endpoint


async def _answered(
    explorer: Explorer, request: Request, pool: ThreadPoolExecutor, answer: Callable[[Reader], Response]
) -> Response:
    """What a thread with a reader answers; it is ended when time is up or nobody waits for it any more."""
    readers: list[Reader] = []

    def work() -> Response:
        with explorer.tables.reader() as reader:
            readers.append(reader)
            return answer(reader)

    loop = asyncio.get_running_loop()
    working = loop.run_in_executor(pool, work)
    until = loop.time() + explorer.page_seconds
    why = ""
    while not (await asyncio.wait([working], timeout=0.1))[0]:
        if not why and await request.is_disconnected():
            why = "the reader has left"
        if not why and loop.time() > until:
            why = f"this took longer than {explorer.page_seconds:g} s"
        if why and readers:
            readers[0].stop(why)
    try:
        return working.result()
    except FunctokError as error:
        frame = _frame(explorer, request, explorer.tables.current().name)
        return _said(frame, request, error)


def _answer(explorer: Explorer, page: PageAt, request: Request, reader: Reader) -> Response:
    given = request.query_params
    at = Address(request.url.path, tuple(pair for pair in given.multi_items() if pair[0] not in OURS))
    made = page.build(
        Asked(
            connection=reader,
            tables=reader.tables,
            parts=dict(request.path_params),
            values=dict(at.pairs),
            lists={key: given.getlist(key) for key in given},
            root=explorer.tables.storage.root,
            context=explorer.context | {"catalog": reader.generation.catalog},
        )
    )
    frame = _frame(explorer, request, reader.generation.name)
    if "chart" in given:
        return _chart(made, given["chart"])
    return HTMLResponse(drawing.page_html(reader, made, frame, at))


def _chart(page: Page, number: str) -> Response:
    from tasks.report import charts

    figures = list(drawing.figures(page.panels))
    if not (number.isdigit() and int(number) < len(figures)):
        raise NotThere(f"this page has no chart {number}")
    return Response(charts.svg(figures[int(number)].chart.spec), media_type="image/svg+xml")


def _frame(explorer: Explorer, request: Request, generation: str) -> Frame:
    path, theme = request.url.path, request.cookies.get("theme", "")
    menu = [(page.title, page.path, page.path == path) for page in explorer.pages if page.menu]
    return Frame(
        root=explorer.tables.storage.root,
        menu=menu,
        generation=generation,
        theme=theme if theme in {"light", "dark"} else "",
        is_saved="save" in request.query_params,
    )


def _said(frame: Frame, request: Request, error: FunctokError) -> Response:
    """A page that says what is wrong."""
    status = (
        404
        if isinstance(error, NotThere)
        else 400
        if isinstance(error, Refused)
        else 503
        if isinstance(error, Stopped)
        else 500
    )
    page = Page(title="This cannot be shown", panels=[Missing(what=error.message, way=error.hint)])
    at = Address(request.url.path)
    return HTMLResponse(drawing.page_html(None, page, frame, at), status)
