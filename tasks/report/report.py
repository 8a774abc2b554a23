"""The report: one HTML file with the paper's figures and tables, made from the published tables alone.

It needs nothing else to be read: no script, no font, no address outside it. The same tables give the same
bytes. Sections on the graph appear when the graph's tables are published, those of an experiment when its own are: its
part of the report (`tasks.report.vocabulary.Part`) is given from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from infra.catalog import CATALOG
from infra.duck import connect, telling_damage
from infra.manifest import content_key
from infra.progress import Progress, silent
from infra.published import REPORT
from infra.storage import Storage
from schemas.config import DuckDb
from schemas.errors import ConfigError, DamagedError
from tasks.report.queries import tables_of, value
from tasks.report.vocabulary import Part

VERSION = 4
RECEIPT = "report.json"
CORPUS_TABLES = {"documents", "rejects", "tokens"}


def write_report(
    storage: Storage,
    resources: DuckDb | None = None,
    progress: Progress = silent,
    parts: Sequence[Part] = (),
) -> str:
    """Write `report.html` in the storage's root, with the experiments' parts, and give its address.

    Raises:
        ConfigError: if no corpus tables are published under this root.
    """
    key = _report_key(storage)
    with telling_damage(), closing(connect(storage, resources)) as connection:
        html = build_report(connection, storage, progress, parts)
    written = storage.write_bytes(REPORT, html.encode("utf-8"))
    files = {"files": {REPORT: written.size}, "hashes": {REPORT: written.sha256}}
    storage.write_json(RECEIPT, {"key": key, **files})
    return storage.url(REPORT)


def is_report_current(storage: Storage) -> bool:
    """Whether the report is there and of the tables that are published now."""
    try:
        receipt = storage.read_json(RECEIPT)
        if not receipt or receipt.get("key") != _report_key(storage):
            return False
        size, digest = receipt["files"][REPORT], receipt["hashes"][REPORT]
        return bool(storage.hash_of(REPORT, size) == digest)
    except (DamagedError, FileNotFoundError, KeyError):
        return False


def _report_key(storage: Storage) -> str:
    return content_key(catalog=storage.read_json(CATALOG), version=VERSION)


def build_report(
    connection: Any, storage: Storage, progress: Progress = silent, parts: Sequence[Part] = ()
) -> str:
    """The report's HTML from a connection of `infra.duck.connect`.

    Raises:
        ConfigError: if no corpus tables are published.
    """
    from tasks.report import corpus, graph, run
    from tasks.report.page import image, render

    if not tables_of(connection) >= CORPUS_TABLES:
        raise ConfigError(
            f"no tables are published under {storage.root}",
            hint="`functok run CONFIG` makes them, or give the right --root",
            stage="report",
        )
    if not value(connection, "SELECT count(*) FROM tokens"):
        raise ConfigError(
            f"the corpus under {storage.root} has no token", hint="see the table rejects", stage="report"
        )
    told = [(part, part.sections(connection)) for part in parts]
    is_expected = not any(part.HAS_OWN_GRAPHS and sections for part, sections in told)
    builders = [
        *corpus.sections(connection),
        *graph.sections(connection, is_expected=is_expected),
        *(build for _, sections in told for build in sections),
        *run.sections(connection),
    ]
    sections = []
    for done, build in enumerate(builders):
        progress(done, len(builders), "report sections")
        section = build()
        sections.append((section, [image(chart) for chart in section.charts]))
    progress(len(builders), len(builders), "report sections")
    facts = corpus.facts(connection) + graph.facts(connection)
    for part, _ in told:
        facts += part.facts(connection)
    return render("functok report", facts, sections)
