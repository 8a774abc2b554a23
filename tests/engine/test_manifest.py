"""What is done: keys of content, and manifests that are written last."""

from __future__ import annotations

import os
import signal
import string
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3 import S3Root

from infra.manifest import MANIFEST, Manifest, commit, content_key, load, load_all
from infra.storage import Storage, StoredFile

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
PARTS = st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=6), JSON, max_size=5)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def backwards(value: Any) -> Any:
    """The same with every dictionary's keys inserted the other way round."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


# ---- keys
@given(PARTS)
@pytest.mark.slow
def test_the_order_of_keys_does_not_matter(parts: dict[str, Any]) -> None:
    assert content_key(**parts) == content_key(**backwards(parts))


@given(PARTS, PARTS)
@pytest.mark.slow
def test_other_parts_have_another_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    # 1, 1.0 and True are equal to Python, and not to a configuration.
    assert (content_key(**one) == content_key(**other)) == (
        repr(backwards_sorted(one)) == repr(backwards_sorted(other))
    )


def backwards_sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: backwards_sorted(value[key]) for key in sorted(value)}
    return [backwards_sorted(item) for item in value] if isinstance(value, list) else value


@pytest.mark.process
def test_a_key_is_the_same_in_every_process_and_version() -> None:
    code = "from infra.manifest import content_key; print(content_key(b={'y': 1, 'x': [1.5, None]}, a='ü'))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    # A change of this key would make every user's finished work unknown.
    assert keys == {"273e49ffa56ac4ebaa4e"}


# ---- manifests
def make(storage: Storage, folder: str, **files: bytes) -> Manifest:
    written = [storage.write_bytes(f"{folder}/{name}", content) for name, content in files.items()]
    return commit(storage, folder, Manifest(stage="tokenize", inputs={"a": 1}, stats={"n": 2}), written)


def test_what_is_committed_is_loaded(storage: Storage) -> None:
    made = make(storage, "t/1", a=b"12", b=b"")
    assert made.files == {"a": 2, "b": 0}
    assert made.hashes == {"a": sha256(b"12").hexdigest(), "b": sha256(b"").hexdigest()}
    assert load(storage, "t/1") == made
    assert load(storage, "t/2") is None
    assert load_all(storage, []) == {}
    many = {f"t/{place}": make(storage, f"t/{place}", a=b"1" * place) for place in range(2, 7)}
    assert load_all(storage, ["t/1", "no/such", *many, "t/1"]) == {"t/1": made, **many}


def test_a_folder_is_done_when_its_manifest_is_written_and_not_before(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = Storage.write_bytes

    def note(self: Storage, name: str, content: bytes) -> StoredFile:
        assert load(self, "t/1") is None
        written.append(name)
        return original(self, name, content)

    monkeypatch.setattr(Storage, "write_bytes", note)
    make(storage, "t/1", b=b"1", a=b"2")
    assert written == ["t/1/b", "t/1/a", f"t/1/{MANIFEST}"]
    assert load(storage, "t/1") is not None


@pytest.mark.parametrize("others", [0, 5])
@pytest.mark.parametrize(
    "damage", ["truncated", "longer", "gone", "manifest truncated", "manifest of another kind"]
)
def test_a_damaged_folder_is_not_done(storage: Storage, damage: str, others: int) -> None:
    made = make(storage, "t/1", a=b"12", b=b"34")
    folders = [f"t/other{place}" for place in range(others)]
    for folder in folders:
        make(storage, folder, a=b"1")
    match damage:
        case "truncated":
            storage.write_bytes("t/1/a", b"1")
        case "longer":
            storage.write_bytes("t/1/a", b"123")
        case "gone":
            storage.delete("t/1/a")
        case "manifest truncated":
            storage.write_bytes(f"t/1/{MANIFEST}", storage.read_bytes(f"t/1/{MANIFEST}")[:-5])
        case _:
            storage.write_bytes(f"t/1/{MANIFEST}", b'["not", "a manifest"]')
    assert list(load_all(storage, ["t/1", *folders])) == folders
    assert make(storage, "t/1", a=b"12", b=b"34") == made
    assert load(storage, "t/1") == made


def test_what_a_killed_writer_left_is_not_committed(storage: Storage) -> None:
    storage.write_bytes("t/1/left", b"1")
    assert make(storage, "t/1", a=b"12").files == {"a": 2}


def test_a_file_of_another_folder_is_not_committed(storage: Storage) -> None:
    elsewhere = storage.write_bytes("t/2/a", b"1")
    with pytest.raises(ValueError, match="t/2/a is not in t/1"):
        commit(storage, "t/1", Manifest(stage="tokenize", inputs={}), [elsewhere])
    assert load(storage, "t/1") is None


def test_a_manifest_from_before_hashes_is_known(storage: Storage) -> None:
    storage.write_bytes("t/1/a", b"12")
    storage.write_json(f"t/1/{MANIFEST}", {"stage": "tokenize", "inputs": {}, "files": {"a": 2}, "stats": {}})
    assert load(storage, "t/1") == Manifest(stage="tokenize", inputs={}, files={"a": 2})


KILLED = """
import os, signal, sys
from infra.manifest import Manifest, commit
from infra.storage import Storage, StoredFile

storage, when = Storage(sys.argv[1]), sys.argv[2]
written = [storage.write_bytes("t/1/a", b"12")]
if when == "between files":
    os.kill(os.getpid(), signal.SIGKILL)
with storage.write("t/1/b") as file:
    file.write(b"3")
    file.flush()
    if when == "in a file":
        os.kill(os.getpid(), signal.SIGKILL)
    file.write(b"4")
if when == "before the manifest":
    os.kill(os.getpid(), signal.SIGKILL)
if when == "in the manifest":
    with storage.write("t/1/manifest.json") as file:
        file.write(b'{"stage": "tokenize", "inputs": {}')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
commit(storage, "t/1", Manifest(stage="tokenize", inputs={}), [*written, file.stored])
"""


def kill(storage: Storage, when: str) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, storage.root, when], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.mark.process
@pytest.mark.parametrize("when", ["between files", "in a file", "before the manifest", "in the manifest"])
def test_a_killed_writer_leaves_nothing_that_is_done(storage: Storage, when: str) -> None:
    kill(storage, when)
    assert load(storage, "t/1") is None
    assert set(storage.sizes()) <= {"t/1/a", "t/1/b"}
    assert make(storage, "t/1", a=b"12", b=b"34").files == {"a": 2, "b": 2}
    assert load(storage, "t/1") is not None


@pytest.mark.parametrize("when", ["in a file", "in the manifest"])
def test_a_killed_writer_leaves_nothing_that_is_done_on_s3(s3_root: S3Root, when: str) -> None:
    storage = Storage(s3_root.url)
    kill(storage, when)
    assert load(storage, "t/1") is None
    assert MANIFEST not in "".join(s3_root.objects())
    made = make(storage, "t/1", a=b"12", b=b"34")
    assert load(storage, "t/1") == made
    storage.write_bytes("t/1/a", b"1")
    assert load(storage, "t/1") is None
