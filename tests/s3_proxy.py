"""A proxy before an S3 server, in a thread of its own: it counts requests by kind, and refuses or cuts some of them."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from s3 import Server

_HEADERS_END = b"\r\n\r\n"
_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of requests, each from 0 to 1.

    Attributes:
        slow: Answered with 503 SlowDown, the server not asked.
        cut: Their connection is reset, the server not asked.
        cut_body: GETs whose answer ends in the middle of its body.
        refusal: Status and S3's code with which everything is refused, the server not asked.
    """

    slow: float = 0.0
    cut: float = 0.0
    cut_body: float = 0.0
    refusal: tuple[int, str] | None = None


class Proxy:
    """A proxy that runs.

    Attributes:
        endpoint: Its address.
        requests: What it was asked since `clear`: `GET bucket/key` and the like, in order.
        injected: Faults that it made, by name.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self._random = random.Random(0)
        self.endpoint = ""
        self.faults = Faults()
        self.requests: list[str] = []
        self.injected: Counter[str] = Counter()

    def clear(self) -> None:
        """Forget what was asked."""
        self.requests.clear()
        self.injected.clear()

    def kinds(self) -> Counter[str]:
        """How often each kind of request was made: HEAD, GET, PUT, LIST, DELETE, POST."""
        return Counter(request.split(" ", 1)[0] for request in self.requests)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection's requests on."""
        upstream = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        with suppress(ConnectionError, asyncio.IncompleteReadError, EOFError):
            while await self._pass(reader, writer, *upstream):
                pass
        upstream[1].close()
        writer.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        asked: asyncio.StreamWriter,
    ) -> bool:
        head = await reader.readuntil(_HEADERS_END)
        method, target = head.split(b" ", 2)[:2]
        self.requests.append(_request(method.decode(), target.decode()))
        fault = self._random.random()
        if fault < self.faults.cut:
            self.injected["cut"] += 1
            writer.transport.abort()
            return False
        if fault < self.faults.cut + self.faults.slow:
            self.injected["slow"] += 1
            await _refuse(reader, writer, head, 503, "SlowDown", "Please reduce your request rate.")
            return False
        if self.faults.refusal is not None:
            await _refuse(reader, writer, head, *self.faults.refusal, "The server says no.")
            return False
        if _header(head, b"expect") == b"100-continue":
            # Not every server says it: whoever waits for it would wait for ever.
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"\r\nexpect:[^\r]*", b"", head, flags=re.IGNORECASE)
        asked.write(head)
        await _copy(reader, asked, head)
        answer = await answers.readuntil(_HEADERS_END)
        writer.write(answer)
        if method != b"HEAD" and answer.split(b" ", 2)[1] not in (b"204", b"304"):
            cut = method == b"GET" and self._random.random() < self.faults.cut_body
            await _copy(answers, writer, answer, half=cut)
            if cut:
                self.injected["cut_body"] += 1
                writer.transport.abort()
                return False
        await writer.drain()
        return _header(answer, b"connection") != b"close"


async def _refuse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    head: bytes,
    status: int,
    code: str,
    message: str,
) -> None:
    if _header(head, b"expect") == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    await _copy(reader, None, head)
    # A HEAD has no body, so whoever asks with one learns the status alone.
    body = b"" if head.startswith(b"HEAD") else _ERROR.format(code=code, message=message).encode()
    lines = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    writer.write(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


def _request(method: str, target: str) -> str:
    path, _, query = target.partition("?")
    key = path.strip("/").partition("/")[2]
    return f"{'LIST' if method == 'GET' and not key else method} {key or query}"


def _header(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip().lower()
    return b""


async def _copy(
    source: asyncio.StreamReader, target: asyncio.StreamWriter | None, head: bytes, half: bool = False
) -> None:
    if _header(head, b"transfer-encoding") == b"chunked":
        size = -1
        while size:
            line = await source.readline()
            size = int(line.split(b";")[0], 16)
            content = line + await source.readexactly(size + 2)
            if target is not None:
                target.write(content)
        return
    length = int(_header(head, b"content-length") or 0)
    left = length // 2 if half else length
    while left:
        content = await source.readexactly(min(left, 1 << 16))
        left -= len(content)
        if target is not None:
            target.write(content)
            await target.drain()


@pytest.fixture(scope="session")
def s3_proxy(moto_server: Server) -> Iterator[Proxy]:
    """A proxy before the S3 server that is always there; whoever makes faults takes them back."""
    with running_proxy(moto_server.endpoint) as proxy:
        yield proxy


@contextmanager
def running_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy on a free port of 127.0.0.1 before the server at `upstream`."""
    proxy, started = Proxy(upstream), threading.Event()
    loop = asyncio.new_event_loop()

    async def listen() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
        proxy.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        async with server:
            with suppress(asyncio.CancelledError):
                await server.serve_forever()

    thread = threading.Thread(target=loop.run_until_complete, args=(listen(),), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(30)
        loop.close()
