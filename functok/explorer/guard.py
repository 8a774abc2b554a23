"""Who may ask the explorer, and for what.

Any web page that a reader has open can send requests to this machine, and a name that its owner points here (DNS
rebinding) makes its scripts of our origin. So only names of this machine are answered; what runs SQL of a reader's own
or changes something needs a token, new at each start, which the opened address brings once and a cookie keeps, and
comes from a page of ours. Where other machines can reach the explorer, everything needs the token.

No page may load or call anything outside this server, nor run a script that is not one of our files.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.prefect_server import is_loopback

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An app that answers only who may ask.

    Args:
        app: What is guarded; it is told `scope["has_token"]`.
        token: What the opened address brings.
        host: The address that is listened on.
    """

    def __init__(self, app: ASGIApp, token: str, host: str = "127.0.0.1") -> None:
        self._app, self._token = app, token
        self._is_shared = not is_loopback(host)
        self._names = {"127.0.0.1", "localhost", "::1", host}
        if self._is_shared:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
            return
        await self._app({**scope, "has_token": self._has_token(scope, headers)}, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        name = _split(f"//{headers.get('host', '')}").hostname or ""
        if name not in self._names and not (self._is_shared and _is_address(name)):
            return PlainTextResponse("this server is asked by a name that is not its own", 421)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if (
            scope["method"] == "GET"
            and given is not None
            and secrets.compare_digest(given.encode(), self._token.encode())
        ):
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            response = RedirectResponse(f"{scope['path']}{'?' if rest else ''}{rest}", 303)
            response.set_cookie(_cookie(scope), self._token, httponly=True, samesite="strict", path="/")
            return response
        is_change = scope["method"] not in {"GET", "HEAD"}
        if is_change and not _is_own(headers):
            return PlainTextResponse("this was not sent from a page of this server", 403)
        if (is_change or self._is_shared) and not self._has_token(scope, headers):
            return PlainTextResponse(
                "open the address that functok explore printed: it holds the token that this needs", 403
            )
        return None

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie(scope))
        except CookieError:
            return False
        return cookie is not None and secrets.compare_digest(cookie.value.encode(), self._token.encode())


def _is_own(headers: Headers) -> bool:
    """Whether a request comes from a page of this server: browsers say where one that changes something is from."""
    origin = headers.get("origin")
    return origin is not None and _split(origin).netloc == headers.get("host")


def _split(address: str) -> SplitResult:
    """The parts of an address; of what is none, no parts."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def is_from_elsewhere(headers: Headers) -> bool:
    """Whether a browser says that a page of another server leads here."""
    return headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}


def _is_address(name: str) -> bool:
    """Whether a host is written as an address, which no name server can change."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _cookie(scope: Scope) -> str:
    """The cookie's name: cookies are of a host, whatever the port, and there may be several explorers."""
    return f"functok-{(scope.get('server') or ('', 0))[1]}"


def _with_headers(send: Send) -> Send:
    """Send answers with our headers, where they have none of their own."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
