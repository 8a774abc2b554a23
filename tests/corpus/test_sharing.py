"""Files that all workers share against the slow, obvious way: one process that reads one file after another."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plain
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from s3 import S3Root

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import StorageError
from tasks.corpus import decompression, parts, sharing, token_shards
from tasks.corpus.parts import Batch, LineBlock, LineRange, RowGroups, WholeFile
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run, _committed, make
from tasks.stages import open_run


@dataclass
class Done:
    """A future of what was done already."""

    value: Any

    def result(self) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


@dataclass
class InProcess:
    """A pool that does at once what it is asked for; arguments and results travel as between processes."""

    run: Run
    size: int = 2
    most_commits: int = 1_000_000
    parts: list[Any] = field(default_factory=list)
    commits: int = 0

    def submit(self, function: Callable[..., Any], *args: Any, priority: int = 0) -> Done:
        self.parts += [arg for arg in args if hasattr(arg, "n_bytes") and hasattr(arg, "read")]
        try:
            given_args = [arg.result() if isinstance(arg, Done) else arg for arg in args]
            return Done(pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(given_args))))))
        except Exception as error:
            return Done(error)

    def commit(self, function: Callable[..., Any], *args: Any) -> Done:
        self.commits += 1
        if self.commits > self.most_commits:
            raise KeyboardInterrupt
        return self.submit(_committed, self.run, TOKENIZE, function, *args)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shared")
    tiny.save_tokenizer(place / "tokenizer")
    (place / "corpus").mkdir()
    return place


@pytest.fixture(autouse=True)
def parts_are_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_parts(64):
        yield


class small_parts:
    """Parts of so many bytes, read in pieces of fewer."""

    def __init__(self, n_bytes: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(parts, "PART_BYTES", n_bytes)
        self.patch.setattr(parts, "MAX_GROUP_BYTES", 10_000)
        self.patch.setattr(decompression, "FETCH_BYTES", max(1, n_bytes // 3))
        self.patch.setattr(decompression, "_TAIL_BYTES", 5)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def fill(place: Path, files: dict[str, bytes]) -> None:
    for old in (place / "corpus").iterdir():
        old.unlink()
    for name, content in files.items():
        (place / "corpus" / name).write_bytes(content)


def config_of(place: Path, **corpus: Any) -> Config:
    return Config.model_validate(
        {
            "corpus": {
                "urls": [f"{place}/corpus/*"],
                "shard_tokens": 40,
                "max_reject_share": 1,
                "max_unreadable_files": 100,
                **corpus,
            },
            "model": {"name": str(place / "tokenizer")},
            "storage": {"root": str(place / "root")},
        }
    )


def written(storage: Storage) -> dict[str, bytes]:
    """Every file of the shards."""
    return {name: Path(storage.full(name)).read_bytes() for name in storage.sizes("tokens")}


class Here(type(TOKENIZE)):  # type: ignore[misc]
    """One process, one file after another."""

    def client(self, *_: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def unsplit(place: Path, **corpus: Any) -> dict[str, bytes]:
    config = config_of(place, **corpus)
    storage = Storage(config.storage.root)
    storage.delete("tokens")
    run = open_run(config, storage)
    stage = Here()
    for group in [[unit] for unit in stage.prepare(run, run.find(stage).missing)]:
        for made in stage.make(run, group):
            if not isinstance(made, int):
                _committed(run, stage, lambda made=made: [made])
    return written(storage)


def shared(place: Path, *, again: bool = False, most_commits: int = 1_000_000, **corpus: Any) -> Any:
    """What the workers make of it, and their pool."""
    config = config_of(place, **corpus)
    storage = Storage(config.storage.root)
    if not again:
        storage.delete("tokens")
    run = open_run(config, storage)
    missing = run.find(TOKENIZE).missing
    units = TOKENIZE.prepare(run, missing) if missing else []
    groups = {number: [unit] for number, unit in enumerate(units)}
    pool = InProcess(run, most_commits=most_commits)
    told = dict.fromkeys(groups, 0)
    for number, done in TOKENIZE.share(run, groups, pool):
        if isinstance(done, int):
            told[number] += done
    assert all(told[number] <= group[0].size for number, group in groups.items())
    return written(storage), pool


def kinds(pool: InProcess) -> set[type]:
    return {type(part) for part in pool.parts}


# ---- lines
texts_of = st.text(st.sampled_from('the of river é日🙂\\"\t'), max_size=40)
broken = st.sampled_from(
    [
        b"",
        b"  ",
        b'{"text": "cut',
        b'{"body": 1}',
        b'{"text": 7}',
        b'{"text": ""}',
        b'{"text": "\xff"}',
        b"\0",
        b"[]",
    ]
)
json_line = st.one_of(
    texts_of.map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    texts_of.map(lambda text: json.dumps({"id": 1, "text": text}).encode()),
    broken,
)
ends = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r\r\n", b"\n\n"])


@st.composite
def lines(draw: st.DrawFn, line: st.SearchStrategy[bytes]) -> bytes:
    content = b"".join(draw(line) + draw(ends) for _ in range(draw(st.integers(1, 30))))
    mark = draw(st.sampled_from([b"", b"", "\ufeff".encode()]))
    return mark + (content if draw(st.booleans()) else content[:-1])


@given(content=lines(json_line), size=st.integers(1, 150), suffix=st.sampled_from(["jsonl", "json"]))
@example(content=b'{"text": "a"}\n' * 20, size=14, suffix="jsonl")
@example(content=b'{"text": "a"}\r\n' * 20, size=14, suffix="jsonl")
@settings(max_examples=15)
@pytest.mark.slow
def test_lines_of_json(place: Path, content: bytes, size: int, suffix: str) -> None:
    fill(place, {f"a.{suffix}": content})
    with small_parts(size):
        made, pool = shared(place)
    assert made == unsplit(place)
    if suffix == "jsonl" and len(content) > size and b"\n" in content:
        assert kinds(pool) == {LineRange}


@given(content=lines(st.one_of(texts_of.map(str.encode), broken)), size=st.integers(1, 100))
@settings(max_examples=15)
@pytest.mark.slow
def test_lines_of_text(place: Path, content: bytes, size: int) -> None:
    fill(place, {"a.txt": content})
    with small_parts(size):
        made, _ = shared(place)
    assert made == unsplit(place)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv", "json"])
@pytest.mark.slow
def test_encodings_and_line_ends(place: Path, kind: str, end: str, encoding: str) -> None:
    documents = tiny.texts(12, longest=8)
    if kind == "csv":
        content = "".join(f'"{text}",x{end}' for text in ["text", *documents])
    elif kind == "txt":
        content = end.join(text.strip() for text in documents)
    else:
        content = end.join(json.dumps({"text": text}) for text in documents)
    fill(place, {f"a.{kind}": content.encode(encoding)})
    made, pool = shared(place)
    assert made == unsplit(place)
    can_split = encoding.startswith("utf-8") and end != "\r"
    assert (LineRange in kinds(pool)) == can_split


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


@given(
    content=lines(json_line),
    size=st.integers(1, 150),
    kind=st.sampled_from(sorted(COMPRESSORS)),
    frames=st.integers(1, 3),
    cut=st.sampled_from([0, 0, 1, 9]),
)
@settings(max_examples=10)
@pytest.mark.slow
def test_a_compressed_stream_goes_through_one_reader(
    place: Path, content: bytes, size: int, kind: str, frames: int, cut: int
) -> None:
    step = -(-len(content) // frames)
    packed = b"".join(COMPRESSORS[kind](content[at : at + step]) for at in range(0, len(content), step))
    fill(place, {f"a.jsonl.{kind}": packed[: len(packed) - cut]})
    with small_parts(size):
        made, pool = shared(place)
    assert made == unsplit(place)
    assert kinds(pool) <= {LineBlock, Batch}


def test_lines_that_are_too_long_are_rejects(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.lines.MAX_RECORD_BYTES", 300)
    documents = ["a", "b" * 400, "c", "d" * 2000, "e"]
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    monkeypatch.setattr(decompression, "_READ_BYTES", 50)
    monkeypatch.setattr(decompression, "PIECE_BYTES", 50)
    for name, stored in {"a.jsonl": content, "a.jsonl.gz": gzip.compress(content)}.items():
        fill(place, {name: stored})
        made, _ = shared(place)
        assert made == unsplit(place)
        (name,) = (name for name in made if name.endswith("rejects.parquet"))
        assert pq.read_table(io.BytesIO(made[name]))["line"].to_pylist() == [2, 4]


# ---- tables
@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A table some of whose rows run over line ends, and some of which are broken."""
    buffer = io.StringIO()
    how = draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(buffer, lineterminator=end, quoting=how)
    writer.writerow(draw(st.sampled_from([["id", "text"], ["text", "n"], ["a\nb", "text"]])))
    signs = draw(st.sampled_from(["the of é日", 'the of é日,"', 'the of é日,"\n', "the\n\r\n"]))
    for _ in range(draw(st.integers(0, 25))):
        writer.writerow([draw(st.text(st.sampled_from(signs), max_size=30)) for _ in range(2)])
        buffer.write(
            draw(
                st.sampled_from(
                    ["", "", "", "", end, "a" + end, "a,b,c" + end, 'x"y,"z' + end, '"x"y,z' + end]
                )
            )
        )
    return buffer.getvalue().encode()


@given(content=tables(), size=st.integers(1, 150))
@settings(max_examples=15)
@pytest.mark.slow
def test_tables(place: Path, content: bytes, size: int) -> None:
    fill(place, {"a.csv": content})
    with small_parts(size):
        made, _ = shared(place)
    assert made == unsplit(place)


@pytest.mark.slow
def test_a_table_is_split_until_a_row_runs_over_the_end_of_a_part(place: Path) -> None:
    rows = [f'{n},"the river {n}"\n' for n in range(40)]
    fill(place, {"a.csv": "".join(["id,text\n", *rows]).encode()})
    made, pool = shared(place)
    assert made == unsplit(place)
    assert kinds(pool) == {LineRange}
    rows[20] = '20,"the river\n' + "of\n" * 40 + '"\n'
    fill(place, {"a.csv": "".join(["id,text\n", *rows]).encode()})
    made, pool = shared(place)
    assert made == unsplit(place)
    assert kinds(pool) == {LineRange, Batch}


@given(
    documents=st.lists(st.one_of(st.none(), st.text(max_size=60)), max_size=40),
    group=st.integers(1, 12),
    empty=st.lists(st.integers(0, 5), max_size=3),
    size=st.integers(1, 400),
)
@settings(max_examples=15)
@pytest.mark.slow
def test_row_groups(
    place: Path, documents: list[str | None], group: int, empty: list[int], size: int
) -> None:
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    buffer = io.BytesIO()
    pieces = [documents[at : at + group] for at in range(0, len(documents), group)]
    for at in empty:
        pieces.insert(at, [])
    with pq.ParquetWriter(buffer, schema) as writer:
        for some in pieces:
            writer.write_table(pa.table([list(range(len(some))), some], schema=schema))
    fill(place, {"a.parquet": buffer.getvalue()})
    with small_parts(size):
        made, pool = shared(place)
    assert made == unsplit(place)
    assert kinds(pool) <= {RowGroups}


@pytest.mark.slow
def test_what_parquet_files_may_be_is_read_alike(place: Path) -> None:
    table = pa.table({"text": tiny.texts(60), "n": range(60)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10)
    content = buffer.getvalue()
    damaged = bytearray(content)
    damaged[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    nested = io.BytesIO()
    pq.write_table(pa.table({"text": [{"a": "b"}]}), nested)
    for files, kind in (
        ({"a.parquet": bytes(damaged)}, RowGroups),
        ({"a.parquet": content[:-20]}, Batch),
        ({"a.parquet": nested.getvalue()}, Batch),
    ):
        fill(place, files)
        made, pool = shared(place)
        assert made == unsplit(place)
        assert kinds(pool) == {kind}
    # A row group that is too large for a part.
    parts.MAX_GROUP_BYTES = 100
    fill(place, {"a.parquet": content})
    made, pool = shared(place)
    assert made == unsplit(place)
    assert kinds(pool) == {Batch}


# ---- limits, and runs that go on where another stopped
def corpus(n: int = 3) -> dict[str, bytes]:
    files = {
        f"{index}.jsonl": "".join(
            json.dumps({"text": text}) + "\n" for text in tiny.texts(12, index, 20)
        ).encode()
        + b"broken\n"
        for index in range(n)
    }
    files["3.csv"] = b"text\n" + b"".join(b"of the river %d\n" % n for n in range(30))
    files["4.jsonl.gz"] = gzip.compress(files["0.jsonl"][:-9])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": tiny.texts(30, 9, 20)}), buffer, row_group_size=5)
    files["5.parquet"] = buffer.getvalue()
    files["6.txt"] = b"small"
    return files


@given(
    max_documents=st.one_of(st.none(), st.integers(1, 130)),
    max_tokens=st.one_of(st.none(), st.integers(60, 2500)),
    then=st.one_of(st.none(), st.integers(1, 130)),
)
@settings(max_examples=5)
@pytest.mark.slow
def test_limits(place: Path, max_documents: int | None, max_tokens: int | None, then: int | None) -> None:
    fill(place, corpus())
    first = {"max_documents": max_documents, "max_tokens": max_tokens, "shard_tokens": 200}
    made, _ = shared(place, **first)
    assert made == unsplit(place, **first)
    # Another limit goes on with what is there, and makes what a fresh run makes.
    fresh = unsplit(place, max_documents=then, shard_tokens=200)
    shared(place, **first)
    made, _ = shared(place, again=True, max_documents=then, shard_tokens=200)
    assert {name: made[name] for name in fresh} == fresh


def test_what_lies_behind_a_limit_is_tokenized_at_most_a_few_parts_ahead(place: Path) -> None:
    files = corpus()
    fill(place, files)
    _, pool = shared(place, max_documents=3)
    reached = len(b"".join(files["0.jsonl"].splitlines(keepends=True)[:3])) // 64 + 1
    assert reached < len(pool.parts) <= reached + 2 * pool.size + 2


@given(kill=st.integers(0, 20), limit=st.one_of(st.none(), st.integers(1, 100)))
@settings(max_examples=5)
@pytest.mark.slow
def test_a_killed_run_keeps_its_finished_shards(place: Path, kill: int, limit: int | None) -> None:
    fill(place, corpus())
    fresh = unsplit(place, max_documents=limit, shard_tokens=200)
    Storage(config_of(place).storage.root).delete("tokens")
    try:
        shared(place, most_commits=kill, max_documents=limit, shard_tokens=200)
    except KeyboardInterrupt:
        kept = written(Storage(config_of(place).storage.root))
        made, pool = shared(place, again=True, max_documents=limit, shard_tokens=200)
        assert made == fresh
        assert pool.commits < len([name for name in fresh if name.endswith("manifest.json")]) or not kept
        assert kept.items() <= made.items()


@pytest.mark.slow
def test_a_file_that_one_process_began_is_finished_by_all(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(place, corpus())
    fresh = unsplit(place)
    close, closed = token_shards.OpenShard.close, [0]

    def dying(self: Any, folder: str, *, ends_file: bool) -> Any:
        closed[0] += 1
        if closed[0] % 4 == 3:
            raise KeyboardInterrupt
        return close(self, folder, ends_file=ends_file)

    monkeypatch.setattr(token_shards.OpenShard, "close", dying)
    with pytest.raises(KeyboardInterrupt):
        unsplit(place)
    monkeypatch.setattr(token_shards.OpenShard, "close", close)
    begun = [
        name for name in written(Storage(config_of(place).storage.root)) if name.endswith("manifest.json")
    ]
    assert len(begun) == 2
    made, pool = shared(place, again=True)
    assert made == fresh
    assert pool.commits


def test_a_storage_that_stops_answering_fails_the_run_and_names_the_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(place, {"a.jsonl": corpus()["0.jsonl"]})
    short = decompression.StoredLines._next

    def gone(self: Any, n_bytes: int) -> bytes:
        monkeypatch.setattr(self._fs, "cat_file", lambda *_, **__: b"")
        return short(self, n_bytes)

    monkeypatch.setattr(decompression.StoredLines, "_next", gone)
    with pytest.raises(StorageError, match=r"a\.jsonl: reading failed: 0 bytes came where"):
        shared(place)


@pytest.mark.s3
def test_files_on_s3(place: Path, moto_root: S3Root) -> None:
    files = {name: content for name, content in corpus(1).items() if name != "4.jsonl.gz"}
    for name, content in files.items():
        Storage(f"{moto_root.url}/corpus").write_bytes(name, content)
    made, pool = shared(place, urls=[f"{moto_root.url}/corpus/*"])
    assert made == unsplit(place, urls=[f"{moto_root.url}/corpus/*"])
    assert kinds(pool) == {LineRange, RowGroups, WholeFile}


@pytest.mark.cluster
@pytest.mark.parametrize("limit", [None, 70])
def test_a_cluster_makes_the_same_shards_whatever_its_size(
    place: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr("tasks.corpus.tokenization.SMALL_BYTES", 0)
    monkeypatch.setattr("tasks.corpus.tokenization.PART_BYTES", 64)
    fill(place, corpus())
    fresh = unsplit(place, max_documents=limit, shard_tokens=200)
    calls: list[object] = []
    share = sharing.share_files

    def noting(*args: Any) -> Any:
        calls.append(args)
        return share(*args)

    monkeypatch.setattr("tasks.corpus.tokenization.share_files", noting)
    for workers in (1, 2):
        config = config_of(place, max_documents=limit, shard_tokens=200)
        config = config.model_copy(update={"dask": config.dask.model_copy(update={"workers": workers})})
        storage = Storage(config.storage.root)
        storage.delete("tokens")
        told: list[tuple[int, int, str]] = []
        made = make(open_run(config, storage), TOKENIZE, lambda *report, told=told: told.append(report))
        assert len(calls) == workers - 1
        assert written(storage) == fresh
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1]
        assert plain.there(open_run(config, storage), TOKENIZE) == made
