"""The corpus' own tokenizer: bit-deterministic, keyed by what it reads, and one that the spine can use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain
import pytest
import tiny

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError
from tasks.corpus import tokenizer_training as corpus_tokenizer
from tasks.corpus.tokenization import TOKENIZE
from tasks.corpus.tokenizer_training import END_OF_TEXT, find_tokenizer, train_tokenizer, with_tokenizer
from tasks.models.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
AWKWARD = ["", " ", "a  b\n\n\tc", "naïve café 東京 🙂", "\x00\x7f", "don't we've 123,456.78", END_OF_TEXT]


def make_config(folder: Path, *, size: int = 400, **corpus: Any) -> Config:
    values = {
        "corpus": {"urls": [str(folder / "*.jsonl")], **corpus},
        "windows": {"context_size": 32},
        "storage": {"root": str(folder / "run")},
        "consolidation": {
            "series": [{"name": "small", "shape": {"hidden_size": 16, "layers": 1, "heads": 2}}],
            "train": {"tokens": 1000, "vocabulary_size": size},
        },
    }
    return Config.model_validate(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(60))
    tiny.write_jsonl(tmp_path / "b.jsonl", [text for text in AWKWARD if text])
    return tmp_path


def test_gives_back_every_text_and_has_one_special_token(folder: Path) -> None:
    config, storage = make_config(folder), Storage(str(folder / "run"))
    reports: list[tuple[int, int, str]] = []
    name = train_tokenizer(config, storage, lambda *report: reports.append(report))
    resolved = with_tokenizer(config, storage)
    assert resolved is not None
    assert resolved.model.tokenizer == name == find_tokenizer(config, storage)
    loaded = load_tokenizer(resolved.model, storage)
    assert (loaded.bos_id, loaded.pad_id, loaded.special_ids) == (0, 0, (0,))
    assert loaded.tokenizer.eos_token_id == 0
    assert len(loaded.tokenizer) == 400
    for text in [*AWKWARD, *tiny.texts(3), "".join(map(chr, range(1, 300)))]:
        ids = loaded.backend.encode(text, add_special_tokens=False).ids
        assert loaded.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(loaded.backend.encode(tiny.texts(1)[0]).ids) < len(tiny.texts(1)[0]) / 2
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    assert reports[-1] == (size, size, "bytes, training the tokenizer")


def test_tokenizes_a_corpus_and_leaves_the_special_token_out(folder: Path) -> None:
    config, storage = make_config(folder), Storage(str(folder / "run"))
    reports: list[tuple[int, int, str]] = []
    run = plain.finished(config, storage, TOKENIZE, progress=lambda *report: reports.append(report))
    shards = run.result(TOKENIZE)
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    # The tokenizer is trained first, by the same stage.
    assert [report for report in reports if report[0] == report[1] == size] == [
        (size, size, "bytes, training the tokenizer"),
        (size, size, "bytes, tokenization"),
    ]
    ids = {
        token
        for shard in shards.shards
        for token in storage.read_parquet(f"{shard.folder}/occurrences.parquet")["token_id"].to_pylist()
    }
    specials = [
        storage.read_parquet(f"{shard.folder}/specials.parquet")["token_id"].to_pylist()
        if shard.has_specials
        else None
        for shard in shards.shards
    ]
    assert 0 not in ids
    assert specials == [None, [0]]


@pytest.mark.process
def test_two_processes_with_other_threads_and_hash_seeds_give_the_same_bytes(folder: Path) -> None:
    program = (
        "import sys; sys.path[:0] = ['tests', 'tests/corpus']; from test_corpus_tokenizer import make_config; "
        "from pathlib import Path; from infra.storage import Storage; from tasks.corpus.tokenizer_training import *; "
        "train_tokenizer(make_config(Path(sys.argv[1]), size=3000), Storage(sys.argv[2]))"
    )
    tiny.write_jsonl(folder / "c.jsonl", tiny.texts(300, seed=5))
    digests = []
    for threads in ("1", "2"):
        root = folder / f"run-{threads}"
        subprocess.run(
            [sys.executable, "-c", program, str(folder), str(root)],
            cwd=ROOT,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            check=True,
        )
        files = sorted(path for path in root.rglob("*") if path.is_file())
        digests.append(
            {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        )
    assert digests[0] == digests[1]
    assert any(path.name == "tokenizer.json" for path in digests[0])


def test_is_trained_once_and_anew_when_what_it_reads_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(folder / "run"))
    assert with_tokenizer(make_config(folder), storage) is None
    first = train_tokenizer(make_config(folder), storage)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_tokenizer, "_train", lambda *_: pytest.fail("trained again"))
        assert train_tokenizer(make_config(folder), storage) == first
        # What only tokenization reads, and a token limit, which is not known yet, change nothing.
        assert find_tokenizer(make_config(folder, shard_tokens=100, max_tokens=50), storage) == first
    others = [
        make_config(folder, size=401),
        make_config(folder, max_documents=7),
        make_config(folder, text_field="body"),
    ]
    assert [find_tokenizer(other, storage) for other in others] == [None] * 3
    tiny.write_jsonl(folder / "c.jsonl", ["one more"])
    assert find_tokenizer(make_config(folder), storage) is None


def test_reads_only_as_many_documents_as_the_corpus_has(folder: Path) -> None:
    storage = Storage(str(folder / "run"))
    few = train_tokenizer(make_config(folder, max_documents=5), storage)
    other = folder / "other"
    tiny.write_jsonl(other / "a.jsonl", tiny.texts(60)[:5])
    same = train_tokenizer(make_config(other), storage)
    assert few != same
    contents = [
        json.loads(storage.read_bytes(f"{name.removeprefix('storage:')}/tokenizer.json"))
        for name in (few, same)
    ]
    assert contents[0] == contents[1]


def test_leaves_a_configuration_with_a_tokenizer_of_its_own_alone(folder: Path) -> None:
    plain_config = Config.model_validate({"corpus": {"urls": ["a.jsonl"]}, "model": {"name": "m"}})
    assert with_tokenizer(plain_config, Storage(str(folder / "run"))) is plain_config
    with pytest.raises(ConfigError, match="no tokenizer is trained here"):
        train_tokenizer(plain_config, Storage(str(folder / "run")))


def test_says_when_there_is_nothing_to_learn_from(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(str(folder / "run"))
    with pytest.raises(CorpusError, match="no document to train a tokenizer on"):
        train_tokenizer(make_config(folder, text_field="body"), storage)
    train_tokenizer(make_config(folder, size=100_000), storage)
    assert "not 100000" in caplog.text
