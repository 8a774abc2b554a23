"""The kinds of expectation: each is SQL that finds the rows for which it does not hold.

- `Rows`: a condition that every row of a table meets. All of a table's are counted in one scan.
- `Keys`: columns that name a row. Exact and yet one pass: rows in strictly rising order cannot repeat, so the
  order of a file's rows is tested first, and only a file that is not sorted by its key is grouped by it.
- `Query`: a SELECT of the rows that offend, for whatever spans tables.

Each sees the views of its stage (`tasks.engine.checks` makes them). Where `shard` is true it is asked of one
folder at a time, so memory is bounded by a shard and not by the corpus; the folders' shard-local documents
are disjoint, so what is unique in each is unique in all. Views of a folder carry its `folder` and the
columns of `shards` beside their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from schemas.arrow import schema_of

RESULTS = schema_of(
    stage=pa.string(),
    expectation=pa.string(),
    table=pa.string(),
    description=pa.string(),
    success=pa.bool_(),
    observed=pa.int64(),  # rows that offend
)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is common to all kinds.

    Attributes:
        name: Names it in messages, Data Docs and the `expectations` table; unique in its suite.
        table: The view whose rows it is about.
        meaning: A sentence for people.
        shard: Asked of one folder at a time.
        needs: Views that it reads besides `table`; where one is not there, the expectation does not apply.
    """

    name: str
    table: str
    meaning: str
    shard: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rows(Expectation):
    """Every row meets `must` (SQL; NULL counts as not met). `show` are the columns that name an offender."""

    must: str
    show: str


@dataclass(frozen=True, kw_only=True)
class Keys(Expectation):
    """No two rows have the same values of `columns`."""

    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Query(Expectation):
    """`offenders` (a SELECT) finds nothing."""

    offenders: str


def differ(counted: str, told: str, keys: str, *values: str) -> str:
    """Rows by which two selects differ: grouped by `keys`, the columns `values` must be equal.

    Values missing on one side come out as NULL there and offend.
    """
    columns = ", ".join(f"a.{value} AS counted_{value}, b.{value} AS told_{value}" for value in values)
    unequal = " OR ".join(f"a.{value} IS DISTINCT FROM b.{value}" for value in values)
    return f"SELECT {keys}, {columns} FROM ({counted}) AS a FULL JOIN ({told}) AS b USING ({keys}) WHERE {unequal}"
