"""Labels and notes that people give to features, kept beside a run: the table `feature_labels`.

Each is a file of its own below `labels/<key of the dictionary>/`, never replaced, so that two people who write at once
lose nothing, and what was said of a feature before stays. The last one of a feature is what it is called; an empty one
takes its label back. As they lie by dictionary, another dictionary of the layer has none of them, and this one has them
back when it returns.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa

from infra.catalog import Catalog, read_catalog
from infra.duck import connect
from infra.storage import Storage
from schemas.errors import DamagedError
from tasks.dictionaries.published import published_dictionaries
from tasks.explore.features import require_feature
from tasks.explore.vocabulary import (
    FEATURE,
    Action,
    Asked,
    Grid,
    Missing,
    Page,
    PageAt,
    Query,
    Refused,
    address,
)
from tasks.report.vocabulary import Column

FOLDER = "labels"
LONGEST_LABEL, LONGEST_NOTE = 200, 10_000
LISTED_EVERY = 2.0
"""Seconds for which labels are not listed again: a page names features at several places, and S3 is asked each time."""
_AT_ONCE = 16

COLUMNS = {
    "layer": "INTEGER",
    "feature_id": "INTEGER",
    "label": "VARCHAR",
    "note": "VARCHAR",
    "written": "TIMESTAMP",
}
"""Of the table `feature_labels`: one row a feature that has a label or a note; `written` is in UTC."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What somebody said of a feature.

    Attributes:
        feature_id: The feature, of one dictionary.
        label: A few words; may be empty.
        note: As much as there is to say.
        written: When, as ISO 8601 in UTC.
    """

    feature_id: int
    label: str
    note: str
    written: str


def write_label(storage: Storage, dictionary: str, feature_id: int, label: str, note: str) -> Label:
    """Keep a label and a note of a feature; both empty take back what was there.

    Args:
        storage: The run's.
        dictionary: Key of the dictionary.
        feature_id: The feature.
        label: At most `LONGEST_LABEL` characters.
        note: At most `LONGEST_NOTE` characters.

    Raises:
        Refused: if one is too long.
        StorageError: if it cannot be written.
    """
    label, note = " ".join(label.split()), note.replace("\r\n", "\n").strip()
    for text, most, what in ((label, LONGEST_LABEL, "label"), (note, LONGEST_NOTE, "note")):
        if len(text) > most:
            raise Refused(f"the {what} has {len(text):,} characters", hint=f"{most:,} are kept at most")
    now = datetime.now(UTC)
    kept = Label(
        feature_id=feature_id, label=label, note=note, written=now.isoformat(timespec="microseconds")
    )
    name = f"{FOLDER}/{dictionary}/{feature_id}-{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.json"
    storage.write_json(name, vars(kept))
    with _listing:
        _listed.pop(storage, None)
    return kept


def labels_of(storage: Storage, dictionary: str, feature_id: int | None = None) -> list[Label]:
    """What was ever said of a dictionary's features, or of one of them, the last first.

    A file that is not what was written is left out: a label is no result, and the others are still wanted.
    """
    start = f"{FOLDER}/{dictionary}/" + ("" if feature_id is None else f"{feature_id}-")
    names = [name for name in _files(storage) if name.startswith(start)]
    return _last_first(_read(storage, names).values())


def feature_labels(storage: Storage, dictionaries: Mapping[int, str]) -> list[dict[str, Any]]:
    """The rows of `feature_labels`: the last label of each feature, where it was not taken back."""
    rows: list[dict[str, Any]] = []
    found = _read(storage, _files(storage))
    for layer, dictionary in dictionaries.items():
        last: dict[int, Label] = {}
        start = f"{FOLDER}/{dictionary}/"
        for label in _last_first(label for name, label in found.items() if name.startswith(start)):
            last.setdefault(label.feature_id, label)
        for feature_id, label in sorted(last.items()):
            if label.label or label.note:
                written = datetime.fromisoformat(label.written).replace(tzinfo=None)
                rows.append({"layer": layer, **vars(label), "feature_id": feature_id, "written": written})
    return rows


def add_feature_labels(connection: Any, storage: Storage, catalog: Catalog) -> None:
    """Give a connection the view `feature_labels`, which reads what is there (`LISTED_EVERY`) whenever it is asked.

    Nothing is done where no features are published. A connection that has it already gets it anew.
    """
    if not catalog.sharded.get("activations"):
        return

    def rows() -> Sequence[dict[str, Any]]:
        return feature_labels(storage, published_dictionaries(storage, catalog))

    function = "rows_of_feature_labels"
    with suppress(duckdb.Error):
        connection.remove_function(function)
    kind = ", ".join(f"{name} {type_}" for name, type_ in COLUMNS.items())
    connection.create_function(function, rows, [], f"STRUCT({kind})[]", side_effects=True)
    connection.execute(
        f"CREATE OR REPLACE VIEW feature_labels AS SELECT unnest({function}(), recursive := true)"
    )


def connect_labelled(storage: Storage) -> Any:
    """A connection to the published tables (`infra.duck.connect`), and to `feature_labels` where there are any."""
    connection = connect(storage)
    if storage.sizes(FOLDER):
        add_feature_labels(connection, storage, read_catalog(storage))
    return connection


def labels_table(storage: Storage) -> dict[str, pa.Table]:
    """The table `feature_labels` by its name, as values; nothing where there are no labels."""
    if not storage.sizes(FOLDER):
        return {}
    with connect_labelled(storage) as connection:
        return {"feature_labels": connection.sql("SELECT * FROM feature_labels").to_arrow_table()}


def dictionary_of(asked: Asked, layer: int) -> str | None:
    """Key of a layer's dictionary; None where it is not known."""
    storage, catalog = asked.context.get("storage"), asked.context.get("catalog")
    if storage is None or catalog is None:
        return None
    return published_dictionaries(storage, catalog).get(layer)


def _label(asked: Asked) -> str:
    layer, feature_id = asked.part("layer"), asked.part("feature_id")
    dictionary = dictionary_of(asked, layer)
    if dictionary is None:
        raise Refused(
            f"layer {layer} has no dictionary here, so there is nothing to label",
            hint="labels are kept by dictionary: run the stages `dictionaries` and `features`",
        )
    require_feature(asked, layer, feature_id)
    text, note = asked.values.get("label", ""), asked.values.get("note", "")
    write_label(asked.context["storage"], dictionary, feature_id, text, note)
    return address("feature", layer, feature_id)


def labels(asked: Asked) -> Page:
    """All labels of the dictionaries of this run."""
    query = Query(
        sql="SELECT * REPLACE (strftime(written, '%Y-%m-%d %H:%M:%S') AS written) FROM feature_labels "
        "ORDER BY written DESC, layer, feature_id"
    )
    return Page(
        title="Labels",
        lead="What people call features here: the table feature_labels.",
        panels=[
            Grid(
                key="labels",
                caption="Labels",
                query=query,
                columns=[
                    Column("layer", "plain"),
                    FEATURE,
                    Column("label"),
                    Column("note"),
                    Column("written", "text", "written, UTC"),
                ],
                order="-written",
                filters=["layer", "feature_id", "label", "note"],
                empty="Nobody has labelled a feature yet: each feature’s page has a form for it.",
            )
            if asked.has("feature_labels")
            else Missing(what="There are no features to label: this run has counted tokens only.")
        ],
        trail=[("Features", "/features")],
    )


PAGES = (PageAt(path="/labels", title="Labels", build=labels),)

LABEL = Action(path="/label/{layer}/{feature_id}", act=_label)


_known: dict[tuple[Storage, str], Label | None] = {}
"""Labels that were read, by file: none is ever replaced."""


_listed: dict[Storage, tuple[float, list[str]]] = {}
"""The files of labels of a root, and when they were listed."""

_listing = threading.Lock()
"""Held while labels are listed, so that one written meanwhile is in the next listing."""


def _files(storage: Storage) -> list[str]:
    """All labels of a root, as known for at most `LISTED_EVERY` seconds; those of this process at once."""
    with _listing:
        listed_at, names = _listed.get(storage, (float("-inf"), []))
        if time.monotonic() - listed_at >= LISTED_EVERY:
            names = list(storage.sizes(FOLDER))
            _listed[storage] = time.monotonic(), names
        return names


def _read(storage: Storage, names: Sequence[str]) -> dict[str, Label]:
    """Labels by their files, those that are what was written."""

    def read(name: str) -> None:
        try:
            _known[storage, name] = Label(**storage.read_json(name))
        except (DamagedError, TypeError):
            _known[storage, name] = None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(read, [name for name in names if (storage, name) not in _known]))
    return {name: label for name in names if (label := _known[storage, name]) is not None}


def _last_first(labels: Iterable[Label]) -> list[Label]:
    return sorted(labels, key=lambda label: (label.written, label.label, label.note), reverse=True)
