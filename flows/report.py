"""Stage 11: the report, from the published tables alone."""

from __future__ import annotations

from flows.artifacts import show_report
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from infra.duck import CATALOG
from infra.storage import Storage
from schemas.config import Config


@stage_flow("report", "report on {title}")
def report(config: Config) -> None:
    """Write `report.html`: the paper's figures and tables in one file.

    Args:
        config: The whole configuration; `storage` and `duckdb` matter here.
    """
    storage = open_storage(config)
    needed(published(config, storage), "tables", storage)
    write_report(config, storage)
    show_report(storage)


@step("report", "write")
def write_report(config: Config, storage: Storage) -> str:
    """Draw the figures and write the file; its URL."""
    from tasks.report import report

    with reported_progress("report") as progress:
        return report.write_report(storage, config.duckdb, progress)


@step("report", "look for tables")
def published(config: Config, storage: Storage) -> str | None:
    """The address of the published catalogue; None if there is none."""
    return storage.url(CATALOG) if storage.exists(CATALOG) else None
