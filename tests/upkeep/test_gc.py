"""What nothing reaches is told with its bytes and its reason, and goes; everything else stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import plain
import pytest
from s3 import BUCKET, S3Root

from functok.cli import main
from infra import storage as storage_module
from infra.catalog import CATALOG, read_catalog
from infra.config_file import load_config
from infra.duck import connect
from infra.manifest import Manifest, commit
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError
from tasks.graph import extraction
from tasks.upkeep.gc import Garbage, delete_garbage, find_garbage
from tasks.upkeep.verify import verify_root

DAY = 24 * 3600.0


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, two days old; the local cache is empty."""
    monkeypatch.setattr(storage_module, "LOCAL_CACHE", tmp_path / "cache")
    extraction.forget_loaded()
    shutil.copytree(finished / "run", tmp_path / "run")
    age(tmp_path / "run")
    return tmp_path / "run"


def age(place: Path, days: float = 2) -> None:
    then = time.time() - days * DAY
    for path in (place, *place.rglob("*")):
        os.utime(path, (then, then))


def config_of(finished: Path, root: Path) -> Config:
    return load_config(finished / "tiny.toml", root=str(root))


def names(found: list[Garbage]) -> dict[str, str]:
    return {entry.name: entry.why for entry in found}


def test_a_finished_run_has_no_garbage(finished: Path, root: Path) -> None:
    storage = Storage(str(root))
    assert find_garbage(storage, older_than=DAY) == []
    assert find_garbage(storage, [config_of(finished, root)], older_than=DAY) == []


def test_what_killed_writers_left_goes_once_it_is_old(root: Path) -> None:
    storage = Storage(str(root))
    catalog = read_catalog(storage)
    shard = catalog.sharded["activations"][0].name.rpartition("/")[0]
    before = storage.listing().keys()
    left = {
        "features/00000000000000000000/activations.parquet": b"12345",
        f"{shard}/.edges.parquet.0123abcd.tmp": b"1",
        f"{shard}/of-an-older-version.parquet": b"12",
        "data_docs/validations/tokenize/old.html": b"123",
    }
    for name, content in left.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    assert find_garbage(storage, older_than=DAY) == []
    for name in left:
        age(root / name)
    found = find_garbage(storage, older_than=DAY)
    assert {entry.name: entry.n_bytes for entry in found} == {
        "features/00000000000000000000": 5,
        **{name: len(content) for name, content in left.items() if not name.startswith("features/0000")},
    }
    assert "killed" in names(found)["features/00000000000000000000"]
    assert delete_garbage(storage, found) == found
    assert storage.listing().keys() == before
    assert verify_root(storage).damaged == ()


def test_a_stray_file_takes_nothing_with_it(root: Path) -> None:
    storage = Storage(str(root))
    tokens = next((root / "tokens").iterdir()).name
    strays = [
        "dictionaries/.DS_Store",
        "features/mine/x",
        "tokens/.DS_Store",
        "tables/mine.csv",
        "tokenizers/notes.txt",
    ]
    dead = f"training/{'0' * 20}"
    left = {f"{dead}/losses.parquet", f"tokens/{tokens}/.DS_Store"}
    kept = {*strays, f"{dead}/state-00000007/state.safetensors", f"{dead}/state-00000007/manifest.json"}
    for name in (*left, *kept):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")
    (root / dead / "state-00000007" / "manifest.json").unlink()
    written = [storage.write_bytes(f"{dead}/state-00000007/state.safetensors", b"1")]
    commit(storage, f"{dead}/state-00000007", Manifest(stage="checkpoints", inputs={}), written)
    before = storage.listing().keys() | set(strays)
    age(root)
    delete_garbage(storage, find_garbage(storage, older_than=DAY))
    assert before - storage.listing().keys() == left


def test_replaced_tables_go_and_those_that_a_run_has_not_published_stay(root: Path) -> None:
    storage = Storage(str(root))
    folders = (f"tables/graph-{'1' * 20}", f"tables/graph-{'2' * 20}")
    for folder in folders:
        commit(
            storage, folder, Manifest(stage="tables", inputs={}), [storage.write_bytes(f"{folder}/x", b"1")]
        )
        age(root / folder, 4)
    assert not find_garbage(storage, older_than=5 * DAY)
    # Published three days ago: after the one, before the other.
    os.utime(root / CATALOG, (time.time() - 3 * DAY,) * 2)
    age(root / folders[1], 2.5)
    found = find_garbage(storage, older_than=DAY)
    assert names(found) == {folders[0]: "replaced: the catalogue does not name it"}
    delete_garbage(storage, found)
    assert not storage.sizes(folders[0])
    assert storage.sizes(folders[1])


def test_what_somebody_finished_or_published_meanwhile_stays(root: Path) -> None:
    storage = Storage(str(root))
    late = f"features/{'3' * 20}"
    (root / late).mkdir()
    (root / late / "x").write_bytes(b"1")
    age(root / late)
    found = find_garbage(storage, older_than=DAY)
    assert list(names(found)) == [late]
    commit(storage, late, Manifest(stage="features", inputs={}), [])
    published = read_catalog(storage).tables["coverage"].rpartition("/")[0]
    table = Garbage(name=published, kind="table", n_bytes=1, why="replaced")
    assert delete_garbage(storage, [*found, table]) == []
    assert (root / published).exists()


@pytest.mark.slow
def test_finished_work_goes_only_where_no_configuration_needs_it(finished: Path, root: Path) -> None:
    storage, config = Storage(str(root)), config_of(finished, root)
    other = config.model_copy(update={"windows": config.windows.model_copy(update={"context_size": 32})})
    of_config = set(storage.listing())
    plain.run_plain(other)
    of_other = {name for name in storage.listing() if name.startswith("features/")} - of_config
    age(root)
    assert of_other
    assert find_garbage(storage, older_than=DAY) == []
    unknown = config.model_copy(update={"windows": config.windows.model_copy(update={"context_size": 16})})
    with pytest.raises(ConfigError, match="features to do"):
        find_garbage(storage, [other, unknown], older_than=DAY)
    assert [entry.kind for entry in find_garbage(storage, [config, other], older_than=DAY)] == []
    kept = find_garbage(storage, [other], older_than=DAY)
    gone = {entry.name for entry in kept if entry.kind == "unit"}
    assert gone == {name.rpartition("/")[0] for name in of_config if name.startswith("features/")}
    delete_garbage(storage, kept)
    assert verify_root(storage).damaged == ()
    with connect(storage) as connection:
        assert connection.sql("SELECT count(*) FROM activations").fetchall()[0][0] > 0
    plain.run_plain(other)
    # It has published anew: the tables before are replaced ones, and all else is needed.
    assert {entry.kind for entry in find_garbage(storage, [other], older_than=DAY)} == {"table"}


def test_the_command_shows_and_deletes_when_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = root / "features" / ("4" * 20)
    dead.mkdir()
    (dead / "x").write_bytes(b"12345")
    for options, ends, is_there in (
        ([], "1 to delete, 5 bytes: --delete does it", True),
        (["--older-than", "100", "--delete"], "deleted 0, 0 bytes", True),
        (["--older-than", "0", "--delete"], "deleted 1, 5 bytes", False),
    ):
        age(dead)
        with pytest.raises(SystemExit) as ended:
            main(["gc", "--root", str(root), *options])
        assert ended.value.code == 0
        assert capsys.readouterr().out.splitlines()[-1] == ends
        assert (dead / "x").exists() == is_there


def test_the_command_refuses_a_place_where_nothing_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gc", "--root", str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    assert "there is nothing of functok's at" in capsys.readouterr().err


def test_copies_in_the_cache_whose_making_was_killed_go(root: Path, tmp_path: Path) -> None:
    aside = tmp_path / "cache" / "objects" / ".0123.abcd"
    aside.mkdir(parents=True)
    (aside / "w").write_bytes(b"123")
    (tmp_path / "cache" / "objects" / "whole").mkdir()
    age(tmp_path / "cache")
    found = find_garbage(Storage(str(root)), older_than=DAY)
    assert [(entry.name, entry.n_bytes) for entry in found] == [(str(aside), 3)]
    delete_garbage(Storage(str(root)), found)
    assert [path.name for path in (tmp_path / "cache" / "objects").iterdir()] == ["whole"]


def test_uploads_that_were_never_completed_go(moto_root: S3Root) -> None:
    storage = Storage(moto_root.url)
    moto_root.server.client().create_multipart_upload(Bucket=BUCKET, Key=f"{moto_root.prefix}/features/a/x")
    assert find_garbage(storage, older_than=20 * 365 * DAY) == []
    found = find_garbage(storage, older_than=0, now=time.time() + 60)
    assert names(found) == {"features/a/x": "an upload that was never completed"}
    delete_garbage(storage, found)
    assert moto_root.unfinished_uploads() == []


KILLED = """
import os, signal
import tasks
from sae_lens import SAE, SAETrainer
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_sae_lens_leaves_no_folders_of_wandb_when_it_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env=environment, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not [path.name for path in tmp_path.iterdir() if "wandb" in path.name]
