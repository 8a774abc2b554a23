"""What flows show in Prefect: small tables, pictures and links.

Artifacts' keys are global to a server, so each has the root's name in it (`infra.addresses.root_name`), and its
description the whole address.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from infra.catalog import CATALOG
from infra.published import (
    REPORT,
    browser_address,
    explore_command,
    explorer_page,
    note_root,
    report_page,
)
from infra.storage import Storage
from tasks.engine.stage import Image, Shown

MOST_ROWS = 1000
"""Rows of a table at most."""


def shown_in_prefect(storage: Storage, shown: Iterable[Shown | Image]) -> None:
    """Show what a stage or a group of tables has to show."""
    for entry in shown:
        if isinstance(entry, Shown):
            rows = [dict(row) for row in entry.rows[:MOST_ROWS]]
            create_table_artifact(table=rows, **_named(storage, entry.name, entry.description))
        else:
            create_image_artifact(
                image_url=entry.url,
                key=f"{entry.name}-{storage.name}",
                description=f"{entry.description} Root: {storage.root}",
            )


def show_catalogue(storage: Storage) -> None:
    """Where the published tables are, and how to ask them."""
    question = f'functok query --root {shlex.quote(storage.root)} "SHOW TABLES"'
    create_markdown_artifact(
        markdown=f"{_code(storage.url(CATALOG))}\n\n{_code(question)}",
        **_named(storage, "catalogue", "The published tables, and how to ask them"),
    )


def show_report(storage: Storage) -> None:
    """A link to the report where the server is one of `functok up`; elsewhere its address, which no page may open."""
    try:
        link = browser_address(report_page(storage.name))
        if link is not None:
            note_root(storage)
    except Exception as error:
        # The report is written; only the way to it is not.
        get_run_logger().warning("The report cannot be linked in Prefect: %s", error)
        return
    description = "The figures and tables of the paper"
    if link is None:
        how = "A browser opens a file on its own machine; `functok up` serves the reports of its runs."
        create_markdown_artifact(
            markdown=f"{_code(storage.url(REPORT))}\n\n{how}", **_named(storage, "report", description)
        )
    else:
        text = f"Report of {storage.name}"
        # The page of a key shows its description alone.
        shown = f"[{text}]({link}): {description[0].lower()}{description[1:]}"
        create_link_artifact(link=link, link_text=text, **_named(storage, "report", shown))


def show_explorer(storage: Storage) -> None:
    """How the tables are looked at: a link where the server is one of `functok up`, and the command."""
    command = explore_command(storage.root, storage.endpoint_url)
    try:
        link = browser_address(explorer_page(storage.name))
        if link is not None:
            note_root(storage)
    except Exception as error:
        get_run_logger().warning("The explorer cannot be linked in Prefect: %s", error)
        return
    description = "The tables in your browser: tokens, features, texts, SQL"
    if link is None:
        create_markdown_artifact(markdown=_code(command), **_named(storage, "explorer", description))
    else:
        text = f"Explore {storage.name}"
        shown = f"[{text}]({link}), or `{command}`"
        create_link_artifact(link=link, link_text=text, **_named(storage, "explorer", shown))


def show_damage(storage: Storage, rows: list[dict[str, Any]], n_files: int, n_bytes: int) -> None:
    """What `functok verify` found."""
    shown = rows or [{"file": "none", "what": "everything is as it was written"}]
    description = f"{n_files:,} files, {n_bytes:,} bytes read"
    create_table_artifact(table=shown, **_named(storage, "damaged-files", description))


def _named(storage: Storage, what: str, description: str) -> dict[str, Any]:
    """The key and the description of an artifact of a root."""
    return {"key": f"{what}-{storage.name}", "description": f"{description} (root: {storage.root})"}


def _code(text: str) -> str:
    """A block of code in Markdown, whatever backticks the text has."""
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
