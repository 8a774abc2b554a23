"""The explorer as an ASGI app: pages by their addresses, downloads, charts, kept pages, forms, the console.

Pages are made in threads, each with a connection of its own. A reader who leaves, or who has waited for too long, has
the query ended.
"""

from __future__ import annotations

import asyncio
import io
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qsl

import duckdb
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from functok.explorer import console, drawing, grids
from functok.explorer.drawing import Frame
from functok.explorer.grids import Address
from functok.explorer.guard import Guard, is_from_elsewhere
from functok.explorer.tables import LESS, Reader, Stopped, Tables
from functok.formats import WRITERS
from infra.storage import LOCAL_CACHE, Storage, put_aside
from schemas.errors import FunctokError, whole_message
from tasks.explore.vocabulary import (
    Action,
    Asked,
    DensityBounds,
    Grid,
    Missing,
    NotThere,
    Page,
    PageAt,
    Query,
    Refused,
    TokenValues,
)
from tasks.report.vocabulary import Part

AT_ONCE = 8
"""Readers that are answered at once; others wait."""

PAGE_SECONDS = 30.0
"""How long a page may take."""

OURS = frozenset({"save", "download", "format", "chart"})
"""Values of an address that say how a page is given, not what is on it."""

STATUS: Mapping[type[FunctokError], int] = {NotThere: 404, Refused: 400, Stopped: 503}
"""Of answers that say why there is no other; 500 of all else."""

LONGEST_FORM = 1 << 20
"""Bytes of what a form sends, at most."""

LATE = 1.0
"""Seconds that what is ended has for its end, until its reader is told without it: DuckDB ends a query between two
pieces of work, and one text of gigabytes is one piece."""

LEFT = "nobody waits for this any more"
"""Why work ends whose reader has gone."""

FORMATS = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SAVED_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """What is shown, and to whom.

    Attributes:
        tables: The published tables.
        pages: In the order of the menu.
        context: What pages know beside the tables (`Asked.context`).
        brought: What experiments add to the spine's pages.
        page_seconds: How long a page may take.
    """

    tables: Tables
    pages: Sequence[PageAt]
    context: Mapping[str, Any] = field(default_factory=dict)
    brought: Sequence[TokenValues | DensityBounds] = ()
    page_seconds: float = PAGE_SECONDS
    pool: ThreadPoolExecutor = field(
        init=False, default_factory=lambda: ThreadPoolExecutor(AT_ONCE, "explorer")
    )
    ending: set[asyncio.Future[None]] = field(init=False, default_factory=set)

    async def answered(
        self,
        request: Request,
        answer: Callable[[Reader], Response],
        seconds: float | None = None,
        late: Callable[[Stopped, Reader], Response] | None = None,
    ) -> Response:
        """What a thread with a reader answers; ended when time is up or nobody waits for it any more.

        Args:
            request: What it is the answer to.
            answer: Makes it.
            seconds: How long that may take; `page_seconds` if not given.
            late: Makes another one where the thread has not ended `LATE` seconds after it should have.
        """
        work = _Work(self.tables, answer)
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self.pool, work)
        limit = self.page_seconds if seconds is None else seconds
        why = ""
        try:
            while not why and not (await asyncio.wait([working], timeout=0.1))[0]:
                if await request.is_disconnected():
                    why = LEFT
                elif work.seconds > limit:
                    why = f"this took longer than {limit:g} s, and was ended"
            if why and not await self._ended(work, working, why):
                error = Stopped(why, hint=LESS)
                if late is None or why == LEFT:
                    raise error
                return await self.answered(request, partial(late, error))
            return working.result()
        except asyncio.CancelledError:
            work.stop(LEFT)
            raise
        except FunctokError as error:
            return self.said(request, error)
        except duckdb.Error as error:
            _log.exception("a page failed: %s", request.url.path)
            return self.said(request, FunctokError(f"a query of this page failed: {whole_message(error)}"))
        except Exception as error:
            _log.exception("a page failed: %s", request.url.path)
            return self.said(request, FunctokError(f"unexpected {whole_message(error, with_type=True)}"))

    async def _ended(self, work: _Work, working: asyncio.Future[Response], why: str) -> bool:
        """End work; whether it has ended within `LATE` seconds. It is ended then too, as soon as it can be."""

        async def end() -> None:
            while not working.done():
                work.stop(why)
                await asyncio.wait([working], timeout=0.1)
            if not working.cancelled():
                working.exception()

        ending = asyncio.ensure_future(end())
        self.ending.add(ending)
        ending.add_done_callback(self.ending.discard)
        return ending in (await asyncio.wait([ending], timeout=LATE))[0]

    def frame(self, request: Request, generation: str = "") -> Frame:
        """What stands around a page."""
        path, theme = request.url.path, request.cookies.get("theme", "")
        begins = f"/{path.split('/')[1]}"
        menu = [(page.title, page.path, begins == page.path) for page in self.pages if page.menu]
        return Frame(
            root=self.tables.storage.root,
            menu=[*menu, ("SQL", "/sql", path == "/sql")],
            generation=generation or self.tables.known,
            theme=theme if theme in {"light", "dark"} else "",
            is_saved="save" in request.query_params,
        )

    def said(self, request: Request, error: FunctokError) -> Response:
        """A page that says what is wrong."""
        status = STATUS.get(type(error), 500)
        panels = [Missing(what=error.message, way=error.hint)]
        page = Page(title="Not here" if status == 404 else "This cannot be shown", panels=panels)
        at = Address(request.url.path)
        return HTMLResponse(drawing.page_html(None, page, self.frame(request), at), status)

    def asked(self, request: Request, reader: Reader, pairs: Sequence[tuple[str, str]]) -> Asked:
        """What a page or an action is made from."""
        lists: dict[str, list[str]] = {}
        for key, value in pairs:
            lists.setdefault(key, []).append(value)
        return Asked(
            connection=reader,
            tables=reader.tables,
            parts=dict(request.path_params),
            values=dict(pairs),
            lists=lists,
            root=self.tables.storage.root,
            context={
                "storage": self.tables.storage,
                "catalog": reader.generation.catalog,
                "kept": reader.generation.kept,
                **self.context,
            },
            brought=self.brought,
        )


class _Work:
    """An answer in the making, in a thread of its own; to be stopped from another one."""

    def __init__(self, tables: Tables, answer: Callable[[Reader], Response]) -> None:
        self._tables, self._answer = tables, answer
        self._reader: Reader | None = None
        self._why = ""
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """For how long it has been going on; what waits for its turn takes no time."""
        return 0 if self._began is None else time.monotonic() - self._began

    def __call__(self) -> Response:
        if self._why:
            raise Stopped(self._why)
        self._began = time.monotonic()
        with self._tables.reader() as reader:
            self._reader = reader
            try:
                return self._answer(reader)
            finally:
                self._reader = None

    def stop(self, why: str) -> None:
        """End it; to be called until it has ended."""
        self._why = why
        reader = self._reader
        if reader is not None:
            reader.stop(why)


def all_pages() -> list[PageAt]:
    """The pages of the spine and of every experiment, published or not: those then say what to add."""
    from functok.explorer.experiments import INDEX
    from schemas.experiments import EXPERIMENTS
    from tasks.explore.pages import PAGES
    from tasks.stages import experiment

    return [*PAGES, INDEX, *(page for name in EXPERIMENTS for page in experiment(name).pages)]


def all_brought() -> list[TokenValues | DensityBounds]:
    """What the experiments add to the spine's pages."""
    from schemas.experiments import EXPERIMENTS
    from tasks.stages import experiment

    return [one for name in EXPERIMENTS for one in experiment(name).brings]


def all_parts() -> list[Part]:
    """What the experiments tell, each nothing where it was not run."""
    from schemas.experiments import EXPERIMENTS
    from tasks.stages import experiment

    return [experiment(name).report for name in EXPERIMENTS]


def all_actions() -> list[Action]:
    """What forms of pages send to."""
    from tasks.explore.pages import ACTIONS

    return list(ACTIONS)


def build_app(
    storage: Storage,
    pages: Sequence[PageAt] | None = None,
    actions: Sequence[Action] | None = None,
    *,
    token: str | None = None,
    host: str = "127.0.0.1",
    context: Mapping[str, Any] | None = None,
    page_seconds: float = PAGE_SECONDS,
    tables: Tables | None = None,
) -> ASGIApp:
    """The explorer of a root.

    Args:
        storage: The root.
        pages: The pages; all that there are if not given.
        actions: What forms send to; all that there are if not given.
        token: What the opened address brings; one that nobody knows if not given.
        host: The address that is listened on.
        context: What pages know beside tables, storage and catalogue.
        page_seconds: How long a page may take.
        tables: Of the root, where they are open already.

    Raises:
        ConfigError: if nothing is published.
    """
    explorer = Explorer(
        tables=tables or Tables(storage),
        pages=all_pages() if pages is None else pages,
        context={"parts": all_parts(), **(context or {})},
        brought=all_brought(),
        page_seconds=page_seconds,
    )

    @asynccontextmanager
    async def while_served(_: FastAPI) -> AsyncIterator[None]:
        # Not when the first chart is looked at.
        threading.Thread(target=static_file, args=("vega.js",), daemon=True).start()
        yield
        explorer.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(openapi_url=None, lifespan=while_served)

    def read_at(path: str, answer: Callable[..., Any]) -> None:
        app.add_api_route(path, answer, methods=["GET", "HEAD"], response_class=Response)

    for page in explorer.pages:
        read_at(page.path, _shown(explorer, page))
    for action in all_actions() if actions is None else actions:
        app.add_api_route(action.path, _acting(explorer, action), methods=["POST"], response_class=Response)
    read_at("/sql", _console(explorer))
    read_at("/generation", _generation(explorer))
    read_at("/static/{name}", _static)

    async def not_found(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        if status == 404:
            return explorer.said(request, NotThere("there is no such page", hint="the menu has them all"))
        return explorer.said(request, Refused("this address does not take that"))

    app.add_exception_handler(HTTPException, not_found)
    return Guard(app, token or secrets.token_urlsafe(24), host)


def _shown(explorer: Explorer, page: PageAt) -> Callable[..., Any]:
    async def shown(request: Request) -> Response:
        if "download" in request.query_params:
            return await _download(
                explorer, request, lambda reader, at: _grid(explorer, page, request, reader, at)
            )
        return await explorer.answered(request, lambda reader: _page(explorer, page, request, reader))

    return shown


def _at(request: Request) -> Address:
    """A page's address, without what says how it is given."""
    return Address(
        request.url.path, tuple(pair for pair in request.query_params.multi_items() if pair[0] not in OURS)
    )


def _page(explorer: Explorer, page: PageAt, request: Request, reader: Reader) -> Response:
    at, chart = _at(request), request.query_params.get("chart")
    made = page.build(explorer.asked(request, reader, at.pairs))
    if chart is not None:
        return _chart(made.panels, chart)
    text = drawing.page_html(reader, made, explorer.frame(request, reader.generation.name), at)
    return HTMLResponse(text, headers=_saved(made.title) if "save" in request.query_params else None)


def _saved(title: str) -> dict[str, str]:
    name = re.sub(r"[^\w.-]+", "-", title, flags=re.ASCII).strip("-") or "page"
    return {
        "content-disposition": f'attachment; filename="{name[:80]}.html"',
        "content-security-policy": SAVED_POLICY,
    }


def _chart(panels: Sequence[Any], number: str) -> Response:
    from tasks.report import charts

    figures = list(drawing.figures(panels))
    if not (number.isascii() and number.isdigit() and int(number) < len(figures)):
        raise NotThere(f"this page has no chart {number}")
    svg = charts.svg(figures[int(number)].chart.spec)
    return Response(svg, media_type="image/svg+xml", headers={"content-security-policy": SVG_POLICY})


def _grid(
    explorer: Explorer, page: PageAt, request: Request, reader: Reader, at: Address
) -> tuple[Grid, Query]:
    """The grid of a page that is to be downloaded, and its query as sorted and filtered."""
    made, key = page.build(explorer.asked(request, reader, at.pairs)), request.query_params["download"]
    found = next((grid for grid in drawing.all_grids(made.panels) if grid.key == key), None)
    if found is None:
        raise NotThere(f"this page has no table {key}")
    return found, grids.asked(reader, found, at).query


async def _download(
    explorer: Explorer, request: Request, of: Callable[[Reader, Address], tuple[Grid, Query]]
) -> Response:
    """All rows of a grid as a file, batch by batch; ended where the reader leaves."""
    format_, key = request.query_params.get("format", "csv"), request.query_params["download"]
    if format_ not in FORMATS:
        return explorer.said(request, Refused(f"there is no format {format_}", hint=" or ".join(FORMATS)))
    stream = _Stream(asyncio.get_running_loop())

    def write(reader: Reader) -> Response:
        stream.reader = reader
        with reader.stoppable():
            _, query = of(reader, _at(request))
            batches = reader.batches(query)
            stream.begin()
            with io.BufferedWriter(stream, 1 << 16) as target:
                WRITERS[format_](batches, target)
        return Response()

    # The thread writes on while what it has written is sent.
    working = asyncio.ensure_future(explorer.answered(request, write, float("inf")))
    begun = asyncio.ensure_future(stream.begun.wait())
    waited: list[asyncio.Future[Any]] = [working, begun]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if not stream.begun.is_set():
        begun.cancel()
        return await working
    name = re.sub(r"[^\w-]+", "-", key, flags=re.ASCII)
    return StreamingResponse(
        stream.chunks(working),
        media_type=FORMATS[format_],
        headers={"content-disposition": f'attachment; filename="{name}.{format_}"'},
    )


class _Stream(io.RawIOBase):
    """What a thread writes, for an answer that is sent meanwhile; the thread waits where the answer is slower.

    Args:
        loop: The loop that sends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(8)
        self.begun = asyncio.Event()
        self.reader: Reader | None = None
        self._left = False

    def begin(self) -> None:
        """Say that there is an answer, from the thread."""
        self._loop.call_soon_threadsafe(self.begun.set)

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, content: Any) -> int:
        """Send bytes, from the thread."""
        if self._left:
            raise Stopped(LEFT)
        data = bytes(content)
        asyncio.run_coroutine_threadsafe(self._queue.put(data), self._loop).result()
        return len(data)

    async def chunks(self, working: asyncio.Future[Response]) -> AsyncIterator[bytes]:
        """What is written, until the thread has ended."""
        try:
            while not (working.done() and self._queue.empty()):
                if self._queue.empty():
                    getting = asyncio.ensure_future(self._queue.get())
                    either: list[asyncio.Future[Any]] = [getting, working]
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    if getting.done():
                        yield getting.result()
                    else:
                        getting.cancel()
                else:
                    yield self._queue.get_nowait()
            if (await working).status_code != 200:
                # Its status was sent long ago: a file that is cut off must not look whole.
                raise RuntimeError("a download failed on its way")
        finally:
            self._left = True
            if self.reader is not None:
                self.reader.stop(LEFT)
            # A thread that waits for room goes on, and meets `_left`.
            while not self._queue.empty():
                self._queue.get_nowait()


def _acting(explorer: Explorer, action: Action) -> Callable[..., Any]:
    async def acting(request: Request) -> Response:
        try:
            body = await _body(request)
        except Refused as error:
            return explorer.said(request, error)
        pairs = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)

        def act(reader: Reader) -> Response:
            to = action.act(explorer.asked(request, reader, pairs))
            if not to.startswith("/") or to.startswith("//"):
                raise FunctokError(f"{action.path} leads out of the explorer")
            return RedirectResponse(to, 303)

        return await explorer.answered(request, act)

    return acting


async def _body(request: Request) -> bytes:
    """What a form sends.

    Raises:
        Refused: if it is too long.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_FORM:
            raise Refused(f"a form holds at most {LONGEST_FORM:,} bytes")
    return body


def _console(explorer: Explorer) -> Callable[..., Any]:
    async def sql(request: Request) -> Response:
        if not request.scope["has_token"]:
            way = "open the address that functok explore printed: it brings the token that SQL needs"
            return explorer.said(request, Refused("this browser was not let in to the console", hint=way))
        at = _at(request)
        try:
            typed = console.Typed.of(dict(at.pairs))
        except Refused as error:
            return explorer.said(request, error)
        # A page of another server may lead here, but what it asks is not run before somebody has looked at it.
        runs = bool(typed.sql) and not is_from_elsewhere(request.headers)
        if runs and "download" in request.query_params:
            return await _download(explorer, request, lambda reader, at: _result_grid(reader, typed, at))
        return await explorer.answered(
            request,
            lambda reader: _console_page(explorer, request, reader, typed, runs=runs),
            typed.seconds,
            late=lambda error, reader: _console_page(explorer, request, reader, typed, said=error),
        )

    return sql


def _result_grid(reader: Reader, typed: console.Typed, at: Address) -> tuple[Grid, Query]:
    """All rows of a result, as sorted and filtered."""
    grid = console.grid(reader, console.selected(typed.sql, reader.tables), typed, is_whole=True)
    return grid, grids.asked(reader, grid, at).query


def _console_page(
    explorer: Explorer,
    request: Request,
    reader: Reader,
    typed: console.Typed,
    *,
    runs: bool = False,
    said: FunctokError | None = None,
) -> Response:
    at, result = _at(request), None
    # Before the query: one that takes too long leaves its reader stopped.
    tables = console.columns_at_hand(reader)
    panels: Sequence[Any] = []
    if runs:
        try:
            with console.refusing():
                result = console.result(reader, typed)
                if "chart" in request.query_params:
                    return _chart(result.panels, request.query_params["chart"])
                panels = drawing.drawn(reader, result.panels, at, is_saved="save" in request.query_params)
        except (Refused, Stopped) as error:
            said, result, panels = error, None, []
    text = drawing.html(
        "console.html.j2",
        explorer.frame(request, reader.generation.name),
        at,
        typed=typed,
        result=result,
        panels=panels,
        said=said,
        limits=console.limits(typed),
        tables=tables,
        has_charts=any(one.kind == "Figure" for one in panels),
    )
    return HTMLResponse(
        text,
        200 if said is None else STATUS[type(said)],
        headers=_saved("SQL") if "save" in request.query_params else None,
    )


def _generation(explorer: Explorer) -> Callable[..., Any]:
    async def generation(request: Request) -> Response:
        current = await asyncio.to_thread(explorer.tables.current)
        return JSONResponse({"generation": current.name})

    return generation


async def _static(name: str) -> Response:
    found = await asyncio.to_thread(static_file, name)
    if found is None:
        return Response("no such file", 404)
    kind = KINDS[name[name.rindex(".") :]]
    return Response(found, media_type=kind, headers={"cache-control": "private, max-age=86400"})


@cache
def static_file(name: str) -> bytes | None:
    """A file of ours by its name; None where there is none. `vega.js` comes out of vl-convert."""
    if name == "vega.js":
        with _making:
            return _vega()
    path = drawing.STATIC / name
    return path.read_bytes() if path in drawing.STATIC.iterdir() else None


_making = threading.Lock()


@cache
def _vega() -> bytes:
    """Vega, Vega-Lite and Vega Embed; putting them together takes more than a second, once a version."""
    kept = LOCAL_CACHE / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return kept.read_bytes()
    import vl_convert

    content: bytes = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").encode()
    with suppress(OSError), put_aside(kept) as aside:
        aside.write_bytes(content)
    return content
