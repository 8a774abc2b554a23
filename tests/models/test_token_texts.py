"""What each token says: its text between others, one text for one sequence of bytes, and ids where texts are shared."""

from __future__ import annotations

import random
from typing import Any

import duckdb
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from functok import pipeline
from schemas.config import Config
from tasks.graph.tables import GRAPH
from tasks.models.token_texts import label, shared_texts, token_texts
from tasks.report.graph import coverage_table

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [*"abé", "▁", "▁▁", "▁a", "▁the", "the", " a", "▁é", "日", "\n"]


def vocabulary_of(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def texts_of(model: Any, decoder: Any, added: list[AddedToken] | None = None) -> dict[str, str]:
    """The text of each token of a vocabulary, by its name there."""
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens(added or [])
    found = token_texts(backend)
    assert list(found) == sorted(backend.get_vocab().values())
    return {backend.id_to_token(token_id): text for token_id, text in found.items()}


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
    ],
    ids=["llama", "gemma", "always", "first"],
)
def test_pieces_keep_their_blanks_and_bytes_their_names(decoder: Any) -> None:
    model = models.BPE(vocab=vocabulary_of(["<unk>", *BYTES, *PIECES]), merges=[], byte_fallback=True)
    found = texts_of(model, decoder)
    assert {piece: found[piece] for piece in PIECES} == {
        **{"a": "a", "b": "b", "é": "é", "▁": " ", "▁▁": "  ", "▁a": " a", "▁the": " the", "the": "the"},
        **{" a": " a", "▁é": " é", "日": "日", "\n": "\n"},
    }
    assert found["<0x0A>"] == "\n"
    assert found["<0xE2>"] == "<0xE2>"
    assert found["<unk>"] == "<unk>"
    # One text for two ids, where their bytes are equal, and nowhere else.
    shared = {name for name, text in found.items() if list(found.values()).count(text) > 1}
    assert shared == {"a", "<0x61>", "b", "<0x62>", "▁", "<0x20>", " a", "▁a", "\n", "<0x0A>"}


def test_pieces_of_a_character_are_told_apart_by_their_bytes() -> None:
    spelled = bytes_to_unicode()
    rng = random.Random(0)
    pieces = {bytes([byte]) for byte in range(256)} | {
        b" the",
        " \u2019".encode()[:3],
        "日".encode()[1:],
    }
    pieces |= {rng.randbytes(rng.randint(2, 6)) for _ in range(3000)}
    names = {"".join(spelled[byte] for byte in piece): piece for piece in sorted(pieces)}
    found = texts_of(models.BPE(vocab=vocabulary_of(list(names)), merges=[]), decoders.ByteLevel())
    by_bytes = {piece: found[name] for name, piece in names.items()}
    assert by_bytes[b" the"] == " the"
    assert by_bytes[b" \xe2\x80"] == " <0xE2><0x80>"
    assert by_bytes[b"\x97\xa5"] == "<0x97><0xA5>"
    assert len(set(by_bytes.values())) == len(by_bytes)
    assert all(text == piece.decode() for piece, text in by_bytes.items() if is_text(piece))


def is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_tokens_of_other_decoders_are_told_apart() -> None:
    word_pieces = models.WordPiece(vocab=vocabulary_of(["[UNK]", "a", "##a", "ing", "##ing", "'"]))
    found = texts_of(word_pieces, decoders.WordPiece())
    assert (found["ing"], found["##ing"]) == (" ing", "ing")
    assert len(set(found.values())) == 6
    suffixed = models.BPE(vocab=vocabulary_of(["a", "a</w>", "b", "b</w>"]), merges=[])
    assert texts_of(suffixed, decoders.BPEDecoder("</w>")) == {
        "a": "a",
        "a</w>": "a ",
        "b": "b",
        "b</w>": "b ",
    }
    whole_words = models.WordLevel(vocab=vocabulary_of(["the", "river"]), unk_token="the")
    assert texts_of(whole_words, None) == {"the": "the", "river": "river"}


def test_added_and_special_tokens_are_their_own_text() -> None:
    added = [
        AddedToken("<|end|>", special=True, normalized=False),
        AddedToken("<mask>", lstrip=True, rstrip=True),
        AddedToken("\n\n"),
    ]
    model = models.BPE(vocab=vocabulary_of(["a", "▁a"]), merges=[])
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert texts_of(model, decoder, added) == {
        **{"a": "a", "▁a": " a"},
        **{"<|end|>": "<|end|>", "<mask>": "<mask>", "\n\n": "\n\n"},
    }


def test_people_see_ids_where_texts_are_shared() -> None:
    from rich.console import Console

    connection = duckdb.connect()
    connection.execute(
        """
        CREATE TABLE tokens AS
        SELECT * FROM (VALUES (7, ' a', 1), (9, ' a', 2), (3, 'a', 3)) AS t (token_id, token, rank);
        CREATE TABLE coverage AS SELECT 1 AS layer, *, rank / 3.0 AS coverage FROM tokens
        """
    )
    shown = ["␣a (id 7)", "␣a (id 9)", "a"]
    shared = shared_texts(connection)
    assert [label(" a", 7, shared), label(" a", 9, shared), label("a", 3, shared)] == shown
    assert [row["token"] for row in coverage_table(connection).rows] == shown
    config = Config.model_validate({"corpus": {"urls": ["a.jsonl"]}, "model": {"name": "m"}})
    (in_prefect,) = GRAPH.shown(connection, config)
    assert [row["token"] for row in in_prefect.rows] == shown
    assert [row["layer 1"] for row in in_prefect.rows] == ["33.33%", "66.67%", "100.00%"]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(pipeline.coverage_table(connection))
    assert all(text in captured.get() for text in shown)
