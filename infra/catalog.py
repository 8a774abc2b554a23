"""What is published: `catalog.json`, and beside it the table of all shards' files.

`catalog.json` is small and is replaced whole, last of all, so a reader sees the tables of one finished run. Which files
a table kept by shard has stands in the one Parquet file that it names (`Catalog.shards`), which is read when a shard is
asked for: of 100,000 shards, whoever looks at other tables reads nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, partial
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import verified
from infra.manifest import Manifest, commit, load
from infra.storage import REPAIR, Storage
from schemas.errors import DamagedError

CATALOG = "catalog.json"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard's file of a table that is kept by shard.

    Attributes:
        name: File name relative to the storage root.
        doc_offset: `doc_id` of the shard's document 0.
        source: URL of the corpus file that the shard was cut from, or the case whose prompts it is of.
        layer: Decoder block, where the table has one.
        model: Checkpoint series, where the table has one.
        step: Optimizer step of the checkpoint, where the table has one.
    """

    name: str
    doc_offset: int = 0
    source: str = ""
    layer: int | None = None
    model: str = ""
    step: int | None = None


ROWS = pa.schema(
    {
        "name": pa.string(),
        "doc_offset": pa.int64(),
        "source": pa.string(),
        "layer": pa.int32(),
        "model": pa.string(),
        "step": pa.int64(),
    }
)
"""Of the fields of `ShardFile`; the table of shards has `table` before them."""


class Shards(Sequence[ShardFile]):
    """The files of a table that is kept by shard, in corpus order, as rows that are read when one is asked for.

    Args:
        n: How many there are.
        first: Name of the first, empty where there is none; its columns are the table's.
        read: Gives the rows: the fields of `ShardFile`.
    """

    def __init__(self, n: int, first: str, read: Callable[[], pa.Table]) -> None:
        self._n, self.first, self._read = n, first, read

    @classmethod
    def of(cls, files: Iterable[ShardFile]) -> Shards:
        """Those of any files; what is of this kind already stays as it is."""
        if isinstance(files, Shards):
            return files
        given = list(files)
        return cls(len(given), given[0].name if given else "", lambda: _rows(given))

    @cached_property
    def rows(self) -> pa.Table:
        """The fields of `ShardFile`.

        Raises:
            DamagedError: if their file is not what was written.
        """
        return self._read()

    @property
    def names(self) -> list[str]:
        """The files' names; of equal content, a file stands here several times."""
        names: list[str] = self.rows["name"].to_pylist()
        return names

    def of_documents(self, documents: Collection[int], layers: Collection[int] | None = None) -> list[str]:
        """Names of the files that may hold a document, of some layers or of all."""
        if not documents:
            return []
        names, wanted = self.rows["name"], dict[str, None]()
        for layer, offsets, places in self._kinds:
            if layers is None or layer is None or layer in layers:
                for document in documents:
                    last = int(offsets.searchsorted(document, "right"))
                    # A shard without documents begins where the next one does.
                    first = int(offsets.searchsorted(offsets[last - 1])) if last else 0
                    wanted |= dict.fromkeys(names[int(place)].as_py() for place in places[first:last])
        return list(wanted)

    @cached_property
    def _kinds(self) -> list[tuple[int | None, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Of each layer, model and step: the layer, ascending first documents, and where their files stand."""
        kinds = zip(*(self.rows[name].to_pylist() for name in ("layer", "model", "step")), strict=True)
        numbers: dict[tuple[Any, ...], int] = {}
        of = np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds], np.int64)
        offsets = self.rows["doc_offset"].to_numpy()
        found = []
        for kind, number in numbers.items():
            places = np.flatnonzero(of == number)
            places = places[np.argsort(offsets[places], kind="stable")]
            found.append((kind[0], offsets[places], places))
        return found

    def first_of_layers(self) -> dict[int, str]:
        """The first file of each layer."""
        layers = self.rows["layer"].combine_chunks()
        return {
            layer: self.rows["name"][layers.index(layer).as_py()].as_py()
            for layer in layers.unique().to_pylist()
            if layer is not None
        }

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, place: int) -> ShardFile: ...

    @overload
    def __getitem__(self, place: slice) -> list[ShardFile]: ...

    def __getitem__(self, place: int | slice) -> ShardFile | list[ShardFile]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(self._n))]
        if not -self._n <= place < self._n:
            raise IndexError(place)
        return ShardFile(**self.rows.slice(place % self._n, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[ShardFile]:
        return (ShardFile(**row) for row in self.rows.to_pylist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | Shards):
            return NotImplemented
        return len(self) == len(other) and bool(self.rows.equals(Shards.of(other).rows))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Shards({self._n})"


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What is published: tables in one file each, and tables kept by shard.

    Attributes:
        tables: Table name to Parquet file name.
        sharded: Table name to its shards' files, in corpus order.
        lineage: Group of tables (`corpus`, `graph`, …) to the key that it was made with.
        about: Group of tables to keys of the model, then of the dictionaries, that it is about.
        shards: Name of the Parquet file that says which files those of `sharded` are; empty where none is written.
    """

    tables: dict[str, str] = field(default_factory=dict)
    sharded: Mapping[str, Sequence[ShardFile]] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)
    about: dict[str, list[str]] = field(default_factory=dict)
    shards: str = ""

    @property
    def files(self) -> list[str]:
        """Every Parquet file that it names; one that several tables share comes several times."""
        own = [*self.tables.values(), *[self.shards] * bool(self.shards)]
        return [*own, *(name for files in self.sharded.values() for name in Shards.of(files).names)]


def read_catalog(storage: Storage) -> Catalog:
    """What is published under this root; empty where nothing is.

    Raises:
        DamagedError: if it is not what was written.
    """
    value = storage.read_json(CATALOG)
    return Catalog() if value is None else catalog_of(storage, value)


def catalog_of(storage: Storage, value: Any) -> Catalog:
    """The catalogue that `catalog.json` holds.

    Catalogues of before the table of shards have the fields of each table's shards as columns.

    Raises:
        DamagedError: if it is none.
    """
    try:
        shards = value.get("shards", "")
        return Catalog(
            tables=dict(value["tables"]),
            sharded=_stored(storage, shards, value["sharded"])
            if shards
            else {table: _of_columns(columns) for table, columns in value["sharded"].items()},
            lineage=dict(value["lineage"]),
            about={group: list(keys) for group, keys in value.get("about", {}).items()},
            shards=shards,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{storage.url(CATALOG)} is damaged: it is no catalogue", hint=REPAIR) from error


def encoded(catalog: Catalog) -> tuple[dict[str, Any], bytes]:
    """What `catalog.json` holds, and the content of the file of shards that it names, by its content.

    Raises:
        DamagedError: if shards that are published already are not what was written.
    """
    sharded = {table: Shards.of(files) for table, files in catalog.sharded.items()}
    parts = [
        files.rows.add_column(0, "table", pa.array([table] * len(files), pa.string()))
        for table, files in sorted(sharded.items())
    ]
    sink = pa.BufferOutputStream()
    if parts:
        # Chunks, which come of how the rows were read, would show in the bytes.
        rows = pa.concat_tables(parts).combine_chunks()
        pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    folder = f"tables/shards-{hashlib.sha256(content).hexdigest()[:20]}"
    value = {
        "tables": catalog.tables,
        "sharded": {table: {"n": len(files), "first": files.first} for table, files in sharded.items()},
        "shards": f"{folder}/shards.parquet" if parts else "",
        "lineage": catalog.lineage,
        "about": catalog.about,
    }
    return value, content


def write_catalog(storage: Storage, catalog: Catalog) -> None:
    """Make a catalogue the one that readers see, once the table of its shards is there.

    Raises:
        DamagedError: if shards that are published already are not what was written.
        StorageError: if it cannot be written.
    """
    value, content = encoded(catalog)
    name = value["shards"]
    folder = name.rpartition("/")[0]
    # It may be there and damaged.
    if name and (load(storage, folder) is None or storage.read_bytes(name) != content):
        written = [storage.write_bytes(name, content)]
        commit(storage, folder, Manifest(stage="tables", inputs={"group": "shards"}), written)
    storage.write_json(CATALOG, value)


def _rows(files: Sequence[ShardFile]) -> pa.Table:
    return pa.table({c.name: [getattr(file, c.name) for file in files] for c in fields(ShardFile)}, ROWS)


def _of_columns(columns: Mapping[str, Sequence[Any]]) -> Shards:
    """The shards of a catalogue of before; a column that it lacks has its default."""
    names = columns["name"]
    defaults = {c.name: [c.default] * len(names) for c in fields(ShardFile) if c.name not in columns}
    rows = pa.table({**columns, **defaults}, ROWS)
    return Shards(len(names), names[0] if names else "", lambda: rows)


def _stored(storage: Storage, name: str, told: Mapping[str, Mapping[str, Any]]) -> dict[str, Shards]:
    @cache
    def all_rows() -> pa.Table:
        return verified.read_table(storage, name)

    def read(table: str) -> pa.Table:
        rows = all_rows()
        return rows.filter(pc.equal(rows["table"], table)).drop_columns("table").cast(ROWS)

    return {table: Shards(of["n"], of["first"], partial(read, table)) for table, of in told.items()}
