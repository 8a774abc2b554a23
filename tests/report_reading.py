"""Reads a report back: its elements, tables, images and text."""

from __future__ import annotations

import base64
from collections import Counter
from html.parser import HTMLParser

from infra.storage import Storage
from tasks.report.report import REPORT


class Page(HTMLParser):
    """The report's elements, tables (by caption), images and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str]] = []
        self.text: list[str] = []
        self._cells: list[list[str]] = []
        self._caption = ""
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "img":
            self.images.append({name: value or "" for name, value in attrs})
        elif tag in {"meta", "br"}:
            return
        if tag != "img":
            self._inside.append(tag)
        if tag == "table":
            self._cells, self._caption = [], ""
        elif tag == "tr":
            self._cells.append([])
        elif tag in {"td", "th"}:
            self._cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag, f"unbalanced {tag}"
        if tag == "table":
            self.tables[self._caption] = self._cells

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "caption" in self._inside:
            self._caption += data
        elif {"td", "th"} & set(self._inside):
            self._cells[-1][-1] += data


def read(storage: Storage) -> str:
    return storage.read_bytes(REPORT).decode("utf-8")


def svgs(page: Page) -> list[str]:
    prefix = "data:image/svg+xml;base64,"
    assert all(image["src"].startswith(prefix) for image in page.images)
    return [base64.b64decode(image["src"][len(prefix) :]).decode("utf-8") for image in page.images]
