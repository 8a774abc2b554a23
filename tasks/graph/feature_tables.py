"""The tables that show one feature at a time: examples, histogram, the tokens that open it, and its logits if wanted.

They have a folder a layer, made like the edges in as many passes as `duckdb.memory_limit` wants, here over ranges of
features, whose rows `tasks.graph.by_feature` sorts. What determines a folder is the layer's shards, where their
documents are in the corpus, and how many examples and bins are wanted; of the logits see `tasks.graph.logits`.
"""

from __future__ import annotations

import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import verified
from infra.allocator import freed_memory_kept
from infra.catalog import Catalog, ShardFile
from infra.duck import memory_bytes, threads_within
from infra.manifest import Manifest, commit, content_key, load, load_all
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import StorageError
from schemas.graph.feature_tables import TABLES
from schemas.work import FeatureShard
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run
from tasks.engine.tables import TableGroup, Tables, opened
from tasks.graph import logits
from tasks.graph.by_feature import (
    ByFeature,
    Ranks,
    bins_of,
    edges_of_bins,
    example_ranks,
    histogram,
    tokens_of,
)
from tasks.graph.edges import id_ranges
from tasks.graph.features import FEATURES
from tasks.graph.tables import GRAPH, checked_layers, graph_inputs

VERSION = 4
"""Raise when what is in a file changes."""

BYTES_PER_ROW = 60
"""Memory a pass takes for each activation or edge: its columns, its place by feature, and what is read and written."""

READ_BYTES_PER_ROW = 30
"""Memory that a row of a file takes until it is in a pass's columns; files that wait for that have a quarter of all."""

SHOWN_PER_BLOCK = 1 << 19
"""Examples of a block at most, unless they are of one feature: seldom features are many of few activations each."""

ROWS_PER_GROUP = 16_384
"""Rows that a reader of one feature reads at least; there are as many entries in a file's footer as groups."""

ENCODINGS: dict[str, dict[str, str]] = {
    "feature_examples": {
        "feature_id": "DELTA_BINARY_PACKED",
        "doc_id": "DELTA_BINARY_PACKED",
        "position": "DELTA_BINARY_PACKED",
        "token_id": "BYTE_STREAM_SPLIT",
        "activation": "BYTE_STREAM_SPLIT",
    },
    "feature_histogram": {
        "feature_id": "DELTA_BINARY_PACKED",
        "low": "BYTE_STREAM_SPLIT",
        "high": "BYTE_STREAM_SPLIT",
    },
    "feature_tokens": {
        "feature_id": "DELTA_BINARY_PACKED",
        "token_id": "DELTA_BINARY_PACKED",
        "max_activation": "BYTE_STREAM_SPLIT",
        "sum_activation": "BYTE_STREAM_SPLIT",
        "lift": "BYTE_STREAM_SPLIT",
    },
    "feature_summary": {},
}
"""Of columns that seldom repeat a value: a third less bytes than dictionaries, in half of the time."""

FEWEST_APART = 4
"""Passes from which on it pays to put rows apart first: that takes as long as three times reading a layer."""

OCCURRENCE_COLUMNS = ("feature_id", "activation", "position", "token_id", "doc_id")
EDGE_COLUMNS = ("feature_id", "token_id", "n", "max_activation", "sum_activation")

KINDS = pa.array(["top", *(f"decile {number}" for number in range(1, 11))])

T = TypeVar("T")
U = TypeVar("U")
Own = Callable[[pa.Table], pa.Table]
"""Gives those of some rows that are of the features of a pass."""

RowsOf = Callable[[Own], Iterable[pa.Table]]


class FeatureTables(TableGroup):
    """What people look at of a feature."""

    name = "features"
    needs = (TOKENIZE, DICTIONARIES, FEATURES)

    def applies(self, config: Config) -> bool:
        """Where there is a graph."""
        return FEATURES.applies(config)

    def subject(self, config: Config) -> str:
        """The layers."""
        return f"features, {FEATURES.subject(config)}"

    def planned(self, run: Run) -> Tables | None:
        """The group as it would be published; None before its files are there."""
        features, dictionaries = run.result(FEATURES), run.result(DICTIONARIES)
        layers = checked_layers(features, dictionaries)
        folders = [(layer, _folder(run.config, layer, features)[0]) for layer in layers]
        if run.config.features.logits:
            folders += [(one.layer, logits.folder_of(run, one)[0]) for one in dictionaries]
        done = load_all(run.storage, [folder for _, folder in folders])
        if len(done) < len(folders):
            return None
        files: dict[str, list[ShardFile]] = {}
        for layer, folder in sorted(folders):
            for name in sorted(done[folder].files):
                # A table's name, then a pass'.
                table = re.split(r"[-.]", name)[0]
                files.setdefault(table, []).append(ShardFile(name=f"{folder}/{name}", layer=layer))
        parts = {"group": self.name, "folders": sorted(folder for _, folder in folders)}
        return Tables(name=self.name, key_parts=parts, sharded=files, made_by_shard=tuple(files))

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing, a layer at a time, after the graph that it reads.

        Raises:
            ConfigError: also if a layer has shards and no dictionary or the reverse.
            ModelError: if logits are asked for, and the model has no head.
        """
        graph = GRAPH.build(run)
        features, dictionaries = run.result(FEATURES), run.result(DICTIONARIES)
        layers = checked_layers(features, dictionaries)
        total = len(layers) * (1 + run.config.features.logits)
        advance = one_by_one(progress, total)
        progress(0, total, "feature tables")
        for layer in layers:
            own = [file for file in graph.sharded["edges"] if file.layer == layer]
            inputs = Catalog(
                tables={table: graph.tables[table] for table in ("token_degree", "feature_degree")},
                sharded={"edges": own, "activations": graph_inputs(features, layer)["activations"]},
            )
            ensure_layer(run.config, run.storage, layer, features, inputs)
            advance(f"features of layer {layer}")
        if run.config.features.logits:
            logits.ensure_logits(run, ROWS_PER_GROUP, advance)
        made = self.planned(run)
        if made is None:
            raise StorageError(
                f"feature tables under {run.storage.url('tables')} vanished while they were made",
                hint="run again",
            )
        return made


FEATURE_TABLES = FeatureTables()


def ensure_layer(
    config: Config, storage: Storage, layer: int, features: Sequence[FeatureShard], inputs: Catalog
) -> None:
    """Make one layer's tables, if they are not there.

    Args:
        config: Says how many examples and bins there are; DuckDB's limits are those of memory and threads here too, and
            decide the number of passes, never the rows.
        storage: Where shards and tables are.
        layer: Which layer.
        features: The feature shards, of any layers.
        inputs: The layer's `edges` and `activations`, in corpus order, and `token_degree` and `feature_degree`.

    Raises:
        ConfigError: if DuckDB, which sorts the activations of a feature that are more than memory holds, cannot work
            within its limits.
        StorageError: if a file cannot be read or written, or has other rows than the graph says.
    """
    folder, parts = _folder(config, layer, features)
    if load(storage, folder) is not None:
        return
    threads = threads_within(config.duckdb)
    with freed_memory_kept(), ThreadPoolExecutor(threads, "functok-features") as pool:
        largest = max((shard.n_activations for shard in features if shard.layer == layer), default=0)
        work = _Layer(config, storage, layer, inputs, folder, pool, threads, largest)
        written = [*work.make_tokens(), *work.make_activations()]
    commit(storage, folder, Manifest(stage="tables", inputs=parts), written)


class _Layer:
    """The making of one layer's files: by passes over ranges of features, each sorted and drawn from block by block."""

    def __init__(
        self,
        config: Config,
        storage: Storage,
        layer: int,
        inputs: Catalog,
        folder: str,
        pool: ThreadPoolExecutor,
        threads: int,
        largest: int,
    ) -> None:
        self._config, self._storage, self._layer, self._largest = config, storage, layer, largest
        self._inputs, self._folder, self._pool, self._ahead = inputs, folder, pool, 2 * threads
        self._memory = memory_bytes(config.duckdb.memory_limit)
        self._rows_per_pass = max(1, self._memory // BYTES_PER_ROW)
        self._feature, self._degree, self._n = self._of_layer("feature_degree", "feature_id", "degree", "n")

    def _of_layer(self, table: str, *columns: str) -> list[npt.NDArray[Any]]:
        found = verified.read_table(self._storage, self._inputs.tables[table], ["layer", *columns])
        found = found.filter(pc.equal(found["layer"], self._layer)).sort_by(columns[0])
        return [found[column].to_numpy() for column in columns]

    def make_tokens(self) -> list[StoredFile]:
        """`feature_tokens` and `feature_summary`."""
        token_id, count = self._of_layer("token_degree", "token_id", "count")
        share = np.zeros(int(token_id.max(initial=-1)) + 1)
        share[token_id] = count / count.sum()
        written: list[StoredFile] = []
        ranges, files = (
            id_ranges(self._feature, self._degree, self._rows_per_pass),
            self._inputs.sharded["edges"],
        )
        # They are passes of about as many rows.
        largest = int(self._degree.sum()) // max(1, len(files))
        with (
            self._file("feature_summary", written) as add_summary,
            self._by_range(ranges, self._edges_of, files, largest) as rows_of,
        ):
            for index, (first, last) in enumerate(ranges):
                edges = self._edges(partial(rows_of, index), first, last)
                by_n = ByFeature(edges.pop("feature_id"), edges["n"].astype(np.uint64))
                with self._file("feature_tokens", written, index, len(ranges)) as add_tokens:
                    make = partial(self._tokens_of, by_n, edges, share)
                    for rows, summary in _in_order(self._pool, self._ahead, make, by_n.ranges()):
                        add_tokens(rows)
                        add_summary(summary)
        return written

    def make_activations(self) -> list[StoredFile]:
        """`feature_examples` and `feature_histogram`."""
        written: list[StoredFile] = []
        ranges = id_ranges(self._feature, self._n, self._rows_per_pass)
        files = self._inputs.sharded["activations"]
        with self._by_range(ranges, self._occurrences, files, self._largest) as rows_of:
            for index, (first, last) in enumerate(ranges):
                with ExitStack() as stack:
                    add_examples, add_bins = (
                        stack.enter_context(self._file(table, written, index, len(ranges)))
                        for table in ("feature_examples", "feature_histogram")
                    )
                    for examples, bins in self._shown(partial(rows_of, index), first, last):
                        add_examples(examples)
                        add_bins(bins)
        return written

    @contextmanager
    def _by_range(
        self,
        ranges: Sequence[tuple[int, int]],
        read: Callable[[ShardFile], pa.Table],
        files: Sequence[ShardFile],
        largest: int,
    ) -> Iterator[Callable[[int, Own], Iterable[pa.Table]]]:
        """A function that gives a range's own of the rows that are read of files, in order.

        Where there are many ranges, rows are put apart once, a file a range: else each would read the whole layer.

        Args:
            ranges: Of features.
            read: Reads a file.
            files: Of the layer.
            largest: Rows of a file at most.

        Raises:
            StorageError: if there is no room for what is put apart.
        """
        if len(ranges) < FEWEST_APART:
            yield lambda index, own: self._in_turn(lambda file: own(read(file)), files, largest)
            return
        firsts = np.array([first for first, _ in ranges[1:]])

        def apart(file: ShardFile) -> list[pa.Table]:
            rows = read(file)
            place = np.searchsorted(firsts, rows["feature_id"].to_numpy(), side="right")
            # Numbers as narrow as that are sorted by counting.
            order = np.argsort(place.astype(np.uint16), kind="stable")
            ends = np.searchsorted(place[order], np.arange(len(ranges) + 1))
            rows = pa.Table.from_arrays(rows.columns, names=rows.column_names).take(order)
            return [rows.slice(start, end - start) for start, end in pairwise(ends)]

        spill = self._config.duckdb.temp_directory
        if spill is not None:
            Path(spill).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="functok-features-", dir=spill) as folder:
            names = [f"{folder}/{index}.arrow" for index in range(len(ranges))]
            try:
                # Rows, and these in order.
                _write_apart(names, self._in_turn(apart, files, 2 * largest))
            except OSError as error:
                raise StorageError(
                    f"the features of layer {self._layer} cannot be put apart in {folder}: {error}",
                    hint="give duckdb.temp_directory more space, or raise duckdb.memory_limit",
                ) from error
            yield lambda index, own: map(own, _read_apart(names[index]))

    def _shown(self, rows_of: RowsOf, first: int, last: int) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The examples and bins of a range of features."""
        inside = slice(*np.searchsorted(self._feature, [first, last + 1]))
        feature, n = self._feature[inside], self._n[inside]
        large = np.flatnonzero(n > self._rows_per_pass)
        if len(large):
            of = int(feature[large[0]])
            yield from self._shown(rows_of, first, of - 1)
            yield self._of_large_feature(of, int(n[large[0]]))
            yield from self._shown(rows_of, of + 1, last)
            return
        if not len(feature):
            return
        columns = self._activations(rows_of, first, last, int(n.sum()))
        # Above 0, the bits of float32 numbers are ordered as the numbers are.
        by_strength = ByFeature(columns.pop("feature_id"), columns["activation"].view(np.uint32))
        make = partial(self._shown_of, by_strength, columns)
        shown = self._config.features.top_examples + 10 * self._config.features.decile_examples
        yield from _in_order(
            self._pool, self._ahead, make, by_strength.ranges(max(1, SHOWN_PER_BLOCK // shown))
        )

    def _edges(self, rows_of: RowsOf, first: int, last: int) -> dict[str, npt.NDArray[Any]]:
        n = int(self._degree[slice(*np.searchsorted(self._feature, [first, last + 1]))].sum())
        found = _Columns(
            {name: TABLES["feature_tokens"].field(name).type for name in EDGE_COLUMNS}, n, first, last
        )
        for rows in rows_of(found.own):
            found.add(rows)
        return found.whole(f"the edges of layer {self._layer}")

    def _activations(self, rows_of: RowsOf, first: int, last: int, n: int) -> dict[str, npt.NDArray[Any]]:
        kinds = {name: TABLES["feature_examples"].field(name).type for name in OCCURRENCE_COLUMNS}
        found = _Columns(kinds, n, first, last)
        for rows in rows_of(found.own):
            found.add(rows)
        return found.whole(f"the activations of layer {self._layer}")

    def _in_turn(
        self, read: Callable[[ShardFile], T], files: Sequence[ShardFile], largest: int
    ) -> Iterator[T]:
        """What is read of files, of at most so many rows each, as many ahead as memory has room for."""
        room = self._memory // 4 // (READ_BYTES_PER_ROW * max(1, largest))
        return _in_order(self._pool, min(self._ahead, room), read, files)

    def _edges_of(self, file: ShardFile) -> pa.Table:
        return self._read(file, EDGE_COLUMNS)

    def _occurrences(self, file: ShardFile) -> pa.Table:
        """A shard's activations in corpus order, as they are written: of equal ones the first are shown."""
        rows = self._read(file, ["doc", *(name for name in OCCURRENCE_COLUMNS if name != "doc_id")])
        doc, position = rows["doc"].to_numpy(), rows["position"].to_numpy()
        if (np.diff((doc.astype(np.int64) << 32) + position) < 0).any():
            rows = rows.sort_by([("doc", "ascending"), ("position", "ascending")])
        doc_id = pc.add(rows["doc"].cast(pa.int64()), file.doc_offset)
        return rows.append_column("doc_id", doc_id).select(OCCURRENCE_COLUMNS)

    def _read(self, file: ShardFile, columns: Sequence[str]) -> pa.Table:
        return verified.read_table(self._storage, file.name, columns)

    def _tokens_of(
        self,
        by_n: ByFeature,
        edges: Mapping[str, npt.NDArray[Any]],
        share: npt.NDArray[np.float64],
        features: tuple[int, int],
    ) -> tuple[pa.Table, pa.Table]:
        rows, summary = tokens_of(by_n.block(*features), edges, share)
        return self._table("feature_tokens", rows), self._table("feature_summary", summary)

    def _shown_of(
        self, by_strength: ByFeature, columns: Mapping[str, npt.NDArray[Any]], features: tuple[int, int]
    ) -> tuple[pa.Table, pa.Table]:
        block = by_strength.block(*features)
        ranks = self._ranks(block.feature, block.n)
        row = block.row[block.start[ranks.feature] + ranks.rank]
        occurrences = {name: column[row] for name, column in columns.items()}
        bins = histogram(block, columns["activation"], self._config.features.histogram_bins)
        return self._examples(block.feature, ranks, occurrences), self._table("feature_histogram", bins)

    def _of_large_feature(self, feature: int, n: int) -> tuple[pa.Table, pa.Table]:
        """Those of a feature that has more activations than memory holds: DuckDB sorts them, on disk."""
        ranks = self._ranks(np.array([feature]), np.array([n]))
        wanted, place = np.unique(ranks.rank, return_inverse=True)
        n_bins = self._config.features.histogram_bins
        counts, seen, largest = np.zeros(n_bins + 1, np.int64), 0, 0.0
        found: list[pa.Table] = []
        inputs = Catalog(sharded={"activations": self._inputs.sharded["activations"]})
        with opened(
            f"the examples of feature {feature}", self._config.duckdb, self._storage, inputs
        ) as asked:
            query = (
                "SELECT doc_id, position, token_id, activation FROM activations WHERE feature_id = ? "
                "ORDER BY activation DESC, doc_id, position"
            )
            for batch in asked.sql(query, params=[feature]).to_arrow_reader(ROWS_PER_GROUP):
                activation = batch["activation"].to_numpy()
                largest = largest or float(activation[0])
                counts += np.bincount(bins_of(activation, largest, n_bins), minlength=n_bins + 1)
                inside = wanted[slice(*np.searchsorted(wanted, [seen, seen + len(batch)]))]
                found.append(pa.table(batch).take(pa.array(inside - seen)))
                seen += len(batch)
        if seen != n:
            raise _other_rows(f"the activations of feature {feature} of layer {self._layer}", seen, n)
        rows = pa.concat_tables(found).take(pa.array(place))
        occurrences = {name: rows[name].to_numpy() for name in rows.column_names}
        bin_ = np.flatnonzero(counts).astype(np.int32)
        bins = {"feature_id": np.full(len(bin_), feature), "bin": bin_, "n": counts[bin_]}
        return (
            self._examples(np.array([feature]), ranks, occurrences),
            self._table("feature_histogram", {**bins, **edges_of_bins(bin_, largest, n_bins)}),
        )

    def _ranks(self, feature: npt.NDArray[np.int64], n: npt.NDArray[np.int64]) -> Ranks:
        section = self._config.features
        return example_ranks(feature, n, section.top_examples, section.decile_examples)

    def _examples(
        self, feature: npt.NDArray[np.int64], ranks: Ranks, occurrences: Mapping[str, npt.NDArray[Any]]
    ) -> pa.Table:
        shown = {
            "feature_id": feature[ranks.feature],
            "kind": KINDS.take(pa.array(ranks.decile)),
            "place": ranks.place,
            **occurrences,
        }
        return self._table("feature_examples", shown)

    def _table(self, table: str, columns: Mapping[str, Any]) -> pa.Table:
        """Columns as the table has them."""
        rows = {"layer": np.full(len(columns["feature_id"]), self._layer), **columns}
        return pa.table(
            [pa.array(rows[field.name]).cast(field.type) for field in TABLES[table]], schema=TABLES[table]
        )

    @contextmanager
    def _file(
        self, table: str, written: list[StoredFile], index: int = 0, passes: int = 0
    ) -> Iterator[Callable[[pa.Table], None]]:
        """A file of a table, of one pass or of all; a function that writes rows to it, in whole groups."""
        of = f"-{index:04d}-of-{passes:04d}" if passes else ""
        encoding = ENCODINGS[table]
        dictionaries = [name for name in TABLES[table].names if name not in encoding]
        with (
            self._storage.write(f"{self._folder}/{table}{of}.parquet") as file,
            pq.ParquetWriter(
                file,
                TABLES[table],
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=dictionaries,
                column_encoding=encoding or None,
            ) as writer,
        ):
            waiting = pa.table({name: [] for name in TABLES[table].names}, schema=TABLES[table])

            def add(rows: pa.Table) -> None:
                nonlocal waiting
                waiting = pa.concat_tables([waiting, rows])
                whole = len(waiting) // ROWS_PER_GROUP * ROWS_PER_GROUP
                if whole >= 8 * ROWS_PER_GROUP:
                    writer.write_table(waiting.slice(0, whole), ROWS_PER_GROUP)
                    waiting = waiting.slice(whole)

            yield add
            if len(waiting):
                writer.write_table(waiting, ROWS_PER_GROUP)
        written.append(file.stored)


class _Columns:
    """Columns of the rows of some features, filled file by file.

    Args:
        kinds: The columns.
        n: How many rows there are.
        first: The first feature.
        last: The last one.
    """

    def __init__(self, kinds: Mapping[str, pa.DataType], n: int, first: int, last: int) -> None:
        self._columns = {name: np.empty(n, kind.to_pandas_dtype()) for name, kind in kinds.items()}
        self._n, self._first, self._last, self._filled = n, first, last, 0

    def own(self, rows: pa.Table) -> pa.Table:
        """Those of a file's rows that are of these features."""
        feature = rows["feature_id"]
        if len(rows) and not self._first <= pc.min(feature).as_py() <= pc.max(feature).as_py() <= self._last:
            rows = rows.filter(
                pc.and_(pc.greater_equal(feature, self._first), pc.less_equal(feature, self._last))
            )
        return rows

    def add(self, rows: pa.Table) -> None:
        """Rows of these features, after those before."""
        if self._filled + len(rows) <= self._n:
            for name, column in self._columns.items():
                at = self._filled
                for chunk in rows[name].chunks:
                    column[at : at + len(chunk)] = chunk.to_numpy()
                    at += len(chunk)
        self._filled += len(rows)

    def whole(self, what: str) -> dict[str, npt.NDArray[Any]]:
        """The columns.

        Raises:
            StorageError: if there were more rows, or fewer.
        """
        if self._filled != self._n:
            raise _other_rows(what, self._filled, self._n)
        return self._columns


def _other_rows(what: str, found: int, told: int) -> StorageError:
    return StorageError(
        f"{what} are {found:,} rows, where the table feature_degree says {told:,}",
        hint="run functok verify --repair, which makes anew what is damaged",
    )


def _write_apart(names: Sequence[str], parts: Iterable[Sequence[pa.Table]]) -> None:
    """Write the n-th of each of the parts under each other into the n-th file."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack:
        writers: list[pa.RecordBatchFileWriter] = []
        for part in parts:
            writers = writers or [
                stack.enter_context(pa.ipc.new_file(name, rows.schema, options=options))
                for name, rows in zip(names, part, strict=True)
            ]
            for writer, rows in zip(writers, part, strict=True):
                writer.write_table(rows)


def _read_apart(name: str) -> Iterator[pa.Table]:
    with pa.memory_map(name) as source, pa.ipc.open_file(source) as part:
        for number in range(part.num_record_batches):
            yield pa.Table.from_batches([part.get_batch(number)])


def _in_order(
    pool: ThreadPoolExecutor, ahead: int, work: Callable[[T], U], items: Iterable[T]
) -> Iterator[U]:
    """What `work` makes of each, in order, some of them ahead."""
    waiting: deque[Future[U]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _folder(config: Config, layer: int, features: Sequence[FeatureShard]) -> tuple[str, dict[str, Any]]:
    """The folder of one layer's tables, and what its key is made of: the shards and their places, in no order."""
    section = config.features
    parts = {
        "group": "features",
        "version": VERSION,
        "layer": layer,
        "features": sorted([f.folder, f.part.shard.doc_offset] for f in features if f.layer == layer),
        "examples": [section.top_examples, section.decile_examples],
        "bins": section.histogram_bins,
    }
    return f"tables/features-{content_key(**parts)}", parts
