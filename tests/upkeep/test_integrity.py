"""One byte flips in a stored file: it is named, and nothing computed with it is wrong without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pyarrow as pa
import pytest
import tiny
from s3 import S3Root

from functok.cli import main
from infra import storage as storage_module
from infra import verified
from infra.catalog import CATALOG, Catalog, read_catalog, write_catalog
from infra.config_file import load_config
from infra.duck import connect, telling_damage
from infra.manifest import MANIFEST, Manifest, commit
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import DamagedError, FunctokError
from tasks.engine.tables import are_published
from tasks.graph import extraction
from tasks.report.report import is_report_current
from tasks.stages import open_run, table_groups
from tasks.upkeep.verify import repair, verify_root

PLACES: dict[str, Callable[[int], int]] = {
    "first": lambda size: 0,
    "middle": lambda size: size // 2,
    "last": lambda size: size - 1,
}


def flip(path: Path, place: str = "middle") -> None:
    """Change one bit of a file, its size left as it is."""
    content = bytearray(path.read_bytes())
    content[PLACES[place](len(content))] ^= 0x10
    path.write_bytes(content)


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run."""
    extraction.forget_loaded()
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def files_of(root: Path) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.stat().st_size
    )


def config_of(finished: Path, root: Path) -> Config:
    return load_config(finished / "tiny.toml", root=str(root))


def rows_of(storage: Storage, table: str) -> list[tuple[Any, ...]]:
    with telling_damage(), connect(storage) as connection:
        return sorted(connection.sql(f"SELECT * FROM {table}").fetchall(), key=repr)


# ---- functok verify
def test_a_sound_root_is_sound_and_every_file_is_known(root: Path) -> None:
    found = verify_root(Storage(str(root)))
    assert found.damaged == found.unknown == found.suspects == ()
    assert found.n_files == len([path for path in root.rglob("*") if path.is_file()])
    assert found.n_bytes == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("which", ["json", "others"])
def test_every_flipped_file_is_named(root: Path, place: str, which: str) -> None:
    # Manifests apart from what they name: a damaged one says nothing of its folder.
    flipped = [
        name
        for name in files_of(root)
        if (which == "json") == name.endswith(".json") and "data_docs" not in name
    ]
    if which == "others":
        flipped += [name for name in files_of(root) if "data_docs" in name and not name.endswith(MANIFEST)]
        flipped += [
            f for f in files_of(root) if f.endswith(("cfg.json", "tokenizer.json", "special_ids.json"))
        ]
    else:
        flipped = [name for name in flipped if not name.startswith("validation/results/") or MANIFEST in name]
    flipped = list(dict.fromkeys(flipped))
    assert len(flipped) > 10
    for name in flipped:
        flip(root / name, place)
    found = {entry.name for entry in verify_root(Storage(str(root))).damaged}
    hidden = {
        name for name in flipped if which == "json" and f"{name.rpartition('/')[0]}/{MANIFEST}" in flipped
    }
    assert set(flipped) - {name for name in hidden if not name.endswith(MANIFEST)} <= found


def test_files_that_are_gone_or_cut_are_named(root: Path) -> None:
    storage = Storage(str(root))
    shard = next(file.name for file in read_catalog(storage).sharded["occurrences"])
    table = read_catalog(storage).tables["coverage"]
    (root / shard).unlink()
    (root / table).write_bytes((root / table).read_bytes()[:-1])
    found = {entry.name: entry.why for entry in verify_root(storage).damaged}
    assert found.keys() == {shard, table, CATALOG}
    assert "not there" in found[shard]
    assert "bytes" in found[table]


@pytest.mark.slow
def test_verify_tells_repairs_and_makes_anew(
    finished: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, config = Storage(str(root)), config_of(finished, root)
    before = {table: rows_of(storage, table) for table in ("coverage", "activations", "tokens")}
    shard = read_catalog(storage).sharded["occurrences"][0].name
    flip(root / shard)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--root", str(root)])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert f"damaged: {shard}: its content is not what was written" in told.out
    assert "--repair" in told.err
    features = {file.name.rpartition("/")[0] for file in read_catalog(storage).sharded["activations"]}
    assert all(f"made from what is damaged: {folder}" in told.out for folder in features)

    monkeypatch.setattr("functok.pipeline.run_pipeline", lambda config, storage, **_: plain.run_plain(config))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(finished / "tiny.toml"), "--repair", "--root", str(root)])
    assert ended.value.code == 0
    assert f"removed: {shard.rpartition('/')[0]}" in capsys.readouterr().out
    assert verify_root(storage).damaged == ()
    assert {table: rows_of(storage, table) for table in before} == before
    assert config.storage.root == str(root)


@pytest.mark.slow
@pytest.mark.parametrize("name", [CATALOG, "report.html", "report.json", "dtype.json"])
def test_damaged_json_is_made_anew(finished: Path, root: Path, name: str) -> None:
    storage = Storage(str(root))
    before = rows_of(storage, "coverage")
    path = next(path for path in root.rglob(name))
    flip(path)
    assert [entry.name for entry in verify_root(storage).damaged] == [path.relative_to(root).as_posix()]
    if name == "dtype.json":
        with pytest.raises(DamagedError, match=r"dtype\.json"):
            plain.run_plain(config_of(finished, root))
        repair(storage, verify_root(storage))
    plain.run_plain(config_of(finished, root))
    assert verify_root(storage).damaged == ()
    assert is_report_current(storage)
    assert rows_of(storage, "coverage") == before


@pytest.mark.slow
def test_a_damaged_list_of_a_files_shards_is_no_list(finished: Path, root: Path) -> None:
    storage = Storage(str(root))
    before = rows_of(storage, "coverage")
    name = f"{next((root / 'tokens').iterdir()).relative_to(root)}/file.json"
    (root / name).write_bytes(b'{"shards": [')
    plain.run_plain(config_of(finished, root))
    assert rows_of(storage, "coverage") == before
    found = verify_root(storage)
    assert [entry.name for entry in found.damaged] == [name]
    assert repair(storage, found) == [name]
    assert verify_root(storage).damaged == ()


# ---- queries
@pytest.mark.slow
def test_no_query_reads_a_flipped_file(root: Path) -> None:
    storage = Storage(str(root))
    catalog = read_catalog(storage)
    files = {table: name for table, name in catalog.tables.items()}
    files |= {table: entries[-1].name for table, entries in catalog.sharded.items() if entries}
    assert {"coverage", "feature_degree", "activations", "occurrences"} <= files.keys()
    for table, name in files.items():
        sound = (root / name).read_bytes()
        flip(root / name)
        with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
            rows_of(storage, table)
        (root / name).write_bytes(sound)
        assert isinstance(rows_of(storage, table), list)


def test_other_tables_are_answered(root: Path) -> None:
    storage = Storage(str(root))
    flip(root / read_catalog(storage).sharded["activations"][0].name, "middle")
    assert rows_of(storage, "coverage")
    with pytest.raises(DamagedError, match="activations"):
        rows_of(storage, "activations")


def test_a_query_names_the_file_and_the_way_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = read_catalog(Storage(str(root))).tables["coverage"]
    flip(root / name)
    with pytest.raises(SystemExit) as ended:
        main(["query", "SELECT * FROM coverage", "--root", str(root)])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert name in told
    assert "functok verify CONFIG --repair" in told


# ---- later work
@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json", "edges.parquet", "tokenizer.json"])
@pytest.mark.slow
def test_a_file_that_joins_meets_the_damage_by_name(
    finished: Path, root: Path, tmp_path: Path, name: str
) -> None:
    storage = Storage(str(root))
    before = rows_of(storage, "coverage")
    folder = "features" if name == "edges.parquet" else ""
    path = next(path for path in root.rglob(name) if folder in path.as_posix())
    flip(path)
    tiny.write_jsonl(tmp_path / "more.jsonl", tiny.texts(5, seed=9))
    config = config_of(finished, root)
    urls = [*config.corpus.urls, str(tmp_path / "more.jsonl")]
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"urls": urls})})
    from tasks.corpus.token_shards import tokenizer_of

    tokenizer_of.cache_clear()
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        plain.run_plain(config)
    assert rows_of(storage, "coverage") == before


def test_a_copy_in_the_cache_is_fetched_again_and_a_damaged_object_is_refused(
    moto_root: S3Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "LOCAL_CACHE", tmp_path)
    storage = Storage(moto_root.url)
    written = [storage.write_bytes("dictionaries/k/w.safetensors", b"weights " * 1000)]
    commit(storage, "dictionaries/k", Manifest(stage="dictionaries", inputs={}), written)
    copy = verified.local_folder(storage, "dictionaries/k") / "w.safetensors"
    flip(copy)
    assert (verified.local_folder(storage, "dictionaries/k") / copy.name).read_bytes() == b"weights " * 1000
    storage.fs.pipe_file(storage.full("dictionaries/k/w.safetensors"), b"weights!" + b"weights " * 999)
    shutil.rmtree(copy.parent)
    with pytest.raises(DamagedError, match=r"k/w\.safetensors"):
        verified.local_folder(storage, "dictionaries/k")
    # As if it were large: a small one is hashed when it is read.
    monkeypatch.setattr(verified, "WHOLE", 0)
    for check in (verified.read_bytes, lambda storage, name: verified.check_files(storage, [name])):
        with pytest.raises(DamagedError, match=r"k/w\.safetensors"):
            check(storage, "dictionaries/k/w.safetensors")
    assert [entry.name for entry in verify_root(storage).damaged] == ["dictionaries/k/w.safetensors"]


def test_what_duckdb_reads_whole_from_s3_is_hashed_as_it_is_read(moto_root: S3Root) -> None:
    storage = Storage(moto_root.url)
    name = "tables/k/tokens.parquet"
    written = storage.write_parquet(name, pa.table({"token_id": range(1000)}), compression="none")
    commit(storage, "tables/k", Manifest(stage="tables", inputs={}), [written])
    write_catalog(storage, Catalog(tables={"tokens": name}))
    query = "SELECT sum(token_id) FROM tokens"
    with connect(storage) as connection:
        assert connection.execute(query).fetchone() == (499500,)
    content = storage.read_bytes(name)
    storage.fs.pipe_file(storage.full(name), content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with (
        pytest.raises(DamagedError, match=r"k/tokens\.parquet is damaged"),
        telling_damage(),
        connect(storage) as connection,
    ):
        connection.execute(query).fetchone()


def test_what_was_made_anew_elsewhere_is_read(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    commit(storage, "a/k", Manifest(stage="x", inputs={}), [storage.write_bytes("a/k/f", b"one")])
    assert verified.read_bytes(storage, "a/k/f") == b"one"
    other = storage.write_bytes("a/k/f", b"two")
    storage.write_json(
        "a/k/manifest.json", {"stage": "x", "inputs": {}, "files": {"f": 3}, "hashes": {"f": other.sha256}}
    )
    assert verified.read_bytes(storage, "a/k/f") == b"two"


def test_stored_json_reads_as_it_was_and_older_json_is_taken(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    value = {"b": {2: "x", 10: "y"}, "a": [1.5, None], "ü": "日本"}
    storage.write_json("v.json", value)
    assert storage.read_json("v.json") == {"b": {"2": "x", "10": "y"}, "a": [1.5, None], "ü": "日本"}
    storage.write_bytes("old.json", b'{"a": 1}')
    assert storage.read_json("old.json") == {"a": 1}


def test_a_retry_cannot_mend_damage() -> None:
    assert not DamagedError("x").retryable
    assert issubclass(DamagedError, FunctokError)


def test_tables_are_not_current_where_a_catalogue_is_damaged(finished: Path, root: Path) -> None:
    storage, config = Storage(str(root)), config_of(finished, root)
    groups = table_groups(config)
    assert are_published(open_run(config, storage), groups)
    flip(root / CATALOG)
    assert not are_published(open_run(config, storage), groups)
