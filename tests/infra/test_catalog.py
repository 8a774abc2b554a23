"""The table of shards says what a list of them says, and is read only where a shard is asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.catalog import CATALOG, Catalog, ShardFile, Shards, catalog_of, read_catalog, write_catalog
from infra.duck import connect, create_views, open_duckdb, telling_damage
from infra.manifest import Manifest, commit
from infra.storage import Storage
from schemas.errors import DamagedError
from schemas.tables import SHARD_FILES

Kind = tuple[int | None, str, int | None]
"""Layer, model and step of a shard."""

kinds: st.SearchStrategy[Kind] = st.tuples(
    st.sampled_from([None, 0, 7]), st.sampled_from(["", "small"]), st.sampled_from([None, 10, 20])
)


@st.composite
def shard_lists(draw: st.DrawFn) -> list[ShardFile]:
    """Shards of some kinds, each kind's in corpus order; some without documents, some of equal content."""
    files = []
    for layer, model, step in draw(st.lists(kinds, unique=True, max_size=4)):
        offset = 0
        for n_documents in draw(st.lists(st.integers(0, 3), max_size=6)):
            name = f"features/{draw(st.integers(0, 9))}-{layer}/activations.parquet"
            files.append(
                ShardFile(name=name, doc_offset=offset, source="ü.jsonl", layer=layer, model=model, step=step)
            )
            offset += n_documents
    return files


def names_in(files: list[ShardFile], documents: list[int], layers: list[int] | None) -> set[str]:
    """The obvious way: of each kind, the last shards that begin at or before a document."""
    found = set()
    for document in documents:
        for file in files:
            kind = [other for other in files if _kind(other) == _kind(file)]
            begun = [other.doc_offset for other in kind if other.doc_offset <= document]
            is_layer = layers is None or file.layer is None or file.layer in layers
            if is_layer and begun and file.doc_offset == max(begun):
                found.add(file.name)
    return found


def _kind(file: ShardFile) -> Kind:
    return file.layer, file.model, file.step


def stored(place: Path, **sharded: list[ShardFile]) -> Catalog:
    """The catalogue of some shards, written and read."""
    write_catalog(Storage(str(place)), Catalog(sharded=sharded))
    return read_catalog(Storage(str(place)))


@settings(max_examples=30)
@given(
    files=shard_lists(),
    others=shard_lists(),
    documents=st.lists(st.integers(-1, 20), max_size=3),
    layers=st.none() | st.lists(st.sampled_from([0, 7, 9]), max_size=2),
)
def test_a_stored_list_of_shards_is_the_list(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[ShardFile],
    others: list[ShardFile],
    documents: list[int],
    layers: list[int] | None,
) -> None:
    catalog = stored(tmp_path_factory.mktemp("root"), activations=files, documents=others)
    for found, expected in (
        (catalog.sharded["activations"], files),
        (catalog.sharded["documents"], others),
    ):
        assert (found, list(found), len(found)) == (expected, expected, len(expected))
        assert found[-2:] == expected[-2:]
        assert [found[n] for n in range(len(expected))] == expected
        shards = Shards.of(found)
        assert shards.names == [file.name for file in expected]
        assert set(shards.of_documents(documents, layers)) == names_in(expected, documents, layers)
        assert shards.first_of_layers() == {
            file.layer: file.name for file in reversed(expected) if file.layer is not None
        }
    assert sorted(catalog.files) == sorted([catalog.shards, *(file.name for file in files + others)])
    if files != others:
        assert catalog.sharded["activations"] != others


def test_older_catalogues_are_read(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    value = {
        "tables": {"tokens": "t"},
        "sharded": {
            "edges": {"name": ["e"], "doc_offset": [0], "source": [""], "layer": [4]},
            "rejects": {"name": [], "doc_offset": [], "source": []},
        },
        "lineage": {"corpus": "c"},
    }
    storage.write_json(CATALOG, value)
    older = read_catalog(storage)
    assert older.sharded == {"edges": [ShardFile(name="e", layer=4)], "rejects": []}
    write_catalog(storage, older)
    now = read_catalog(storage)
    assert (now.tables, now.sharded, now.lineage) == (older.tables, older.sharded, older.lineage)
    for wrong in (
        [],
        {"tables": {}},
        {**value, "sharded": {"edges": {"doc_offset": [0]}}},
        {**value, "sharded": {"edges": {"name": ["e"], "layer": ["seven"]}}},
        {**value, "shards": "tables/shards-1/shards.parquet"},
    ):
        with pytest.raises(DamagedError, match="no catalogue"):
            catalog_of(storage, wrong)


def write_shards(storage: Storage, files: list[ShardFile], n: int = 2) -> None:
    """Files of `n` documents each, whose activations say which file they are of."""
    for number, name in enumerate(dict.fromkeys(file.name for file in files)):
        rows = [
            {"doc": doc, "position": 0, "token_id": 1, "feature_id": number, "activation": 1.0}
            for doc in range(n)
        ]
        written = storage.write_parquet(name, pa.Table.from_pylist(rows, SHARD_FILES["activations"]))
        commit(storage, name.rpartition("/")[0], Manifest(stage="features", inputs={}), [written])


@settings(max_examples=15)
@given(files=shard_lists(), documents=st.lists(st.integers(0, 12), min_size=1, max_size=3))
@pytest.mark.slow
def test_views_of_stored_shards_have_the_rows_of_given_ones(
    tmp_path_factory: pytest.TempPathFactory, files: list[ShardFile], documents: list[int]
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    write_shards(storage, files)
    write_catalog(storage, Catalog(sharded={"activations": files}))
    with connect(storage) as published, open_duckdb(storage) as here:
        create_views(here, storage, Catalog(sharded={"activations": files}))
        every = "SELECT * FROM activations ORDER BY ALL"
        assert published.execute(every).fetchall() == here.execute(every).fetchall()
        if files:
            some = "SELECT * FROM activations_in($documents, layers := [0]) ORDER BY ALL"
            given_ = {"documents": documents}
            assert published.execute(some, given_).fetchall() == here.execute(some, given_).fetchall()


@pytest.fixture
def published(tmp_path: Path) -> tuple[Storage, Catalog]:
    """Three shards, and a table of one file."""
    storage = Storage(str(tmp_path))
    files = [ShardFile(name=f"features/{n}/activations.parquet", doc_offset=2 * n, layer=0) for n in range(3)]
    write_shards(storage, files)
    tokens = storage.write_parquet("tables/k/tokens.parquet", pa.table({"token_id": [1]}))
    commit(storage, "tables/k", Manifest(stage="tables", inputs={}), [tokens])
    write_catalog(storage, Catalog(tables={"tokens": tokens.name}, sharded={"activations": files}))
    return storage, read_catalog(storage)


def count(connection: Any, table: str) -> Any:
    with telling_damage():
        return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_who_looks_at_other_tables_reads_no_shards(published: tuple[Storage, Catalog]) -> None:
    storage, catalog = published
    content = storage.read_bytes(catalog.shards)
    storage.write_bytes(catalog.shards, content[:-1] + b"?")
    with connect(storage) as connection:
        assert count(connection, "tokens") == 1
        for table in ("activations", "activations_in([0])"):
            with pytest.raises(DamagedError, match=catalog.shards):
                count(connection, table)
        storage.write_bytes(catalog.shards, content)
        assert count(connection, "activations") == 6
        # Of a query that names no document nothing but columns is read.
        assert count(connection, "activations_in([])") == 0


def test_readers_keep_what_was_published_when_they_came(published: tuple[Storage, Catalog]) -> None:
    storage, before = published
    files = list(before.sharded["activations"])
    with connect(storage) as connection:
        write_catalog(storage, Catalog(tables=before.tables, sharded={"activations": files[:1]}))
        assert count(connection, "activations") == 6
        assert count(connection, "activations_in([4])") == 1
    with connect(storage) as connection:
        assert count(connection, "activations") == 2
    assert storage.exists(before.shards)


def test_whoever_reads_while_others_publish_sees_one_of_their_catalogues(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    files = [ShardFile(name=f"features/{n}/activations.parquet", doc_offset=2 * n, layer=0) for n in range(8)]
    write_shards(storage, files)
    write_catalog(storage, Catalog(sharded={"activations": files[:1]}))
    is_over = threading.Event()

    def publish() -> None:
        for n in [*range(1, 9)] * 3:
            write_catalog(storage, Catalog(sharded={"activations": files[:n]}, lineage={"n": str(n)}))
        is_over.set()

    writer = threading.Thread(target=publish)
    writer.start()
    seen = set()
    while not is_over.is_set():
        found = read_catalog(storage)
        n = int(found.lineage.get("n", 1))
        assert found.sharded["activations"] == files[:n]
        seen.add(n)
    writer.join()
    assert seen
    assert read_catalog(storage).sharded["activations"] == files
