"""The explorer with 20 readers at once for a minute, while runs publish under them: failures, waits, and its memory.

The server is `functok explore`, a process of its own, on a copy of the root whose folders are links: a new
`catalog.json` every few seconds makes it open all tables anew. Its growth is the median of its memory in the last
quarter of that time less that in the second. Pages are the first of each kind that others lead to; `bench.explore`
measures how fast each of them is alone.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import httpx
import psutil

from bench.common import emit, figure, parser, say, spread
from infra.storage import json_bytes

READERS, PUBLISHED_EVERY = 20, 3.0
FIRST = ("/", "/tokens", "/features", "/texts", "/experiments", "/search?q=the", "/sql?q=FROM+coverage")
FOLLOWED = (r'href="(/token/\d+[^"]*)"', r'href="(/feature/\d+/\d+[^"]*)"', r'href="(/text/\d+[^"]*)"')


@contextmanager
def explored(root: str) -> Iterator[tuple[httpx.Client, psutil.Process, Path]]:
    """A client of the explorer of a root, its process, and the catalogue that it watches."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for entry in Path(root).resolve().iterdir():
            if entry.name == "catalog.json":
                (copy / entry.name).write_bytes(entry.read_bytes())
            else:
                (copy / entry.name).symlink_to(entry)
        command = [
            sys.executable,
            "-m",
            "functok",
            "explore",
            "--root",
            folder,
            "--port",
            "0",
            "--no-browser",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            address = next(line.strip() for line in process.stdout if "token=" in line)
            with httpx.Client(follow_redirects=True, timeout=60, base_url=urljoin(address, "/")) as client:
                client.get(address).raise_for_status()
                yield client, psutil.Process(process.pid), copy / "catalog.json"
        finally:
            process.terminate()
            process.wait()


def pages(client: httpx.Client) -> list[str]:
    """Addresses of a page of each kind that this root has."""
    found = [path for path in FIRST if client.get(path).status_code == 200]
    for pattern in FOLLOWED:
        for path in list(found):
            if match := re.search(pattern, client.get(path).text):
                found.append(match[1].replace("&amp;", "&"))
                break
    return found


def timed(client: httpx.Client, path: str) -> float:
    """Seconds of one page."""
    began = time.perf_counter()
    client.get(path).raise_for_status()
    return time.perf_counter() - began


def together(
    client: httpx.Client, found: list[str], catalogue: Path, process: psutil.Process, seconds: float
) -> dict[str, object]:
    """What 20 readers saw while the catalogue was replaced again and again."""
    until = time.monotonic() + seconds
    waits: list[float] = []
    failures: list[str] = []

    def read(number: int) -> None:
        while time.monotonic() < until:
            path = found[number % len(found)]
            number += 1
            try:
                waits.append(timed(client, path))
            except httpx.HTTPError as error:
                failures.append(f"{path}: {error}")

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    content, memory, published = json.loads(catalogue.read_text()), [], 0
    while time.monotonic() < until:
        time.sleep(PUBLISHED_EVERY)
        published += 1
        aside = catalogue.with_suffix(".tmp")
        aside.write_bytes(json_bytes({**content, "published": published}))
        aside.replace(catalogue)
        memory.append(process.memory_info().rss / 2**20)
    for thread in threads:
        thread.join()
    quarter = memory[len(memory) // 4 : len(memory) // 2] or memory
    return {
        "pages": len(waits),
        "failed": len(failures),
        "failures": failures[:5],
        "published": published,
        "seconds": spread(waits),
        "megabytes": [round(value) for value in memory],
        "growth": statistics.median(memory[-len(quarter) :]) - statistics.median(quarter),
    }


def main() -> None:
    """Print the report."""
    made = parser("readers", __doc__)
    made.add_argument("--root", default="runs/demo", help="a local root with published tables")
    made.add_argument("--seconds", type=float, default=60, help="for which they read")
    arguments = made.parse_args()
    with explored(arguments.root) as (client, process, catalogue):
        found = pages(client)
        say(f"{len(found)} pages: {', '.join(found)}")
        many = together(client, found, catalogue, process, arguments.seconds)
    emit(
        "readers",
        {
            "figures": [
                figure(
                    "explorer, 20 readers for a minute: pages that failed", spread([many["failed"]]), "≤", 0
                ),
                figure("the same: MB that it grew", spread([many["growth"]]), "≤", 50),
            ],
            "limits": "Python: pages are made in threads of one process.",
            "input": {"pages": found},
            "together": many,
        },
    )


if __name__ == "__main__":
    main()
