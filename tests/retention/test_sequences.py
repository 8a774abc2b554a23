"""Held-out documents as sequences: what is cut, what is joined, and what that depends on."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schemas.retention.work import Piece, Sequence
from tasks.retention.sequences import SequenceTokens, join

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def documents(lengths: list[int]) -> list[tuple[str, int, int]]:
    return [("shard", number, n) for number, n in enumerate(lengths)]


def places(sequence: Sequence, begins: bool, ends: bool) -> int:
    tokens = sum(piece.stop - piece.first for piece in sequence.pieces)
    return int(begins) + tokens + int(ends) * (len(sequence.pieces) - 1)


@given(lengths=LENGTHS, begins=st.booleans(), ends=st.booleans(), most=st.integers(1, 5))
def test_sequences_are_full_and_use_a_token_once(
    lengths: list[int], begins: bool, ends: bool, most: int
) -> None:
    found = join(documents(lengths), 16, most, begins=begins, ends=ends)
    assert len(found) <= most
    used = [
        (piece.doc, place)
        for sequence in found
        for piece in sequence.pieces
        for place in range(piece.first, piece.stop)
    ]
    assert len(used) == len(set(used))
    assert all(0 <= place < lengths[doc] for doc, place in used)
    for sequence in found:
        # EOS alone may fill the last place.
        assert 16 - places(sequence, begins, ends) in ({0, 1} if ends else {0})
        assert all(piece.stop > piece.first for piece in sequence.pieces)


@given(lengths=LENGTHS, more=LENGTHS)
def test_documents_that_follow_change_no_sequence(lengths: list[int], more: list[int]) -> None:
    before = join(documents(lengths), 16, 99, begins=True, ends=True)
    after = join(documents(lengths + more), 16, 99, begins=True, ends=True)
    assert after[: len(before)] == before


def test_a_long_document_gives_whole_sequences_and_its_rest_is_joined() -> None:
    found = join([("a", 0, 35), ("b", 1, 4), ("c", 2, 50)], 16, 4, begins=True, ends=True)
    pieces = [[(piece.folder, piece.first, piece.stop) for piece in sequence.pieces] for sequence in found]
    assert pieces == [
        [("a", 0, 15)],
        [("a", 15, 30)],
        # 5 of a, EOS, 4 of b, EOS, and what still fits of c, which began with three of its own.
        [("c", 0, 15)],
        [("c", 15, 30)],
    ]
    assert found[0].key == [["a", 0, 0, 15]]


def test_predictions_stay_within_a_document_and_leave_special_tokens_out() -> None:
    tokens = SequenceTokens(
        ids=np.arange(7),
        is_special=np.array([True, False, False, True, False, False, False]),
        document=np.array([0, 0, 0, 0, 1, 1, 2]),
    )
    assert tokens.predictions.tolist() == [False, True, False, False, True, False]


def test_a_piece_is_known_by_its_content() -> None:
    piece = Piece(folder="f", doc=3, first=1, stop=9)
    assert Sequence(length=8, pieces=(piece,)) == Sequence(length=8, pieces=(piece,))
