"""What one room of the house (`schemas.corpus`, `schemas.graph`, an experiment, …) adds to what all of them share.

The spine's rooms and the experiments say it alike, in one value `ROOM` each; `schemas.experiments` knows the list of
them, and `schemas.config`, `schemas.tables`, `schemas.expectations` and `schemas.work` put their shares together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from schemas.expectation import Expectation


@dataclass(frozen=True, kw_only=True)
class Room:
    """One room's share of the configuration, stages, files, tables and expectations.

    Attributes:
        name: Its own, and of its folders.
        sections: An experiment's sections of the configuration: key to type and pydantic field. The experiment is asked
            for where one of them that is optional is there.
        stages: Names of its stages, in their order.
        shard_files: File to the schema of what a stage writes into a folder.
        group: Group of published tables that its own are in (`Catalog.lineage` has the group's key).
        tables: Published table to its schema.
        required: Those that are there wherever the group is.
        together: Tables of which all are there where one is.
        left_in_place: Tables of a row an occurrence or more, too large to be copied into a database.
        sharded: View over a shard's file each to its columns, from the file's `f` and the shard's `s`.
        suites: Stage to what must hold when it is done.
        table_expectations: What must hold of its tables before they are published.
        grouped: Table that is a file a shard to the views that expectations ask of it and what each is grouped by.
        totals: What the views of such a table have besides.
    """

    name: str
    sections: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    shard_files: Mapping[str, pa.Schema] = field(default_factory=dict)
    group: str
    tables: Mapping[str, pa.Schema]
    required: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    left_in_place: tuple[str, ...] = ()
    sharded: Mapping[str, str] = field(default_factory=dict)
    suites: Mapping[str, tuple[Expectation, ...]] = field(default_factory=dict)
    table_expectations: tuple[Expectation, ...] = ()
    grouped: Mapping[str, dict[str, str]] = field(default_factory=dict)
    totals: Mapping[str, str] = field(default_factory=dict)
