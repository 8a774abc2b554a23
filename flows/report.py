"""The report, from the published tables alone."""

from __future__ import annotations

from flows.artifacts import show_report
from flows.stage import open_storage, reported_progress, stage_flow, step
from infra.catalog import CATALOG
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import not_finished
from tasks import stages


@stage_flow("report", "report on {title}")
def report(config: Config) -> None:
    """Write `report.html`: the paper's figures and tables in one file.

    Args:
        config: The whole configuration; `storage` and `duckdb` matter here.
    """
    storage = open_storage(config)
    if not storage.exists(CATALOG):
        raise not_finished("tables", storage.root)
    write(config, storage)
    show_report(storage)


@step("report", "write")
def write(config: Config, storage: Storage) -> str:
    """Draw the figures and write the file; its URL."""
    with reported_progress("report", config) as progress:
        return stages.write_report(storage, config, progress)
