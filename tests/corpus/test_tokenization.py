"""Token shards: counts against Python's, limits in file order, and runs that go on where another stopped."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import plain
import pytest
import reference
import tiny

from infra.hashing import file_hash
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError, ExpectationError
from schemas.expectation import Rows
from schemas.work import CorpusShards
from tasks.corpus import token_shards
from tasks.corpus.file_jobs import Budget
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine import checks
from tasks.engine.checks import ASKED, check
from tasks.stages import open_run


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


def make(
    tmp_path: Path, tokenizer_folder: Path, files: dict[str, list[str]], root: str = "run", **corpus: Any
) -> Config:
    for name, documents in files.items():
        tiny.write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", documents)
    return Config.model_validate(
        {
            "corpus": {"urls": [f"{tmp_path}/corpus/*.jsonl"], "shard_tokens": 300, **corpus},
            "model": {"name": str(tokenizer_folder)},
            "storage": {"root": str(tmp_path / root)},
        }
    )


def run(config: Config) -> tuple[CorpusShards, Storage]:
    storage = Storage(config.storage.root)
    return plain.finished(config, storage, TOKENIZE).result(TOKENIZE), storage


def shards_of(config: Config, storage: Storage) -> CorpusShards | None:
    """The shards, if all of them are there."""
    shards: CorpusShards | None = plain.there(open_run(config, storage), TOKENIZE)
    return shards


def read_all(
    storage: Storage, shards: CorpusShards
) -> tuple[list[list[tuple[int, int]]], Counter[int], Counter[int]]:
    """Documents as (position, id) lists, counts, document counts."""
    documents: list[list[tuple[int, int]]] = [[] for _ in range(shards.n_documents)]
    counts: Counter[int] = Counter()
    doc_counts: Counter[int] = Counter()
    for shard in shards.shards:
        for row in storage.read_parquet(f"{shard.folder}/occurrences.parquet").to_pylist():
            documents[row["doc"] + shard.doc_offset].append((row["position"], row["token_id"]))
        for row in storage.read_parquet(f"{shard.folder}/token_counts.parquet").to_pylist():
            counts[row["token_id"]] += row["count"]
            doc_counts[row["token_id"]] += row["doc_count"]
    return documents, counts, doc_counts


@pytest.mark.slow
def test_shards_hold_what_the_tokenizer_gives(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = [*tiny.texts(40), "x <eos> y <bos>", "<pad>"]
    shards, storage = run(make(tmp_path, tokenizer_folder, {"a": documents[:25], "b": documents[25:]}))
    ids, special = reference.tokenize(tokenizer_folder, documents)
    found, counts, doc_counts = read_all(storage, shards)
    assert found == [
        [(position, token) for position, token in enumerate(document) if token not in special]
        for document in ids
    ]
    rows = reference.tokens_table(ids, special, 0.4)
    assert counts == {token: row["count"] for token, row in rows.items()}
    assert doc_counts == {token: row["doc_count"] for token, row in rows.items()}
    assert len(shards.shards) > 4
    fed = [
        (row["doc"] + shard.doc_offset, row["position"], row["token_id"])
        for shard in shards.shards
        if shard.has_specials
        for row in storage.read_parquet(f"{shard.folder}/specials.parquet").to_pylist()
    ]
    assert {shard.has_specials for shard in shards.shards} == {True, False}
    assert fed == [(d, p, t) for d, doc in enumerate(ids) for p, t in enumerate(doc) if t in special]
    assert shards_of(make(tmp_path, tokenizer_folder, {}), storage) == shards


@pytest.mark.parametrize("limit", [1, 7, 13, 24, 25, 26, 39, 40, 100])
@pytest.mark.slow
def test_max_documents_takes_the_first_in_file_order(
    tmp_path: Path, tokenizer_folder: Path, limit: int
) -> None:
    documents = tiny.texts(40)
    config = make(tmp_path, tokenizer_folder, {"a": documents[:25], "b": documents[25:]}, max_documents=limit)
    shards, storage = run(config)
    ids, special = reference.tokenize(tokenizer_folder, documents[:limit])
    assert read_all(storage, shards)[1] == {
        t: r["count"] for t, r in reference.tokens_table(ids, special, 1).items()
    }
    assert shards.n_documents == min(limit, 40)
    assert shards_of(config, storage) == shards


@pytest.mark.parametrize("share", [0.05, 0.33, 0.62, 0.63, 0.99, 1.0, 2.0])
@pytest.mark.slow
def test_max_tokens_ends_before_the_document_that_does_not_fit(
    tmp_path: Path, tokenizer_folder: Path, share: float
) -> None:
    documents = tiny.texts(40)
    lengths = [len(document) for document in reference.tokenize(tokenizer_folder, documents)[0]]
    limit = int(sum(lengths) * share)
    files = {"a": documents[:25], "b": documents[25:]}
    shards, _ = run(make(tmp_path, tokenizer_folder, files, max_tokens=limit))
    fitting = next((n for n in range(41) if sum(lengths[: n + 1]) > limit or n == 40), 40)
    assert (shards.n_documents, shards.n_tokens) == (fitting, sum(lengths[:fitting]))
    # Another limit, or none, over the same storage gives what a fresh run gives.
    unlimited, _ = run(make(tmp_path, tokenizer_folder, files))
    assert unlimited.n_tokens == sum(lengths)
    fresh, _ = run(make(tmp_path, tokenizer_folder, files, root="fresh"))
    assert unlimited == fresh


@pytest.mark.slow
def test_files_behind_a_limit_are_not_read(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tiny.texts(10, seed=index) for index, name in enumerate("abc")}
    config = make(tmp_path, tokenizer_folder, files, max_documents=12)
    read, asked = token_shards.read_records, []

    def noting(file: Any, *rest: Any) -> Any:
        asked.append(Path(file.url).stem)
        return read(file, *rest)

    monkeypatch.setattr(token_shards, "read_records", noting)
    told: list[tuple[int, int, str]] = []
    done = plain.finished(config, None, TOKENIZE, progress=lambda *report: told.append(report))
    assert asked == ["a", "b"]
    assert {Path(shard.source).stem for shard in done.result(TOKENIZE).shards} == {"a", "b"}
    # It ends with the whole, although the last file was not read.
    size = sum(file.stat().st_size for file in (tmp_path / "corpus").iterdir())
    assert (told[0], told[-1]) == ((0, size, "bytes, tokenization"), (size, size, "bytes, tokenization"))
    assert told == sorted(told)
    # Another limit goes on with the file that it reaches.
    asked.clear()
    run(make(tmp_path, tokenizer_folder, {}, max_documents=22))
    assert asked == ["b", "c"]


def test_a_limit_below_the_first_document_fails_clearly(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(CorpusError, match="no document"):
        run(make(tmp_path, tokenizer_folder, {"a": ["of the river " * 50]}, max_tokens=5))


@pytest.mark.slow
def test_a_killed_file_goes_on_after_its_finished_shards(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = tiny.texts(60)
    config = make(tmp_path, tokenizer_folder, {"a": documents})
    fresh, _ = run(make(tmp_path, tokenizer_folder, {"a": documents}, root="fresh"))
    closed: list[str] = []
    close = token_shards.OpenShard.close

    def dying(self: Any, folder: str, *, ends_file: bool) -> Any:
        if len(closed) == 3:
            raise KeyboardInterrupt
        closed.append(folder)
        return close(self, folder, ends_file=ends_file)

    monkeypatch.setattr(token_shards.OpenShard, "close", dying)
    storage = Storage(config.storage.root)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert shards_of(config, storage) is None
    again: list[str] = []
    monkeypatch.setattr(
        token_shards.OpenShard,
        "close",
        lambda self, folder, *, ends_file: (again.append(folder), close(self, folder, ends_file=ends_file))[
            1
        ],
    )
    assert run(config)[0] == fresh
    assert set(again).isdisjoint(closed)
    assert read_all(storage, fresh) == read_all(Storage(str(tmp_path / "fresh")), fresh)


@pytest.mark.slow
def test_a_file_that_joins_computes_its_own_shards_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = tiny.texts(40)
    run(make(tmp_path, tokenizer_folder, {"b": documents[:20]}))
    config = make(tmp_path, tokenizer_folder, {"a": documents[20:]})
    there = open_run(config, Storage(config.storage.root)).find(TOKENIZE)
    assert [unit.about.rsplit("/", 1)[1] for unit in there.units if unit.folder in there.done] == ["b.jsonl"]
    assert [unit.about.rsplit("/", 1)[1] for unit in there.missing] == ["a.jsonl"]
    shards, storage = run(config)
    fresh, fresh_storage = run(make(tmp_path, tokenizer_folder, {}, root="fresh"))
    assert shards == fresh
    assert read_all(storage, shards) == read_all(fresh_storage, fresh)


def test_files_of_equal_content_count_twice_and_share_shards(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = tiny.texts(10)
    shards, storage = run(make(tmp_path, tokenizer_folder, {"a": documents, "b": documents}))
    assert shards.n_documents == 20
    assert len({shard.folder for shard in shards.shards}) * 2 == len(shards.shards)
    one = read_all(storage, shards)[0]
    assert one[:10] == one[10:]


@pytest.mark.slow
def test_damage_is_noticed_and_mended(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = make(tmp_path, tokenizer_folder, {"a": tiny.texts(40)})
    shards, storage = run(config)
    damaged = Path(storage.full(f"{shards.shards[1].folder}/occurrences.parquet"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-10])
    assert shards_of(config, storage) is None
    assert run(config)[0] == shards
    assert damaged.read_bytes() == whole


@pytest.mark.slow
def test_too_many_rejects_fail_with_examples_and_the_way_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = make(tmp_path, tokenizer_folder, {"a": [*tiny.texts(20), "", ""]})
    with pytest.raises(CorpusError, match=r"2 of 22 records.*a\.jsonl:21: empty text") as caught:
        run(config)
    assert "max_reject_share" in caught.value.hint
    relaxed = make(tmp_path, tokenizer_folder, {}, max_reject_share=0.1)
    shards, _ = run(relaxed)
    assert (shards.n_documents, shards.n_rejects) == (20, 2)


def test_rejects_at_the_end_of_a_file_and_a_file_of_rejects(tmp_path: Path, tokenizer_folder: Path) -> None:
    files = {"a": ["x", "", ""], "b": [""], "c": ["y"]}
    shards, _ = run(make(tmp_path, tokenizer_folder, files, max_reject_share=1))
    assert (shards.n_documents, shards.n_rejects) == (2, 3)


def test_counting_only_keeps_no_occurrences(tmp_path: Path, tokenizer_folder: Path) -> None:
    shards, storage = run(make(tmp_path, tokenizer_folder, {"a": tiny.texts(10)}, keep_occurrences=False))
    assert not any("occurrences" in name for name in storage.sizes())
    assert shards.n_tokens > 0


def test_a_document_that_breaks_the_tokenizer_is_one_reject(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fragile:
        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def encode(self, text: str, add_special_tokens: bool) -> Any:
            if "poison" in text:
                raise ValueError("cannot")
            return self.backend.encode(text, add_special_tokens=add_special_tokens)

        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
            return [self.encode(text, add_special_tokens) for text in texts]

    real = token_shards.tokenizer_of

    def fragile(storage: Storage, folder: str) -> Any:
        backend, special = real(storage, folder)
        return Fragile(backend), special

    monkeypatch.setattr(token_shards, "tokenizer_of", fragile)
    shards, storage = run(make(tmp_path, tokenizer_folder, {"a": ["x", "poison", "y"]}, max_reject_share=1))
    assert shards.n_documents == 2
    rejects = storage.read_parquet(f"{shards.shards[0].folder}/rejects.parquet").to_pylist()
    assert rejects == [
        {
            "line": 2,
            "reason": "the tokenizer failed: cannot",
            "lost_bytes": len(b'{"text": "poison"}\n'),
            "lost_lines": 1,
        }
    ]


def test_a_changed_file_and_a_changed_setting_change_the_key(tmp_path: Path, tokenizer_folder: Path) -> None:
    def folder(**corpus: Any) -> str:
        config = make(tmp_path, tokenizer_folder, {}, **corpus)
        return open_run(config, Storage(config.storage.root)).find(TOKENIZE).units[0].folder

    make(tmp_path, tokenizer_folder, {"a": ["x"]})
    first = folder()
    assert folder() == folder(max_documents=5) == folder(max_reject_share=0.5) == first
    assert folder(shard_tokens=7) != first
    make(tmp_path, tokenizer_folder, {"a": ["y"]})
    assert folder() != first


def test_content_that_changes_behind_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("one")
    times = (1_700_000_000_000_000_000, 1_700_000_000_000_000_000)
    os.utime(path, ns=times)
    first = file_hash(path)
    path.write_text("two")
    os.utime(path, ns=times)
    assert file_hash(path) != first
    assert file_hash(path) == hashlib.sha256(b"two").hexdigest()


def test_budget_arithmetic() -> None:
    assert Budget().is_open
    assert not Budget(documents=3).is_open
    assert Budget(documents=0).is_spent
    assert Budget(documents=2, tokens=10).allows(2, 10)
    assert not Budget(documents=2, tokens=10).allows(2, 11)


@pytest.mark.cluster
def test_workers_give_what_one_process_gives(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.corpus.tokenization.SMALL_BYTES", 0)
    files = {name: tiny.texts(15, seed=index) for index, name in enumerate("abcd")}
    many, _ = run(make(tmp_path, tokenizer_folder, files, root="many"))
    ids, special = reference.tokenize(tokenizer_folder, [text for name in "abcd" for text in files[name]])
    found, counts, _ = read_all(Storage(str(tmp_path / "many")), many)
    assert [[token for _, token in document] for document in found] == ids
    assert sum(counts.values()) == many.n_tokens
    assert not special & set(counts)


# ---- what is asked of a shard as it is made
def verdict(config: Config, storage: Storage) -> str:
    """What the check of the tokens says."""
    try:
        check(open_run(config, storage), TOKENIZE)
    except ExpectationError as error:
        return str(error)
    return "passed"


@pytest.mark.slow
def test_a_fault_of_the_making_is_found_alike_in_the_rows_and_in_the_files(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = token_shards._counts

    def wrong(*columns: Any) -> Any:
        ids, counts, doc_counts = count(*columns)
        return [ids, counts + (ids == ids[0]), doc_counts]

    monkeypatch.setattr(token_shards, "_counts", wrong)
    config = make(tmp_path, tokenizer_folder, {"a": tiny.texts(20), "b": tiny.texts(3, seed=1)})
    shards, storage = run(config)
    told = verdict(config, storage)
    assert "'sum(tokens.count) = count(occurrences)'" in told
    assert f"folder: {shards.shards[0].folder}" in told
    for shard in shards.shards:
        manifest = storage.read_json(f"{shard.folder}/manifest.json")
        assert manifest["stats"].pop(ASKED)
        storage.write_json(f"{shard.folder}/manifest.json", manifest)
    assert verdict(config, storage) == told


@pytest.mark.slow
def test_files_are_asked_where_the_manifest_has_no_answer_to_what_is_asked_now(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(tmp_path, tokenizer_folder, {"a": tiny.texts(20)})
    shards, storage = run(config)
    read: list[str] = []
    ask = checks.find_in_units

    def noting(*arguments: Any) -> Any:
        read.extend(unit.folder for unit in arguments[3])
        return ask(*arguments)

    monkeypatch.setattr(checks, "find_in_units", noting)
    assert verdict(config, storage) == "passed"
    assert read == []
    more = Rows(
        name="no document is long",
        table="documents",
        shard=True,
        meaning="A document has fewer than 3 tokens.",
        must="n_tokens < 3",
        show="folder, doc, n_tokens",
    )
    monkeypatch.setitem(checks.SUITES, "tokenize", (*checks.SUITES["tokenize"], more))
    assert "'no document is long'" in verdict(config, storage)
    assert read == [shard.folder for shard in shards.shards]


def test_what_has_no_rows_is_not_written(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = make(tmp_path, tokenizer_folder, {"a": tiny.texts(3)})
    with open(tmp_path / "corpus" / "b.jsonl", "w") as file:
        file.write('{"text": "a <eos> b"}\nno json\n')
    config = make(tmp_path, tokenizer_folder, {}, max_reject_share=0.9)
    shards, storage = run(config)
    files = {shard.source[-7:]: set(storage.sizes(shard.folder)) for shard in shards.shards}
    plain_files = {"documents.parquet", "token_counts.parquet", "occurrences.parquet", "manifest.json"}
    names = {source: {name.rsplit("/", 1)[1] for name in found} for source, found in files.items()}
    assert names["a.jsonl"] == plain_files
    assert names["b.jsonl"] == {*plain_files, "rejects.parquet", "specials.parquet"}
    assert not [name for name in storage.sizes("tokens") if name.endswith("file.json")]
