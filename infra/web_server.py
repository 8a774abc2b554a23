"""The server of `functok up`: Prefect's API and UI, and functok's own pages, on one port of this machine.

Prefect's app is taken as it is, with three things around it. No page may call out: the interface that does (V2, which
loads an analytics script) is not mounted, so there is no switch to it, logos that lie on a CDN are left out, and a
Content-Security-Policy holds the rest to this server. Only names of this machine are answered, as a web page elsewhere
may have its own name lead here (DNS rebinding). Under `/functok` are pages of ours: reports of the roots that the
server knows (`infra.published`), whose own policy allows no script and gives them no rights on this origin.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import html
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from infra.prefect_server import is_loopback, prefect_environment
from infra.published import (
    GREETING,
    PAGES,
    REPORT,
    KnownRoot,
    explore_command,
    explorer_page,
    known_root,
    known_roots,
    report_page,
)
from schemas.errors import FunctokError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANSWER_SECONDS = 30.0
"""How long a storage may take to answer before the page says that it does not."""

REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
)
"""The report is one file without a script; `sandbox` gives it an origin of its own."""

CDN_PAGES = ("/docs", "/redoc", "/api/docs", "/api/redoc")
"""Pages of FastAPI that load their script from a CDN."""


LOGO_PATHS = ("/api/block", "/api/collections/", "/api/work_pools")
"""Where Prefect's API gives addresses of logos: block types, schemas and documents, and kinds of work pools."""

_LOGO = re.compile(rb'("logo_url":\s*)"https?:[^"]*"')


def build_app(host: str) -> ASGIApp:
    """Prefect's app and our pages.

    Args:
        host: The address that is listened on; where others can reach it, any name of it is answered.
    """
    import prefect
    from prefect.server.api import collections
    from prefect.server.api.server import create_app
    from prefect.settings import PREFECT_UI_API_URL
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # The server itself asks a registry for the kinds of work pools; with no address it takes the list that it ships.
    for view in collections.KNOWN_VIEWS:
        collections.KNOWN_VIEWS[view] = ""
    # Where a bundle is not there, Prefect offers no switch to it and takes no cookie for it.
    prefect.__ui_v2_static_path__ = Path(prefect.__ui_v2_static_path__) / "not-served"
    prefect_app: ASGIApp = _without_logos(create_app(final=True))
    ours = _pages()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_ours = scope["type"] == "http" and (f"{path}/".startswith(f"{PAGES}/") or path in CDN_PAGES)
        await (ours if is_ours else prefect_app)(scope, receive, send)

    names = ["127.0.0.1", "localhost", "[::1]", host] if is_loopback(host) else ["*"]
    policy = ui_policy(PREFECT_UI_API_URL.value() or "")
    return TrustedHostMiddleware(_with_policy(app, policy), allowed_hosts=names, www_redirect=False)


def ui_policy(api_url: str) -> str:
    """The Content-Security-Policy of Prefect's UI: nothing outside this server.

    Args:
        api_url: Where the UI finds the API; another name of this machine is another origin.
    """
    parts = urlsplit(api_url)
    origins = "".join(
        f" {scheme}://{parts.netloc}" for scheme in ("http", "https", "ws", "wss") if parts.netloc
    )
    return "; ".join(
        (
            "default-src 'self'",
            f"connect-src 'self' data: blob:{origins}",
            # PixiJS, which draws a run's graph, makes functions from text.
            "script-src 'self' 'unsafe-eval'",
            "worker-src 'self' blob:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'self'",
        )
    )


def _without_logos(app: ASGIApp) -> ASGIApp:
    """Prefect's API without the addresses of logos, which the UI's pages of blocks and work pools load from a CDN."""
    from starlette.datastructures import MutableHeaders

    async def without_logos(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(LOGO_PATHS):
            await app(scope, receive, send)
            return
        start: Message = {}
        body = b""

        async def send_without_logos(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                body = _LOGO.sub(rb"\1null", body)
                MutableHeaders(scope=start)["content-length"] = str(len(body))
                await send(start)
                await send({"type": "http.response.body", "body": body})

        # Compressed answers could not be read here.
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await app({**scope, "headers": plain}, receive, send_without_logos)

    return without_logos


def _with_policy(app: ASGIApp, policy: str) -> ASGIApp:
    """An app whose answers carry a Content-Security-Policy where they have none of their own."""
    from starlette.datastructures import MutableHeaders

    async def with_policy(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("content-security-policy", policy)
            await send(message)

        await app(scope, receive, send_with_policy)

    return with_policy


def _pages() -> ASGIApp:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def health(_: Request) -> Response:
        return PlainTextResponse(GREETING)

    return Starlette(
        routes=[
            Route(f"{PAGES}/health", health),
            Route(PAGES, _guarded(_index)),
            Route(f"{PAGES}/", _guarded(_index)),
            Route(report_page("{name}"), _guarded(_report)),
            Route(explorer_page("{name}"), _guarded(_explore)),
            *(Route(path, _guarded(_cdn_page)) for path in CDN_PAGES),
        ],
        exception_handlers={404: _not_found},
    )


def _guarded(page: Any) -> Any:
    """A page that asks for what the API asks for, and says in words what fails."""

    async def guarded(request: Request) -> Response:
        if not _is_let_in(request):
            response = _page(401, "Log in", "This server asks for the user and password of its API.")
            response.headers["www-authenticate"] = 'Basic realm="functok"'
            return response
        try:
            answer: Response = await asyncio.wait_for(asyncio.to_thread(page, request), ANSWER_SECONDS)
            return answer
        except TimeoutError:
            text = f"The storage has not answered within {ANSWER_SECONDS:.0f} s."
            return _page(504, "No answer", text, "try again")
        except FunctokError as error:
            return _page(502, "This page cannot be shown", error.message, error.hint)

    return guarded


def _is_let_in(request: Request) -> bool:
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING

    wanted = PREFECT_SERVER_API_AUTH_STRING.value()
    if not wanted:
        return True
    given = request.headers.get("authorization", "")
    expected = base64.b64encode(wanted.encode()).decode()
    return secrets.compare_digest(given.encode(), f"Basic {expected}".encode())


def _report(request: Request) -> Response:
    from starlette.responses import HTMLResponse

    name = request.path_params["name"]
    root = known_root(name)
    if root is None:
        return _page(
            404,
            "Unknown root",
            f"No run of this server has written a report under the name {name}.",
            "run the deployment report (or reproduce); the link is among its artifacts",
        )
    try:
        content = root.open().read_bytes(REPORT)
    except FileNotFoundError:
        return _page(
            404,
            "No report yet",
            f"There is no {REPORT} in {root.root}, as this machine sees it.",
            "run the deployment report (or reproduce) for this root",
        )
    return HTMLResponse(content, headers=_headers(REPORT_POLICY))


def _explore(request: Request) -> Response:
    name = request.path_params["name"]
    root = known_root(name)
    if root is None:
        return _page(
            404, "Unknown root", f"No run of this server has published tables under the name {name}."
        )
    text = "The explorer shows a run’s tables in your browser, from a process of your own on the machine that has them."
    return _page(200, f"Explore {name}", text, explore_command(root.root, root.endpoint_url))


def _index(_: Request) -> Response:
    if roots := known_roots():
        return _page(200, "Reports", "Each root has the report that was last written there.", links=roots)
    text = "No run of this server has written a report yet."
    return _page(200, "Reports", text, "run the deployment reproduce")


def _cdn_page(_: Request) -> Response:
    return _page(
        404,
        "Not served here",
        "This page would load its script from another host, and no page of this server calls out.",
        "the API's description is at /api/openapi.json",
    )


async def _not_found(_: Request, __: Exception) -> Response:
    return _page(404, "Not found", "There is no such page.", f"{PAGES} lists the reports")


def _page(
    status: int, title: str, text: str, way_out: str = "", links: list[KnownRoot] | None = None
) -> Response:
    from starlette.responses import HTMLResponse

    items = "".join(
        f'<li><a href="{report_page(html.escape(root.name))}">{html.escape(root.name)}</a>'
        f"<br><small>{html.escape(root.root)}</small></li>"
        for root in links or ()
    )
    body = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>functok: {html.escape(title)}</title>"
        "<style>body{font:1rem/1.55 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1.5rem;"
        "overflow-wrap:anywhere}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>"
        + (f"<p>Way out: {html.escape(way_out)}</p>" if way_out else "")
        + (f"<ul>{items}</ul>" if items else "")
        + '<p><a href="/">Prefect’s UI</a></p></body></html>'
    )
    # Links of a sandboxed page would lead the whole tab, which the reports' policy does not need to allow.
    return HTMLResponse(body, status, headers=_headers(REPORT_POLICY.removesuffix("; sandbox")))


def _headers(policy: str) -> dict[str, str]:
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4200)
    arguments = parser.parse_args()
    prefect_environment()
    import uvicorn
    from prefect.settings import get_current_settings

    server = get_current_settings().server
    uvicorn.run(
        build_app(arguments.host),
        host=arguments.host,
        port=arguments.port,
        log_level=server.logging_level.lower(),
        timeout_keep_alive=server.api.keepalive_timeout,
    )


if __name__ == "__main__":
    main()
