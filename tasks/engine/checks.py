"""The checks at every stage boundary: ask, judge, record, show, and fail naming the rows.

A check is keyed by what it is asked (the suite) and of what (folders named by content): one that was passed is
not made again, so a run with nothing to do imports nothing and reads one small file. All folders of a stage
are checked together and not each when it is made, because what must agree spans them; what is asked of a folder alone
may be asked as it is made (`ask_of_made`), and the answer stands in its manifest. `validation/<stage>.json` is a
stage's last check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from infra.catalog import Catalog, encoded
from infra.duck import create_views, open_duckdb
from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Config, DuckDb
from schemas.errors import DamagedError, ExpectationError
from schemas.expectation import RESULTS, Expectation, Query
from schemas.expectations import GROUPED, SUITES, TOTALS
from schemas.tables import LEFT_IN_PLACE, TABLES, TOGETHER
from schemas.work import STAGES
from tasks.engine.data_docs import DATA_DOCS, Finding, judge, rows_text
from tasks.engine.offenders import SHOWN, Answer, Views, applying, find_in_units, find_in_views, merged
from tasks.engine.run import Run
from tasks.engine.stage import Question, Stage

VERSION = 1
ASKED = "asked"
"""Where a manifest's stats keep what was asked of the folder as it was made, and what was found."""


def check(run: Run, stage: Stage[Any, Any]) -> None:
    """Hold what a finished stage made against its expectations.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
    """
    question, storage = stage.question(run, run.result(stage)), run.storage
    if question is None:
        return
    assert question.folders is not None or not _within(stage.name), (
        f"the suite of {stage.name} asks a folder at a time (shard=True), but the stage's question has no folders"
    )
    rows = {name: table.to_pylist() for name, table in question.small.items()}
    key = _check_key(stage.name, **{**rows, **question.of})
    if _passed(storage, stage.name, key):
        return
    with open_duckdb(storage, run.config.duckdb) as connection:
        views = {**question.small, **question.views()}
        for name, table in views.items():
            put(connection, name, table)
        names = {*views, *question.put(connection)}
        findings = (
            find_in_views(connection, SUITES[stage.name], names, storage.url(stage.name))
            if question.folders is None
            else _check_folders(connection, storage, stage.name, question, names)
        )
    _conclude(storage, stage.name, key, findings)


def ask_of_made(
    storage: Storage,
    stage: str,
    views: Views,
    totals: Mapping[str, Mapping[str, str]],
    relations: Mapping[str, pa.Table] | None = None,
    resources: DuckDb | None = None,
) -> dict[str, Any]:
    """Ask what a stage expects of one folder, of the rows that are about to be written into it.

    Args:
        storage: Where the folder will be.
        stage: Whose suite is asked.
        views: The folder, with its rows.
        totals: View to {column: SQL aggregate}, as `Question` takes them.
        relations: Tables that the suite needs besides.
        resources: Limits of DuckDB, which gets one thread of them: other folders are made meanwhile.

    Returns:
        `{ASKED: …}`, for the manifest's stats: `check` takes the answers from there, as long as the same is asked.
    """
    within = _within(stage)
    limits = (resources or DuckDb()).model_copy(update={"threads": 1})
    with open_duckdb(storage, limits) as connection:
        for name, table in (relations or {}).items():
            put(connection, name, table)
        names = set(relations or {})
        ((findings, found),) = find_in_units(connection, storage, within, [views], totals, names, threads=1)
    told = {
        # In pairs, as a manifest sorts the keys of what it holds.
        finding.expectation.name: [finding.count, [_plain(list(row.items())) for row in finding.rows]]
        for finding in findings
        if finding.count
    }
    return {ASKED: {"key": _asked_key(stage, totals), "found": told, "totals": found}}


def check_tables(
    config: Config, storage: Storage, catalog: Catalog, beside: Mapping[str, pa.Table] | None = None
) -> None:
    """Check a candidate catalogue: every table against the contract and against the others.

    Expectations on tables that it does not have (a graph, occurrences) do not apply; a table that its groups
    (`Catalog.lineage`) should have does. They also read the small tables `beside`: what groups were made with.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
    """
    settings = pa.table(
        {
            "function_share": pa.array([config.function_tokens.share], pa.float64()),
            "rarefaction_m": pa.array([config.graph.rarefaction_m], pa.int64()),
        }
    )
    given = {"settings": settings, **(beside or {})}
    # Results of checks are published with the tables, and are not what is checked.
    tables = {name: file for name, file in catalog.tables.items() if name != "expectations"}
    checked = replace(catalog, tables=tables)
    rows = {name: table.to_pylist() for name, table in given.items()}
    key = _check_key("tables", catalog=encoded(checked)[0], **rows)
    if _passed(storage, "tables", key):
        return
    views = {*checked.tables, *checked.sharded}
    with open_duckdb(storage, config.duckdb) as connection:
        create_views(connection, storage, checked)
        for name, table in given.items():
            put(connection, name, table)
        columns = _check_columns(connection, checked, views)
        findings = [columns]
        if columns.count == 0:
            # Asked about often; a query of a view opens its file again, which S3 answers slowly.
            for name in views.difference(LEFT_IN_PLACE):
                connection.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM main.{name}")
            asked = views | set(given)
            for name in views.intersection(GROUPED):
                asked |= group_once(connection, name)
            findings += find_in_views(connection, SUITES["tables"], asked, storage.root)
    _conclude(storage, "tables", key, findings)


def group_once(connection: Any, table: str) -> set[str]:
    """Make the grouped tables of one that is a file a shard, of one scan; their names."""
    groups = GROUPED[table]
    sets = ", ".join(f"({columns})" for columns in groups.values())
    keys = sorted({column for columns in groups.values() for column in columns.split(", ")})
    places = ", ".join(f"grouping({column}) AS without_{column}" for column in keys)
    connection.execute(
        f"CREATE TEMP TABLE _grouped AS SELECT {', '.join(keys)}, {places}, {TOTALS[table]} FROM {table} "
        f"GROUP BY GROUPING SETS ({sets})"
    )
    for name, columns in groups.items():
        kept = columns.split(", ")
        within = " AND ".join(f"without_{column} = {int(column not in kept)}" for column in keys)
        others = ", ".join([*(set(keys) - set(kept)), *(f"without_{column}" for column in keys)])
        connection.execute(
            f"CREATE TEMP TABLE {name} AS SELECT * EXCLUDE ({others}) FROM _grouped WHERE {within}"
        )
    connection.execute("DROP TABLE _grouped")
    return set(groups)


def expectations_table(storage: Storage) -> pa.Table:
    """What every stage's last check found: the table `expectations`."""
    rows = [
        {"stage": stage, **{name: result[name] for name in RESULTS.names if name != "stage"}}
        for stage in STAGES
        for result in (storage.read_json(record_name(stage)) or {"results": []})["results"]
    ]
    return pa.Table.from_pylist(rows, schema=RESULTS)


def record_name(stage: str) -> str:
    """The file that records a stage's last check."""
    return f"validation/{stage}.json"


def put(connection: Any, name: str, table: pa.Table) -> None:
    """Make a table of a connection."""
    # A registered table is seen from its connection alone, a real one from the folders' cursors too.
    connection.register("_put", table)
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _put")
    connection.unregister("_put")


def _check_folders(
    connection: Any, storage: Storage, stage: str, question: Question, views: set[str]
) -> list[Finding]:
    """Ask each folder once (files of equal content share one), then all of them together as `shards`.

    A folder of which the same was asked when it was made is not read again: its manifest has the answers.
    """
    assert question.folders is not None
    suite, within, key = SUITES[stage], _within(stage), _asked_key(stage, question.totals)
    folders, manifests = question.folders(), question.manifests()
    answers: dict[str, Answer] = {}
    for folder in folders:
        told = manifests[folder].stats.get(ASKED) if folder in manifests else None
        if told is not None and told["key"] == key:
            answers[folder] = _answer(within, views | set(folders[folder].files), told)
    left = {folder: own for folder, own in folders.items() if folder not in answers}
    if left:
        asked = find_in_units(connection, storage, within, list(left.values()), question.totals, views)
        answers |= zip(left, asked, strict=True)
    findings = merged(within, [answers[folder][0] for folder in folders])
    shards = [{**row, **answers[row["folder"]][1]} for row in question.rows()]
    put(connection, "shards", pa.Table.from_pylist(shards))
    across = [entry for entry in suite if not entry.shard]
    findings += find_in_views(connection, across, views | {"shards"}, storage.root)
    order = {entry.name: place for place, entry in enumerate(suite)}
    return sorted(findings, key=lambda finding: order[finding.expectation.name])


def _conclude(storage: Storage, stage: str, key: str, findings: Sequence[Finding]) -> None:
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
            "rows": _plain(finding.rows),
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


def _check_key(stage: str, **of: Any) -> str:
    """The key of a check: what is asked, and of what."""
    return content_key(version=VERSION, suite=[repr(entry) for entry in SUITES[stage]], **of)


def _passed(storage: Storage, stage: str, key: str) -> bool:
    """Whether the stage's last check had this key and was passed; a record that is damaged says nothing."""
    try:
        record = storage.read_json(record_name(stage))
    except DamagedError:
        return False
    return record is not None and bool(record["success"]) and record["key"] == key


_COLUMNS = Query(
    name="tables have their columns",
    table="catalogue",
    meaning="Every table of the catalogue's groups is there, with the contract's columns and types.",
    offenders="",
)


def _check_columns(connection: Any, catalog: Catalog, views: set[str]) -> Finding:
    """Find the tables and columns that are missing, or of another type: asked first, as all else is asked in them."""
    tables = set(views)
    for group, together in TOGETHER:
        # Where one of a line is there, or its group is published, all are.
        tables |= set(together) if views.intersection(together) or group in catalog.lineage else set()
    offenders = []
    for table in sorted(tables & set(TABLES)):
        described = connection.execute(f"DESCRIBE {table}").fetchall() if table in views else []
        found = {row[0]: str(row[1]) for row in described}
        for column in TABLES[table]:
            kind = _DUCKDB_TYPES[column.type]
            if found.get(column.name) != kind:
                offenders.append(
                    {"table": table, "column": column.name, "type": kind, "found": found.get(column.name)}
                )
    return Finding(expectation=_COLUMNS, count=len(offenders), rows=tuple(offenders[:SHOWN]))


_DUCKDB_TYPES = {
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.string(): "VARCHAR",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.list_(pa.int32()): "INTEGER[]",
}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _within(stage: str) -> list[Expectation]:
    return [entry for entry in SUITES[stage] if entry.shard]


def _asked_key(stage: str, totals: Mapping[str, Mapping[str, str]]) -> str:
    return content_key(asked=[repr(entry) for entry in _within(stage)], totals=totals)


def _answer(within: Sequence[Expectation], there: set[str], told: Mapping[str, Any]) -> Answer:
    findings = []
    for entry in applying(within, there):
        count, rows = told["found"].get(entry.name, (0, ()))
        findings.append(Finding(expectation=entry, count=count, rows=tuple(map(dict, rows))))
    return findings, dict(told["totals"])
