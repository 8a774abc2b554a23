"""What must hold at every stage boundary (`schemas.expectation` has the kinds), put together from what each room asks.

To add an expectation, add a line to a suite in `schemas.<room>`: the stage will ask it, record it, show it in Data Docs
and in the `expectations` table, and fail where it is not met, naming the rows.

The modules of the suites say which views they are asked of. Those of `tables` are the tables of the catalogue, and
`settings` (the configuration's numbers that tables depend on), and `made_with` (those that a group's own key keeps).
"""

from __future__ import annotations

from schemas.expectation import Expectation
from schemas.experiments import all_rooms

SUITES: dict[str, tuple[Expectation, ...]] = {
    **{stage: suite for room in all_rooms() for stage, suite in room.suites.items()},
    "tables": tuple(entry for room in all_rooms() for entry in room.table_expectations),
}

GROUPED: dict[str, dict[str, str]] = {
    table: views for room in all_rooms() for table, views in room.grouped.items()
}
"""Tables that are a file a shard: the views that expectations ask of them, and what each is grouped by.

They are made of one scan of the table, as each scan opens every shard's file.
"""

TOTALS: dict[str, str] = {table: totals for room in all_rooms() for table, totals in room.totals.items()}
"""What each of these views has besides its groups."""
