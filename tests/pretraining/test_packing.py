"""Packed rows against their plainest twin, and what a model makes of them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from builders import Cut, Document, commit_found
from hypothesis import given
from hypothesis import strategies as st

from infra import storage as storage_module
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError
from tasks.corpus import heldout
from tasks.corpus.heldout import heldout_documents
from tasks.pretraining import packing
from tasks.pretraining.packing import PackedRows, TrainingText, training_text

BOS, EOS = 100, 101

documents_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def text_of(lengths: list[int]) -> TrainingText:
    """Documents whose every token is its own number: document 0 is 1000, 1001, …, document 1 is 2000, 2001, …"""
    tokens = [1000 * (doc + 1) + position for doc, length in enumerate(lengths) for position in range(length)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TrainingText(tokens=np.array(tokens, dtype=np.int32), starts=starts.astype(np.int64))


def packed(text: TrainingText, size: int, seed: int, *, begins_rows: bool = True) -> PackedRows:
    return PackedRows(text, context_size=size, seed=seed, separator=BOS, end=EOS, begins_rows=begins_rows)


class Twin:
    """The plainest possible packing: the stream as a Python list of (token or None, document) pairs."""

    def __init__(self, text: TrainingText, size: int, seed: int, n_epochs: int, *, begins_rows: bool) -> None:
        self.size, self.begins_rows = size, begins_rows
        self.stream: list[int | None] = []
        for epoch in range(n_epochs):
            for doc in np.random.default_rng([seed, epoch]).permutation(text.n_documents):
                self.stream.append(None)
                self.stream += text.tokens[text.starts[doc] : text.starts[doc + 1]].tolist()

    def row(self, number: int) -> tuple[list[int], list[int], list[int]]:
        inputs, positions, labels = [], [], []
        for column in range(self.size):
            here, after = self.stream[number * self.size + column : number * self.size + column + 2]
            begins = here is None or column == 0
            inputs.append(BOS if here is None or (column == 0 and self.begins_rows) else here)
            positions.append(0 if begins else positions[-1] + 1)
            labels.append(EOS if after is None else after)
        return inputs, positions, labels


@given(
    documents_strategy,
    st.integers(2, 9),
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(1, 5),
    st.booleans(),
)
def test_rows_are_those_of_the_plainest_twin(
    lengths: list[int], size: int, seed: int, first: int, count: int, begins_rows: bool
) -> None:
    text = text_of(lengths)
    rows = packed(text, size, seed, begins_rows=begins_rows).rows(first, count)
    n_epochs = (first + count) * size // (len(text.tokens) + len(lengths)) + 2
    twin = Twin(text, size, seed, n_epochs, begins_rows=begins_rows)
    for row in range(count):
        inputs, positions, labels = twin.row(first + row)
        assert rows.input_ids[row].tolist() == inputs
        assert rows.position_ids[row].tolist() == positions
        assert rows.labels[row].tolist() == labels


@given(documents_strategy, st.integers(2, 9), st.integers(0, 3), st.integers(1, 4))
def test_every_token_is_a_target_exactly_once_an_epoch(
    lengths: list[int], size: int, seed: int, n_epochs: int
) -> None:
    text = text_of(lengths)
    source = packed(text, size, seed)
    length = source.epoch_length
    n_rows = -(-n_epochs * length // size)
    rows = source.rows(0, n_rows)
    targets = rows.labels.ravel()[: n_epochs * length - 1]
    for epoch in range(n_epochs):
        # Position p is predicted at p - 1; the very first, a separator, by nobody.
        seen = Counter(targets[max(0, epoch * length - 1) : (epoch + 1) * length - 1].tolist())
        assert seen.pop(EOS, 0) == len(lengths) - (epoch == 0)
        assert seen == Counter(text.tokens.tolist())


@given(documents_strategy, st.integers(2, 9), st.integers(0, 20))
def test_rows_do_not_depend_on_how_they_are_asked_for(lengths: list[int], size: int, first: int) -> None:
    text = text_of(lengths)
    together = packed(text, size, 1).rows(first, 4)
    used = packed(text, size, 1)
    used.rows(37, 2)
    for row in (3, 0, 2, 1):
        alone = used.rows(first + row, 1)
        assert alone.input_ids[0].tolist() == together.input_ids[row].tolist()
        assert alone.position_ids[0].tolist() == together.position_ids[row].tolist()
        assert alone.labels[0].tolist() == together.labels[row].tolist()


def test_every_epoch_and_seed_has_an_order_of_its_own() -> None:
    text = text_of([1] * 40)
    orders = [
        packed(text, 80, seed).rows(epoch, 1).labels[0, ::2].tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == sorted(text.tokens.tolist()) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_a_packed_row_gives_each_piece_the_losses_it_has_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    lengths = [3, 30, 1, 2, 9, 17]
    text = TrainingText(
        tokens=np.random.default_rng(0).integers(0, 90, sum(lengths)).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    rows = packed(text, 16, 0).rows(0, 6)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=102, max_position_embeddings=16, attn_implementation="sdpa", **shape)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)

    def losses(inputs: np.ndarray, labels: np.ndarray, positions: np.ndarray | None) -> torch.Tensor:
        ids = torch.from_numpy(inputs)
        places = None if positions is None else torch.from_numpy(positions)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="none"
        ).view(ids.shape)

    together = losses(rows.input_ids, rows.labels, rows.position_ids)
    ignoring = losses(rows.input_ids, rows.labels, None)
    n_pieces = 0
    for row, positions in enumerate(rows.position_ids):
        bounds = [*np.flatnonzero(positions == 0), 16]
        for first, last in itertools.pairwise(bounds):
            n_pieces += 1
            piece = slice(first, last)
            assert rows.input_ids[row, first] == BOS
            alone = losses(rows.input_ids[row : row + 1, piece], rows.labels[row : row + 1, piece], None)
            torch.testing.assert_close(together[row, piece], alone[0], rtol=1e-4, atol=1e-5)
    assert n_pieces > 6
    # Without the position ids the documents see each other: the test above could fail.
    assert (together - ignoring).abs().max() > 1e-2


def consolidation_config(storage: Storage, share: float) -> Config:
    series = {"name": "s", "shape": {"hidden_size": 16, "layers": 1, "heads": 2}}
    section = {"series": [series], "train": {"tokens": 10}, "heldout_share": share}
    return builders.make_config(storage, [], consolidation=section)


def test_trains_on_the_documents_that_are_not_held_out_and_once_on_a_file_and_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "LOCAL_CACHE", tmp_path / "cache")
    storage = Storage(str(tmp_path / "run"))
    first, second = builders.random_documents(1, 40), builders.random_documents(2, 30)
    first[3] = Document(tokens=[], active=first[3].active)
    copied = Cut(source="b.jsonl", documents=first, in_graph=0)
    cuts = [
        Cut(source="a.jsonl", documents=first, in_graph=0),
        copied,
        Cut(source="c.jsonl", documents=second, in_graph=0),
    ]
    shards = builders.write_corpus(storage, cuts)
    config = consolidation_config(storage, 0.3)
    text = training_text(config, storage, shards)
    expected = []
    for shard, documents in ((shards.shards[0], first), (shards.shards[2], second)):
        is_heldout = heldout_documents(config, storage, shard)
        assert 0 < is_heldout.sum() < len(documents)
        expected += [
            document.tokens
            for document, left_out in zip(documents, is_heldout, strict=True)
            if document.tokens and not left_out
        ]
    found = [text.tokens[start:end].tolist() for start, end in itertools.pairwise(text.starts)]
    assert found == expected
    # The next call reads what the first one wrote; another share is another text, and so is another way to hold out.
    monkeypatch.setattr(packing, "_write", lambda *_: pytest.fail("written again"))
    assert training_text(config, storage, shards).tokens.tolist() == text.tokens.tolist()
    monkeypatch.setattr(heldout, "VERSION", -1)
    with pytest.raises(pytest.fail.Exception, match="written again"):
        training_text(config, storage, shards)
    monkeypatch.undo()
    monkeypatch.setattr(storage_module, "LOCAL_CACHE", tmp_path / "cache")
    assert len(training_text(consolidation_config(storage, 0.1), storage, shards).tokens) > len(text.tokens)


def test_special_tokens_inside_a_text_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "LOCAL_CACHE", tmp_path / "cache")
    storage = Storage(str(tmp_path / "run"))
    documents = [Document(tokens=[5, 6], active={}), Document(tokens=[7, 8, 9], active={})]
    shards = builders.write_corpus(storage, [Cut(source="a", documents=documents, in_graph=0)])
    import pyarrow as pa

    from infra.manifest import Manifest
    from schemas.tables import SHARD_FILES

    folder = shards.shards[0].folder
    specials = {"doc": [0, 1], "position": [2, 0], "token_id": [BOS, BOS]}
    storage.write_parquet(f"{folder}/specials.parquet", pa.table(specials, schema=SHARD_FILES["specials"]))
    occurrences = {"doc": [0, 0, 1, 1, 1], "position": [0, 1, 1, 2, 3], "token_id": [5, 6, 7, 8, 9]}
    storage.write_parquet(
        f"{folder}/occurrences.parquet", pa.table(occurrences, schema=SHARD_FILES["occurrences"])
    )
    commit_found(storage, folder, Manifest(stage="test", inputs={}))
    text = training_text(consolidation_config(storage, 1e-9), storage, shards)
    assert text.tokens.tolist() == [5, 6, BOS, BOS, 7, 8, 9]
    # A special token in a text begins no piece.
    rows = packed(text, 8, 0).rows(0, 1)
    assert rows.position_ids[0].tolist() in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2])


def test_says_when_nothing_is_left_to_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "LOCAL_CACHE", tmp_path / "cache")
    storage = Storage(str(tmp_path / "run"))
    documents = builders.random_documents(1, 3)
    shards = builders.write_corpus(storage, [Cut(source="a", documents=documents, in_graph=0)])
    with pytest.raises(CorpusError, match=r"none of 3 documents is left to train on"):
        training_text(consolidation_config(storage, 1 - 1e-12), storage, shards)
