"""No record vanishes: files as they come from the field, and what each reject of them stands for.

The field cases quote the public reports that they are built from.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, StorageError
from schemas.work import CorpusShards
from tasks.corpus import decompression
from tasks.corpus.decompression import PlainBytes
from tasks.corpus.files import corpus_files
from tasks.corpus.records import Record, read_records
from tasks.corpus.tokenization import TOKENIZE
from tasks.stages import open_run

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
each_compression = pytest.mark.parametrize("suffix", COMPRESSORS)


def read(path: Path, skip: int = 0, **corpus: Any) -> list[Record]:
    config = Config.model_validate({"corpus": {"urls": [str(path)], **corpus}, "model": {"name": "unused"}})
    (file,) = corpus_files(config)
    return list(read_records(file, config.corpus, skip))


def read_bytes(path: Path, content: bytes, **corpus: Any) -> list[Record]:
    path.write_bytes(content)
    return read(path, **corpus)


def texts(records: list[Record]) -> list[str | None]:
    return [record.text for record in records]


def jsonl(*values: str) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


def rows(n: int, end: str = "\n") -> list[str]:
    return [f"id,text{end}", *(f"{i},text number {i}{end}" for i in range(1, n + 1))]


# Field cases.


def test_a_csv_of_carriage_returns_has_all_its_rows(tmp_path: Path) -> None:
    """nao1215/filesql#279: a CR-only CSV imports as zero rows, exit 0; also tidyverse/readr#1236."""
    wanted = [f"text number {i}" for i in range(1, 101)]
    records = read_bytes(tmp_path / "mac.csv", "".join(rows(100, "\r")).encode())
    assert texts(records) == wanted
    assert [record.line for record in records] == list(range(2, 102))
    assert texts(read_bytes(tmp_path / "dos.csv", "".join(rows(100, "\r\n")).encode())) == wanted
    quoted = b'id,text\r1,"two\nlines"\r2,"and\r\nmore"\r'
    assert texts(read_bytes(tmp_path / "q.csv", quoted)) == ["two\nlines", "and\r\nmore"]
    assert texts(read_bytes(tmp_path / "m.jsonl", jsonl("a", "b").replace(b"\n", b"\r"))) == ["a", "b"]
    assert texts(read_bytes(tmp_path / "m.txt", b"a\rb\r\nc")) == ["a\rb", "c"]
    assert texts(read_bytes(tmp_path / "n.txt", b"a\rb\rc")) == ["a", "b", "c"]


def test_line_ends_that_are_cut_between_two_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "_READ_BYTES", 7)
    monkeypatch.setattr(decompression, "PIECE_BYTES", 7)
    monkeypatch.setattr("tasks.corpus.lines._HEAD_BYTES", 5)
    assert texts(read_bytes(tmp_path / "a.txt", b"1234\r56789012\r\n89\n0\r")) == [
        "1234",
        "56789012",
        "89",
        "0",
    ]
    assert texts(read_bytes(tmp_path / "b.txt", b"1234\r\n567\r\n")) == ["1234", "567"]


def test_a_stray_quote_says_what_it_swallowed(tmp_path: Path) -> None:
    """arnaudroger/SimpleFlatMapper#692: the rest of the file is appended to the broken cell; pandas-dev/pandas#5500."""
    lines = rows(1000)
    lines[600] = '600,"text number 600\n'
    *documents, reject = read_bytes(tmp_path / "c.csv", "".join(lines).encode())
    assert texts(documents) == [f"text number {i}" for i in range(1, 600)]
    assert (reject.line, reject.reason) == (601, "broken CSV: unexpected end of data")
    assert reject.lost_bytes == len("".join(lines[600:]))
    assert reject.n_lines == 401
    # The way out for files in which quotes are text.
    assert len(read(tmp_path / "c.csv", csv={"quote": ""})) == 1000


def test_zeros_after_an_archive_are_padding(tmp_path: Path) -> None:
    """pauldmccarthy/indexed_gzip#69: bsdtar pads what it writes to a pipe with zeros."""
    for suffix, compress in COMPRESSORS.items():
        content = compress(jsonl("a")) + bytes(10_000)
        assert texts(read_bytes(tmp_path / f"p.jsonl{suffix}", content)) == ["a"], suffix
        again = content + compress(jsonl("b")) + bytes(3)
        assert texts(read_bytes(tmp_path / f"q.jsonl{suffix}", again)) == ["a", "b"], suffix


def test_frames_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """indygreg/python-zstandard#59: only the first frame is returned; Nullus157/async-compression#130."""
    for size in (5, 1 << 18):
        monkeypatch.setattr(decompression, "_READ_BYTES", size)
        for suffix, compress in COMPRESSORS.items():
            content = b"".join(compress(jsonl(text)) for text in "abc")
            assert texts(read_bytes(tmp_path / f"f.jsonl{suffix}", content)) == ["a", "b", "c"], suffix


def test_a_frame_with_a_window_of_two_gigabytes(tmp_path: Path) -> None:
    """indygreg/python-zstandard#157: a dump made with `zstd --long=31` needs too much memory by default."""
    window = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=window).compressobj()
    content = compressor.compress(jsonl("a")) + compressor.flush()
    assert texts(read_bytes(tmp_path / "long.jsonl.zst", content)) == ["a"]


def test_json_of_lines_and_json_of_one_array(tmp_path: Path) -> None:
    """huggingface/datasets#5088: a .json.gz of lines is read as 0 rows; #4997: the array form."""
    packed = gzip.compress(jsonl("a", "b"))
    assert texts(read_bytes(tmp_path / "lines.json.gz", packed)) == ["a", "b"]
    values = [{"text": "a", "n": 1.5}, {"no": 1}, {"text": "b\n[,]"}, 7]
    for indent in (None, 2):
        content = ("\ufeff \n" + json.dumps(values, indent=indent)).encode()
        records = read_bytes(tmp_path / "array.json", content)
        assert texts(records) == ["a", None, "b\n[,]", None]
        assert records[1].reason == "no text field 'text'"
    assert records[2].line == 10
    assert texts(read_bytes(tmp_path / "e.json", b" [ ] ")) == []
    # Elements of any length, cut anywhere.
    long = [{"text": "x" * n} for n in (1, 100, 5000, 2)]
    assert texts(read_bytes(tmp_path / "l.json", json.dumps(long).encode())) == [v["text"] for v in long]


def test_a_broken_array_says_where_and_how_much_is_lost(tmp_path: Path) -> None:
    content = b'[{"text": "a"},\n {"text": "b"}\n {"text": "c"}, {"text": "d"}]'
    *documents, reject = read_bytes(tmp_path / "c.json", content)
    assert texts(documents) == ["a", "b"]
    assert (reject.line, reject.ends_early) == (3, True)
    assert reject.lost_bytes == len(b'{"text": "c"}, {"text": "d"}]')
    (cut,) = read_bytes(tmp_path / "d.json", b'[{"text": "a')
    assert "broken JSON" in cut.reason


def test_marks_at_the_beginning_tell_the_encoding(tmp_path: Path) -> None:
    """wbolster/jsonlines#68: legacy files with a byte order mark; turicas/rows#273: NULs that were UTF-16."""
    contents = {
        "c.jsonl": jsonl("naïve"),
        "c.csv": "id,text\n1,naïve\n".encode(),
        "c.txt": "naïve\n".encode(),
    }
    contents["c.json"] = b'[{"text": "na\xc3\xafve"}]'
    for name, content in contents.items():
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            encoded = content.decode().encode(encoding)
            for suffix, compress in {"": bytes, ".gz": gzip.compress}.items():
                assert texts(read_bytes(tmp_path / (name + suffix), compress(encoded))) == ["naïve"]
        big_endian = codecs.BOM_UTF16_BE + content.decode().encode("utf-16-be")
        assert texts(read_bytes(tmp_path / name, big_endian)) == ["naïve"]
    (document, reject) = read_bytes(tmp_path / "cut.txt", "ab\ncd".encode("utf-16")[:-1])
    assert (document.text, reject.text) == ("ab", None)
    assert reject.reason.startswith("not valid UTF-16")
    # Without a mark every second byte is a NUL: no text is made of that.
    for name in ("u.txt", "u.csv"):
        unmarked = read_bytes(tmp_path / name, "id,text\n1,abc\n2,abc\n".encode("utf-16-le"))
        assert texts(unmarked) == [None] * len(unmarked)
        assert unmarked


def test_nul_bytes_are_told(tmp_path: Path) -> None:
    """codeinthehole/csvfilter#8: one NUL in a row ended the program, now it is one reject with its line."""
    records = read_bytes(tmp_path / "c.csv", b"id,text\n1,a\n2,b\0\n3,c\n")
    assert texts(records) == ["a", None, "c"]
    assert records[1].line == 3
    assert "NUL" in records[1].reason
    assert texts(read_bytes(tmp_path / "c.txt", b"a\n\0\0\0\0\nb\n")) == ["a", None, "b"]
    # JSON says it on purpose.
    assert texts(read_bytes(tmp_path / "c.jsonl", jsonl("a\0b"))) == ["a\0b"]


# The whole of each kind.


def test_bytes_that_are_not_utf8_are_named_wherever_they_are(tmp_path: Path) -> None:
    for header in (b"pr\xe9nom,text\n", b"text,pr\xe9nom\n"):
        first, *others = read_bytes(tmp_path / "c.csv", header + b"a,a\nb\xe9,b\n")
        assert (first.line, first.text) == (1, None)
        assert first.reason.startswith("in the header: not valid UTF-8")
        assert texts(others) == ["a", None]
        assert others[1].line == 3
    records = read_bytes(tmp_path / "d.csv", b"t\xe9xt\na\nb\n")
    assert texts(records) == [None] * 3
    records = read_bytes(tmp_path / "e.json", b'[{"text": "a", "b": "\xe9"}, {"text": "b"}]')
    assert texts(records) == [None, "b"]
    table = pq.write_table(pa.table({"tQxt": ["a"], "text": ["b"]}), tmp_path / "f.parquet")
    assert table is None
    content = (tmp_path / "f.parquet").read_bytes()
    (record,) = read_bytes(tmp_path / "g.parquet", content.replace(b"tQxt", b"t\xe9xt"))
    assert record.text in (None, "b")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.jsonl").write_bytes(jsonl("a"))
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        read(tmp_path / "*.jsonl")


def test_a_header_that_cannot_be_read_takes_nothing_with_it(tmp_path: Path) -> None:
    content = b'id,"text\n1,a\n2,b\n'
    (record,) = read_bytes(tmp_path / "c.csv", content)
    assert record.reason.startswith("in the header: broken CSV")
    assert record.lost_bytes == len(content)
    (record,) = read_bytes(tmp_path / "d.csv", b"1,hello\n")
    assert record.reason == "no text field 'text' (columns: 1, hello)"
    assert read_bytes(tmp_path / "e.csv", b"id,text\n") == []


def test_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    assert texts(read_bytes(tmp_path / "c.csv", b"text,text\na,b\n")) == [None]
    assert texts(read_bytes(tmp_path / "d.csv", b"id,id,text\n1,2,b\n")) == ["b"]
    twice = b'{"text": "a", "text": "b"}\n{"text": "c", "meta": {"text": "\\"text\\""}}\n'
    records = read_bytes(tmp_path / "c.jsonl", twice)
    assert texts(records) == [None, "c"]
    assert "twice" in records[0].reason
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    (record,) = read(tmp_path / "c.parquet")
    assert "2 columns" in record.reason


def test_rows_that_were_cut_or_joined_are_rejects(tmp_path: Path) -> None:
    content = b"id,text,score\n1,hello, world,5\n2,cut\nhere,5\n3,whole\n4,kept,\n5,a,b\n"
    records = read_bytes(tmp_path / "c.csv", content)
    assert texts(records) == [None, None, None, None, "kept", "a"]
    assert "more fields than the header (4 of 3 columns)" in records[0].reason
    assert "ends with its text (2 of 3 columns)" in records[1].reason
    # The text is closed by a delimiter: old Excel leaves out empty cells at the end.
    assert texts(read_bytes(tmp_path / "d.csv", b"text,a,b\nwhole,1\n")) == ["whole"]


@pytest.mark.parametrize(
    ("settings", "content"),
    [
        ({"delimiter": ";"}, b"id;text\n1;a, b\n"),
        ({"delimiter": "\\t"}, b"id\ttext\n1\ta, b\n"),
        ({"quote": "'"}, b"id,text\n1,'a, b'\n"),
        ({"delimiter": "|", "quote": ""}, b"id|text\n1|a, b\n"),
        ({"escape": "\\"}, b'id,text\n1,"a, b"\n'),
    ],
)
def test_tables_are_read_as_they_are_written(
    tmp_path: Path, settings: dict[str, str], content: bytes
) -> None:
    assert texts(read_bytes(tmp_path / "c.csv", content, csv=settings)) == ["a, b"]


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for settings in ({"delimiter": '"'}, {"delimiter": "\n"}, {"quote": "''"}, {"escape": '"'}):
        with pytest.raises(ValueError, match="csv"):
            read(tmp_path / "c.csv", csv=settings)


def test_names_and_settings_say_what_a_file_holds(tmp_path: Path) -> None:
    assert texts(read_bytes(tmp_path / "c.tsv", b"id\ttext\n1\ta, b\n")) == ["a, b"]
    table = b"id\ttext\n1\ta\n"
    assert texts(read_bytes(tmp_path / "dump.20240101", bz2.compress(table), format="tsv")) == ["a"]
    assert texts(read_bytes(tmp_path / "lines.txt", jsonl("a"), format="jsonl")) == ["a"]
    with pytest.raises(ConfigError, match="no known format") as caught:
        read_bytes(tmp_path / "dump", b"a")
    assert "corpus.format" in caught.value.hint
    # A web server may decompress on the way, a program may forget the ending: the first bytes tell.
    assert texts(read_bytes(tmp_path / "served.jsonl.gz", jsonl("a"))) == ["a"]
    assert texts(read_bytes(tmp_path / "forgotten.jsonl", zstandard.compress(jsonl("a")))) == ["a"]
    (record,) = read_bytes(tmp_path / "forced.jsonl", jsonl("a"), compression="gzip")
    assert record.reason.startswith("damaged gzip data")
    (record,) = read_bytes(tmp_path / "empty.jsonl.gz", b"")
    assert (record.reason, record.ends_early) == ("empty file, not gzip data", True)


@each_compression
@pytest.mark.slow
def test_an_archive_that_ends_early_or_is_damaged_says_so(tmp_path: Path, suffix: str) -> None:
    import random

    rng = random.Random(0)
    wanted = [" ".join(str(rng.random()) for _ in range(40)) for _ in range(2000)]
    content = COMPRESSORS[suffix](jsonl(*wanted))
    path = tmp_path / f"c.jsonl{suffix}"
    *documents, last = read_bytes(path, content[: len(content) * 2 // 3])
    assert texts(documents) == wanted[: len(documents)]
    assert documents or suffix == ".bz2"
    assert ("truncated" in last.reason, last.ends_early, last.n_lines) == (True, True, None)
    damaged = bytearray(content)
    middle = len(content) // 2
    damaged[middle : middle + 40] = b"\xff" * 40
    *documents, last = read_bytes(path, bytes(damaged))
    # Some formats notice at their checksum only.
    assert texts(documents[:900]) == wanted[: len(documents[:900])]
    assert (last.reason.startswith("damaged"), last.ends_early) == (True, True)
    if len(documents) < 1000:
        assert last.lost_bytes > len(content) * 0.3
    *documents, last = read_bytes(path, content + b"garbage")
    assert texts(documents) == wanted
    assert (last.lost_bytes < 100, last.ends_early) == (True, False)


@each_compression
@pytest.mark.slow
def test_an_archive_is_inflated_in_small_pieces(tmp_path: Path, suffix: str) -> None:
    n_bytes = 64 << 20
    content = COMPRESSORS[suffix](bytes(n_bytes))
    assert len(content) < n_bytes // 500
    path = tmp_path / f"c.txt{suffix}"
    path.write_bytes(content)
    kind = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}.get(suffix, "zstd")
    tracemalloc.start()
    with open(path, "rb") as raw:
        source = PlainBytes(raw, kind, len(content), is_certain=True)
        sizes = [len(piece) for piece in source]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (sum(sizes), source.failure) == (n_bytes, "")
    assert max(sizes) <= decompression.PIECE_BYTES
    # Dictionaries of the formats included: 8 MiB for xz.
    assert peak < 16 * decompression.PIECE_BYTES


def test_a_storage_that_stops_answering_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ClientPayloadError(Exception):
        """aiohttp's is no OSError."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ClientPayloadError("Response payload is not completed")

    class Holder:
        def open(self) -> Broken:
            return Broken()

    (tmp_path / "c.jsonl").write_bytes(jsonl("a"))
    monkeypatch.setattr("tasks.corpus.records.fsspec.open", lambda *_, **__: Holder())
    with pytest.raises(StorageError, match=r"c\.jsonl: reading failed: Response payload is not completed"):
        read(tmp_path / "c.jsonl")


# What rejects stand for, to the byte.

_PARTS = st.sampled_from(
    [
        '{"text": "a"}',
        '{"text": ""}',
        "1,a",
        '2,"x',
        '"',
        ",",
        "\r",
        "\n",
        "\r\n",
        "é",
        "\0",
        " ",
        "text",
        "[",
        "]",
    ]
)


@given(
    name=st.sampled_from(["c.jsonl", "c.txt", "c.csv", "c.tsv"]),
    parts=st.lists(st.one_of(_PARTS.map(str.encode), st.binary(max_size=3)), max_size=40),
    suffix=st.sampled_from(["", *COMPRESSORS]),
)
def test_every_byte_is_in_a_record(
    tmp_path_factory: pytest.TempPathFactory, name: str, parts: list[bytes], suffix: str
) -> None:
    content = b"".join(parts)
    # A mark or a magic number is no text of the file.
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"\x1f\x8b\x08")):
        return
    folder = tmp_path_factory.mktemp("bytes")
    is_table = name.endswith("sv")
    header = b"text\n" if is_table else b""
    path = folder / (name + suffix)
    path.write_bytes(COMPRESSORS.get(suffix, bytes)(header + content))
    records = read(path, compression="auto" if suffix else "none")
    assert sum(record.n_bytes for record in records) == len(content)
    assert all((record.text is None) == bool(record.reason) for record in records)
    assert all(record.n_lines for record in records)
    for skip in range(len(records) + 1):
        assert [record[:3] for record in read(path, skip, compression="auto" if suffix else "none")] == [
            record[:3] for record in records[skip:]
        ]


@given(
    table=st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))), max_size=8
    ),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
)
def test_what_the_csv_module_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str]], end: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "c.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("text",), *table])
    assert texts(read(path)) == [text or None for (text,) in table]


# What a run does with them.


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., tuple[CorpusShards, Storage]]:
    def tokenize(**corpus: Any) -> tuple[CorpusShards, Storage]:
        config = Config.model_validate(
            {
                "corpus": {"urls": [f"{tmp_path}/*.*"], "shard_tokens": 300, **corpus},
                "model": {"name": str(tokenizer_folder)},
                "storage": {"root": str(tmp_path / "root")},
            }
        )
        storage = Storage(config.storage.root)
        return plain.finished(config, storage, TOKENIZE).result(TOKENIZE), storage

    return tokenize


def rejects(shards: CorpusShards, storage: Storage) -> list[dict[str, Any]]:
    return [
        row
        for shard in shards.shards
        if shard.n_rejects
        for row in storage.read_parquet(f"{shard.folder}/rejects.parquet").to_pylist()
    ]


@pytest.mark.slow
def test_one_reject_that_stands_for_many_fails_the_run(tmp_path: Path, run: Any) -> None:
    lines = rows(1000)
    lines[600] = '600,"text number 600\n'
    (tmp_path / "c.csv").write_text("".join(lines))
    lost = len("".join(lines[600:]))
    with pytest.raises(
        CorpusError, match=rf"1 of 600 records .*{lost:,} of .*c\.csv:601: broken CSV"
    ) as caught:
        run()
    assert "corpus.csv" in caught.value.hint
    shards, storage = run(max_reject_share=0.5)
    (reject,) = rejects(shards, storage)
    assert (reject["lost_bytes"], reject["lost_lines"]) == (lost, 401)


@pytest.mark.slow
def test_a_file_of_a_thousand_that_cannot_be_read_is_named(tmp_path: Path, run: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(*tiny.texts(300, longest=3)))
    (tmp_path / "b.jsonl").write_bytes(jsonl("x").replace(b"text", b"body"))
    with pytest.raises(
        CorpusError, match=r"1 of 2 files gave no document .*b\.jsonl:1: no text field"
    ) as caught:
        run()
    assert "max_unreadable_files" in caught.value.hint
    assert run(max_unreadable_files=1)[0].n_rejects == 1
    assert run(max_reject_share=1)[0].n_rejects == 1
    # Nothing in it is nothing lost.
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    assert run()[0].n_rejects == 1


@pytest.mark.slow
def test_a_file_whose_end_is_missing_is_named(tmp_path: Path, run: Any) -> None:
    content = gzip.compress(jsonl(*tiny.texts(300, longest=3)))
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-4])
    with pytest.raises(CorpusError, match=r"1 of 1 files .*a\.jsonl\.gz:301: truncated gzip file"):
        run()
    assert run(max_unreadable_files=1)[0].n_documents == 300


def test_reasons_may_quote_what_is_no_text(tmp_path: Path, run: Any) -> None:
    (tmp_path / "a.csv").write_bytes(b"pr\xe9nom,body\nx,y\n")
    with pytest.raises(CorpusError, match=r"a\.csv:1: in the header: not valid UTF-8.*pr\\udce9nom"):
        run()


def test_a_setting_that_reads_otherwise_makes_other_shards(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n")

    def folder(**corpus: Any) -> str:
        values = {
            "corpus": {"urls": [f"{tmp_path}/a.csv"], **corpus},
            "model": {"name": str(tokenizer_folder)},
        }
        config, storage = Config.model_validate(values), Storage(str(tmp_path / "root"))
        return open_run(config, storage).find(TOKENIZE).units[0].folder

    found = {
        folder(),
        folder(format="tsv"),
        folder(compression="none"),
        folder(csv={"quote": ""}),
        folder(csv={"delimiter": ";"}),
    }
    assert len(found) == 5
    assert folder(max_unreadable_files=3) == folder()


@pytest.mark.slow
def test_a_run_that_was_killed_counts_the_same(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.corpus import token_shards

    lines = rows(400)
    for place in (50, 51, 200, 390):
        lines[place] = f"{place},too,many,fields\n"
    (tmp_path / "a.csv").write_text("".join(lines))
    close, closed = token_shards.OpenShard.close, [0]

    def dying(self: Any, folder: str, *, ends_file: bool) -> Any:
        closed[0] += 1
        if closed[0] == 3:
            raise KeyboardInterrupt
        return close(self, folder, ends_file=ends_file)

    monkeypatch.setattr(token_shards.OpenShard, "close", dying)
    with pytest.raises(KeyboardInterrupt):
        run(max_reject_share=0.1)
    shards, storage = run(max_reject_share=0.1)
    entries = [
        json.loads(path.read_text())["stats"] for path in Path(storage.root).glob("tokens/*/*/manifest.json")
    ]
    assert sum(entry["n_bytes"] for entry in entries) == len("".join(lines[1:]))
    assert sum(entry["lost_bytes"] for entry in entries) == sum(len(lines[i]) for i in (50, 51, 200, 390))
    assert [row["line"] for row in rejects(shards, storage)] == [51, 52, 201, 391]
