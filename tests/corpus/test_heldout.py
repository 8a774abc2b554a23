"""Which documents are held out: by content, whatever the corpus around them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import run_of
from plain import finished
from tiny import save_tokenizer, texts, write_jsonl

from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import CorpusError, StorageError
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards
from tasks.corpus.heldout import document_hashes, heldout_documents, heldout_parts
from tasks.corpus.tokenization import TOKENIZE


def _corpus(tmp_path: Path, share: float, *files: list[str]) -> tuple[Config, Storage, CorpusShards]:
    if not (tmp_path / "model").exists():
        save_tokenizer(tmp_path / "model")
    urls = [str(write_jsonl(tmp_path / f"{index}.jsonl", file)) for index, file in enumerate(files)]
    config = Config.model_validate(
        {
            "corpus": {"urls": urls, "shard_tokens": 500},
            "model": {"tokenizer": str(tmp_path / "model")},
            "consolidation": {
                "series": [{"name": "a", "folder": "nowhere"}],
                "heldout_share": share,
            },
        }
    )
    storage = Storage(str(tmp_path / "root"))
    return config, storage, finished(config, storage, TOKENIZE).result(TOKENIZE)


def _all_heldout(config: Config, storage: Storage, shards: CorpusShards) -> list[bool]:
    return [bool(held) for shard in shards.shards for held in heldout_documents(config, storage, shard)]


@pytest.mark.slow
def test_the_split_is_the_hash_of_a_documents_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    documents = texts(60)
    config, storage, shards = _corpus(tmp_path, 0.3, documents)
    backend = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    expected = []
    for text in documents:
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, dtype="<i4")
        digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
        expected.append(int.from_bytes(digest, "little") / 2**64 < 0.3)
    found = _all_heldout(config, storage, shards)
    assert found == expected
    assert 5 < sum(found) < 30


@pytest.mark.slow
def test_copies_are_on_one_side_and_other_files_change_nothing(tmp_path: Path) -> None:
    documents = texts(40)
    config, storage, shards = _corpus(tmp_path, 0.4, documents, ["another document", *documents])
    found = _all_heldout(config, storage, shards)
    assert found[:40] == found[41:]
    alone = _corpus(tmp_path, 0.4, documents)
    assert _all_heldout(*alone) == found[:40]


@pytest.mark.slow
def test_parts_are_the_first_held_out_documents_that_fit(tmp_path: Path) -> None:
    config, storage, shards = _corpus(tmp_path, 0.5, texts(80))
    lengths = np.concatenate(
        [
            storage.read_parquet(f"{shard.folder}/documents.parquet")["n_tokens"].to_numpy()
            for shard in shards.shards
        ]
    )
    flags = np.array(_all_heldout(config, storage, shards))
    offset = {shard.folder: shard.doc_offset for shard in shards.shards}
    everything = heldout_parts(config, storage, shards, None)
    assert len(everything) > 1
    chosen = [offset[part.shard.folder] + doc for part in everything for doc in part.documents]
    assert chosen == np.flatnonzero(flags).tolist()
    assert [part.n_tokens for part in everything] == [
        sum(int(lengths[offset[part.shard.folder] + doc]) for doc in part.documents) for part in everything
    ]
    limit = int(lengths[flags][:7].sum()) + int(lengths[flags][7]) - 1
    some = heldout_parts(config, storage, shards, limit)
    assert [offset[part.shard.folder] + doc for part in some for doc in part.documents] == chosen[:7]


def test_nothing_to_hold_out_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    config, storage, shards = _corpus(tmp_path, 1e-12, texts(5))
    with pytest.raises(CorpusError, match=r"no document of 5 is held out") as caught:
        heldout_parts(config, storage, shards, None)
    assert "raise it" in caught.value.hint
    config, storage, shards = _corpus(tmp_path, 1.0, ["the of and to in a"])
    assert _all_heldout(config, storage, shards) == [True]
    with pytest.raises(CorpusError, match="no held-out document fits into 2 tokens"):
        heldout_parts(config, storage, shards, 2)


def test_errors_name_the_stage_that_asks(tmp_path: Path) -> None:
    config, storage, shards = _corpus(tmp_path, 1e-12, texts(5))
    with pytest.raises(CorpusError) as caught:
        heldout_parts(config, storage, shards, None)
    assert caught.value.stage == ""
    from tasks.pretraining.checkpoints import CHECKPOINTS
    from tasks.pretraining.growth import GROWTH
    from tasks.pretraining.losses import LOSSES

    given = {TOKENIZE: shards, CHECKPOINTS: [Checkpoint(series="a", step=1, model=Model(name="x"), key="k")]}
    with pytest.raises(CorpusError) as caught:
        run_of(config, storage, given).find(LOSSES)
    assert caught.value.stage == "losses"
    section = dict(config.model_dump()["consolidation"], growth={"layer": 0, "train": {"d_sae": 8, "k": 2}})
    grown = Config.model_validate(config.model_dump() | {"consolidation": section})
    with pytest.raises(CorpusError) as caught:
        run_of(grown, storage, given).find(GROWTH)
    assert caught.value.stage == "growth"


def test_hashes_are_kept_where_the_root_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, storage, shards = _corpus(tmp_path, 0.5, texts(20))

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_parquet", refuse)
        patch.setattr(Storage, "write_json", refuse)
        found = document_hashes(storage, shards.shards)
    assert not storage.sizes("heldout")
    again = document_hashes(storage, shards.shards)
    assert storage.sizes("heldout")
    monkeypatch.setattr("tasks.corpus.heldout._hashed", refuse)
    for one, other, kept in zip(found, again, document_hashes(storage, shards.shards), strict=True):
        for mine, theirs, read in zip(one, other, kept, strict=True):
            np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(mine, read)
