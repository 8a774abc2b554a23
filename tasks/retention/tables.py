"""The tables of retention (PAPER 2): sums over sequences, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from infra import verified
from infra.catalog import Catalog, ShardFile
from infra.duck import create_views, open_duckdb
from infra.progress import Progress, one_by_one, silent
from infra.storage import StoredFile
from schemas.config import Config
from schemas.retention.section import FULL, retention_of
from schemas.tables import TABLES
from tasks.corpus.tables import corpus_group
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Image, Shown
from tasks.engine.tables import VERSION, TableGroup, Tables, ensure_folder, explained, write_table
from tasks.retention.gates import GATES, file_of
from tasks.retention.intervals import (
    layer_intervals,
    loss_intervals,
    prediction_intervals,
    survival_intervals,
)
from tasks.retention.measures import FILES
from tasks.retention.readings import READINGS, reading_rows
from tasks.retention.retrieval import RETRIEVAL
from tasks.retention.retrieval import file_of as answers_of
from tasks.retention.speed import SPEEDS

_SQL_TABLES = (
    "retention_speed",
    "retention",
    "retention_layers",
    "retention_survival",
    "retention_curves",
    "retention_losses",
    "retention_margins",
    "retention_readings",
    "retention_retrieval",
)
"""In the order in which they are made: speeds are columns of `retention`."""

_READINGS = pa.schema(
    [
        ("folder", pa.string()),
        ("sequence", pa.int64()),
        ("policy", pa.string()),
        ("budget", pa.float64()),
        ("protocol", pa.string()),
        ("length", pa.int64()),
        ("place", pa.int64()),
    ]
)

_TURNS = pa.schema(
    [
        *(TABLES["retention_speed"].field(name) for name in ("policy", "budget", "length", "tokens")),
        ("seconds", pa.float64()),
        ("full_seconds", pa.float64()),
        *(
            TABLES["retention_speed"].field(name)
            for name in ("kv_bytes", "full_kv_bytes", "device", "threads", "load")
        ),
    ]
)

_SPEEDS = pa.schema(
    [
        TABLES["retention_speed"].field(name)
        for name in (
            *("policy", "budget", "length"),
            *("tokens_per_second", "full_tokens_per_second", "speed_ratio"),
        )
    ]
)


class RetentionTables(TableGroup):
    """The tables of a run's readings; those of speed and of a gate where there is one."""

    name = "retention"
    needs = (TOKENIZE, GATES, READINGS, SPEEDS, RETRIEVAL)

    def applies(self, config: Config) -> bool:
        """Where the section is there."""
        return READINGS.applies(config)

    def subject(self, config: Config) -> str:
        """The policies."""
        return READINGS.subject(config)

    def planned(self, run: Run) -> Tables:
        """The group as it would be published."""
        readings, speeds, gate = run.result(READINGS), run.result(SPEEDS), run.result(GATES)
        rows, answers = reading_rows(readings), run.result(RETRIEVAL)
        asked = list(dict.fromkeys(answer.folder for answer in answers))
        parts: dict[str, Any] = {
            "group": self.name,
            "version": VERSION,
            "corpus": corpus_group(run.config, run.result(TOKENIZE)).key,
            "readings": rows,
            "speeds": [[speed.policy, speed.budget, speed.length, speed.folder] for speed in speeds],
            "gate": gate,
            "answers": asked,
            "resamples": retention_of(run.config).resamples,
        }
        folders = list(dict.fromkeys(row["folder"] for row in rows))
        inputs = {
            f"shard_{file}": [ShardFile(name=f"{folder}/{file}.parquet", source=folder) for folder in folders]
            for file in FILES
        }
        if answers:
            inputs["shard_retrieval_answers"] = [
                ShardFile(name=answers_of(folder), source=folder) for folder in asked
            ]
        left_out = {
            *(() if speeds else ("retention_speed",)),
            *(() if answers else ("retention_retrieval",)),
        }
        wanted = [table for table in _SQL_TABLES if table not in left_out]
        if gate is not None:
            wanted.append("retention_gates")
        return Tables.of(self.name, parts, wanted, inputs=Catalog(sharded=inputs))

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing of its tables.

        Raises:
            ConfigError: if DuckDB cannot work within its limits.
            StorageError: if a file cannot be read or written.
        """
        group = self.planned(run)
        total = len(group.tables)
        advance = one_by_one(progress, total)

        def make() -> Iterator[StoredFile]:
            made = run.result(READINGS)
            rows = reading_rows(made)
            readings = pa.Table.from_pylist(
                [row | {"place": place} for place, row in enumerate(rows)], schema=_READINGS
            )
            turns = _turns(run)
            relations = {
                "readings": readings,
                "decode_turns": turns,
                "speeds": _SPEEDS.empty_table(),
            }
            for table, name in group.tables.items():
                if table == "retention_gates":
                    folder = run.result(GATES)
                    assert folder is not None
                    yield run.storage.write_parquet(name, verified.read_table(run.storage, file_of(folder)))
                else:
                    intervals = _intervals(run, group, readings, table)
                    given = relations if intervals is None else {**relations, "intervals": intervals}
                    inputs = Catalog() if table == "retention_speed" else group.inputs
                    yield write_table(run.config.duckdb, run.storage, table, name, inputs, given)
                if table == "retention_speed":
                    relations["speeds"] = _speeds(run, name)
                advance(table.replace("_", " "))

        progress(0, total, "retention tables")
        ensure_folder(run.storage, list(group.tables.values()), group.key_parts, make)
        progress(total, total, "retention tables")
        return group

    def shown(self, connection: Any, config: Config) -> Iterable[Shown | Image]:
        """What each policy costs at each budget."""
        found = connection.execute(
            "SELECT policy, budget, protocol, length, kv_bytes_share, perplexity, perplexity_ratio, kl, "
            "top1_agreement, n_documents FROM retention ORDER BY length, protocol, budget, perplexity_ratio"
        )
        names = [column[0] for column in found.description]
        yield Shown(
            name="retention",
            description="What forgetting costs: perplexity against the full cache's, by policy and bytes",
            rows=[dict(zip(names, row, strict=True)) for row in found.fetchall()],
        )


RETENTION_GROUP = RetentionTables()


def _intervals(run: Run, group: Tables, readings: pa.Table, table: str) -> pa.Table | None:
    resamples = retention_of(run.config).resamples
    make = {
        "retention": lambda connection: prediction_intervals(connection, resamples),
        "retention_layers": lambda connection: layer_intervals(connection, resamples),
        "retention_curves": lambda connection: survival_intervals(connection, resamples),
        "retention_losses": lambda connection: loss_intervals(
            connection, resamples, "bucket", "position_from", "position_to"
        ),
        "retention_margins": lambda connection: pa.concat_tables(
            [
                loss_intervals(connection, resamples, "bucket"),
                loss_intervals(connection, resamples, "position_from", "position_to"),
            ]
        ),
    }.get(table)
    if make is None:
        return None
    config = run.config.duckdb
    with (
        open_duckdb(run.storage, config) as connection,
        explained(f"the table {table}", config, run.storage),
    ):
        create_views(connection, run.storage, group.inputs)
        connection.register("readings", readings)
        return make(connection)


def _turns(run: Run) -> pa.Table:
    """All turns that were timed, with what they are of."""
    rows = []
    for speed in run.result(SPEEDS):
        table = verified.read_table(run.storage, f"{speed.folder}/decode_turns.parquet")
        own = {name: getattr(speed, name) for name in _TURNS.names if hasattr(speed, name)}
        rows += [{**own, **row} for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=_TURNS)


def _speeds(run: Run, name: str) -> pa.Table:
    """The speeds, and what the full cache's was beside them: the median of the policies' turns."""
    rows = verified.read_table(run.storage, name).select(_SPEEDS.names).to_pylist()
    for length in sorted({row["length"] for row in rows}):
        full = sorted(row["full_tokens_per_second"] for row in rows if row["length"] == length)
        middle = full[len(full) // 2]
        rows.append(
            {
                "policy": FULL,
                "budget": 1.0,
                "length": length,
                "tokens_per_second": middle,
                "full_tokens_per_second": middle,
                "speed_ratio": 1.0,
            }
        )
    return pa.Table.from_pylist(rows, schema=_SPEEDS)
