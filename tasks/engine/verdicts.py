"""What the checks found, kept: `validation/<stage>.json` is a stage's last check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from infra.manifest import content_key
from infra.storage import Storage
from schemas.errors import DamagedError, ExpectationError
from schemas.expectation import RESULTS
from schemas.expectations import SUITES
from schemas.work import STAGES, Stage
from tasks.engine.data_docs import DATA_DOCS, Finding, judge, rows_text

VERSION = 1


def expectations_table(storage: Storage) -> pa.Table:
    """What every stage's last check found: the table `expectations`."""
    rows = [
        {"stage": stage, **{name: result[name] for name in RESULTS.names if name != "stage"}}
        for stage in STAGES
        for result in (storage.read_json(record_name(stage)) or {"results": []})["results"]
    ]
    return pa.Table.from_pylist(rows, schema=RESULTS)


def conclude(storage: Storage, stage: Stage, key: str, findings: Sequence[Finding]) -> None:
    """Judge what was found, record it as the stage's last check, and show it in Data Docs.

    Raises:
        ExpectationError: if an expectation is not met, naming it, its table and some of the rows.
        StorageError: if the record cannot be written.
    """
    met = judge(storage, stage, findings)
    failed = [finding for finding in findings if not met[finding.expectation.name]]
    results = [
        {
            "expectation": finding.expectation.name,
            "table": finding.expectation.table,
            "description": finding.expectation.meaning,
            "success": met[finding.expectation.name],
            "observed": finding.count,
            "rows": json.loads(json.dumps(finding.rows, default=str)),
        }
        for finding in findings
    ]
    # Last, so that a check that was killed is made again.
    storage.write_json(
        record_name(stage), {"stage": stage, "key": key, "success": not failed, "results": results}
    )
    if failed:
        raise ExpectationError(
            "; and ".join(
                f"the expectation {finding.expectation.name!r} on the table {finding.expectation.table} is not met by "
                f"{finding.count} row{'s'[: finding.count != 1]}, among them {rows_text(finding.rows)}"
                for finding in failed
            ),
            stage=stage,
            hint=f"nothing was published; see {storage.url(DATA_DOCS)}/index.html; delete the folders and run again",
        )


def check_key(stage: Stage, **of: Any) -> str:
    """The key of a check: what is asked, and of what."""
    return content_key(version=VERSION, suite=[repr(entry) for entry in SUITES[stage]], **of)


def passed(storage: Storage, stage: Stage, key: str) -> bool:
    """Whether the stage's last check had this key and was passed; a record that is damaged says nothing."""
    try:
        record = storage.read_json(record_name(stage))
    except DamagedError:
        return False
    return record is not None and bool(record["success"]) and record["key"] == key


def record_name(stage: str) -> str:
    """The file that records a stage's last check."""
    return f"validation/{stage}.json"
