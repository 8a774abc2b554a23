"""Every format, and every kind of bad input: documents + rejects = records read."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from schemas.config import Config
from schemas.errors import ConfigError
from tasks.corpus.files import corpus_files
from tasks.corpus.records import Record, read_records


def config_for(*urls: str, **corpus: Any) -> Config:
    return Config.model_validate({"corpus": {"urls": list(urls), **corpus}, "model": {"name": "unused"}})


def read(path: Path | str, skip: int = 0, **corpus: Any) -> list[Record]:
    config = config_for(str(path), **corpus)
    return [record for file in corpus_files(config) for record in read_records(file, config.corpus, skip)]


def shown(records: list[Record]) -> list[tuple[int, str | None, str]]:
    return [(record.line, record.text, record.reason.split(":")[0]) for record in records]


def jsonl(*texts: object) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


BAD_JSONL = b"".join(
    [
        b'{"text": "good"}\n',
        b'{"text": "broken\n',
        b'{"title": "no text"}\n',
        b'{"text": 7}\n',
        b'{"text": null}\n',
        b'{"text": ""}\n',
        b'{"text": "bad \xff byte"}\n',
        b'{"text": "lone \\ud800 surrogate"}\n',
        b"[1, 2]\n",
        b"\n",
        b"[" * 100_000 + b"\n",
        b'{"text": "last, no newline"}',
    ]
)
BAD_JSONL_SHOWN = [
    (1, "good", ""),
    (2, None, "broken JSON"),
    (3, None, "no text field 'text'"),
    (4, None, "text is int, not text"),
    (5, None, "text is NoneType, not text"),
    (6, None, "empty text"),
    (7, None, "not valid UTF-8"),
    (8, None, "text is not valid Unicode"),
    (9, None, "no text field 'text'"),
    (10, None, "empty record"),
    (11, None, "broken JSON"),
    (12, "last, no newline", ""),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_each_bad_line_is_one_reject_with_its_line(tmp_path: Path, suffix: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(compress(BAD_JSONL))
    assert shown(read(path)) == BAD_JSONL_SHOWN


@pytest.mark.parametrize("skip", range(13))
def test_skipping_records_gives_the_rest(tmp_path: Path, skip: int) -> None:
    (tmp_path / "c.jsonl").write_bytes(BAD_JSONL)
    assert shown(read(tmp_path / "c.jsonl", skip=skip)) == BAD_JSONL_SHOWN[skip:]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.slow
def test_a_truncated_archive_keeps_what_was_read_and_says_so(
    tmp_path: Path, suffix: str, share: float
) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    import random

    rng = random.Random(0)
    texts = [" ".join(str(rng.random()) for _ in range(40)) for _ in range(3000)]
    blob = compress(jsonl(*texts))
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(blob[: int(len(blob) * share)])
    *documents, last = read(path)
    assert [record.text for record in documents] == texts[: len(documents)]
    assert last.text is None
    assert "truncated" in last.reason
    assert last.line == len(documents) + 1
    assert len(documents) > 3000 * share * 0.5


def test_members_of_one_archive_follow_each_other_and_garbage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("a")) + gzip.compress(jsonl("b")) + b"garbage")
    *documents, last = read(path)
    assert [record.text for record in documents] == ["a", "b"]
    assert last.reason.startswith("damaged gzip data")


def test_csv_rows_quotes_and_ragged_rows(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\n1,plain\n2,"two\nlines, ""quoted"""\n3\n4,""\n5,bad \xff byte\n\n6,"open'
    )
    assert shown(read(path)) == [
        (2, "plain", ""),
        (3, 'two\nlines, "quoted"', ""),
        (5, None, "no text field 'text' (1 of 2 columns)"),
        (6, None, "empty text"),
        (7, None, "text is not valid Unicode"),
        (8, None, "empty record"),
        (9, None, "broken CSV"),
    ]


def test_csv_without_the_column_rejects_every_row_and_names_the_columns(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,body\n1,x\n2,y\n")
    reasons = [record.reason for record in read(tmp_path / "c.csv")]
    assert reasons == ["no text field 'text' (columns: id, body)"] * 2
    assert [record.text for record in read(tmp_path / "c.csv", text_field="body")] == ["x", "y"]


def test_txt_by_line_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"one\r\ntwo\n\nthree")
    assert shown(read(tmp_path / "c.txt")) == [
        (1, "one", ""),
        (2, "two", ""),
        (3, None, "empty text"),
        (4, "three", ""),
    ]
    assert [record.text for record in read(tmp_path / "c.txt", txt_records="file")] == ["one\r\ntwo\n\nthree"]


def parquet(path: Path, values: pa.Array, **options: Any) -> Path:
    pq.write_table(pa.table({"id": range(len(values)), "text": values}), path, **options)
    return path


def test_parquet_rows_nulls_types_and_bad_utf8(tmp_path: Path) -> None:
    mixed = parquet(tmp_path / "a.parquet", pa.array(["a", None, "", "b"]), row_group_size=2)
    assert shown(read(mixed)) == [
        (1, "a", ""),
        (2, None, "text is NoneType, not text"),
        (3, None, "empty text"),
        (4, "b", ""),
    ]
    assert shown(read(mixed, skip=3)) == [(4, "b", "")]
    bad = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    assert shown(read(parquet(tmp_path / "b.parquet", bad))) == [
        (1, "ok", ""),
        (2, None, "text is not valid Unicode"),
    ]
    numbers = parquet(tmp_path / "n.parquet", pa.array([1, 2]))
    assert [record.reason for record in read(numbers)] == ["text is int, not text"] * 2
    assert [record.reason for record in read(mixed, text_field="body")] == ["no text field 'body'"] * 4
    words = parquet(tmp_path / "d.parquet", pa.array(["x", "y", "x"]).dictionary_encode())
    assert [record.text for record in read(words)] == ["x", "y", "x"]


def test_a_truncated_parquet_file_is_one_reject(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array(["a", "b"]))
    path.write_bytes(path.read_bytes()[:-20])
    (record,) = read(path)
    assert record.line == 0
    assert record.reason.startswith("unreadable Parquet file")


def test_a_damaged_row_group_loses_only_its_rows(tmp_path: Path) -> None:
    values = pa.array([f"text number {i}" for i in range(100)])
    path = parquet(
        tmp_path / "a.parquet", values, row_group_size=50, use_dictionary=False, compression="zstd"
    )
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    blob = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    blob[middle : middle + 40] = b"\x00" * 40
    path.write_bytes(blob)
    records = read(path)
    assert len(records) == 100
    assert all("damaged Parquet row group 0" in record.reason for record in records[:50])
    assert [record.text for record in records[50:]] == [f"text number {i}" for i in range(50, 100)]


def test_a_record_beyond_the_limit_is_rejected_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tasks.corpus.lines", "tasks.corpus.records"):
        monkeypatch.setattr(f"{module}.MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr("tasks.corpus.decompression.PIECE_BYTES", 1 << 16)
    (tmp_path / "c.jsonl").write_bytes(jsonl("a") + jsonl("x" * (3 << 20)) + jsonl("b"))
    assert shown(read(tmp_path / "c.jsonl")) == [
        (1, "a", ""),
        (2, None, "record longer than 1 MiB"),
        (3, "b", ""),
    ]


def test_globs_sort_and_archives_chain(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(name))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("in/2.csv", "text\ntwo\n")
        archive.writestr("in/1.csv", "text\none\n")
    assert [record.text for record in read(tmp_path / "*.jsonl")] == ["a", "b", "c"]
    assert [record.text for record in read(f"zip://in/*.csv::{tmp_path}/z.zip")] == ["one", "two"]
    assert [record.text for record in read(f"zip://in/2.csv::{tmp_path}/z.zip")] == ["two"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/none-*.jsonl", "matches no file"),
        ("{}/none.jsonl", "is not there"),
        ("{}/a.doc", "no known format"),
        ("nosuch://x/a.jsonl", "cannot understand"),
        ("s3://key:secret@bucket/a.jsonl", "holds a password"),
    ],
)
def test_urls_that_cannot_be_used_are_named(tmp_path: Path, url: str, message: str) -> None:
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ConfigError, match=message) as caught:
        corpus_files(config_for(url.format(tmp_path)))
    assert "secret" not in str(caught.value)


def test_a_file_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("a"))
    with pytest.raises(ConfigError, match="twice"):
        corpus_files(config_for(f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl"))
