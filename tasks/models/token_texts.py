"""What each token of a vocabulary says: its text as it stands between others.

Decoded alone, a token of a SentencePiece-like vocabulary loses its leading blank, and pieces of a character all come
out as U+FFFD. So a token is decoded between two others, which are cut off again, and bytes that are no text are shown
as SentencePiece names them, `<0xE2>`. Two ids then have one text only where they stand for the same bytes.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHORS_TRIED = 20_000

OPEN_BOX = "␣"
NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t", " ": OPEN_BOX}
DOTTED_CIRCLE = "◌"
LONGEST_TOKEN = 60


def token_texts(backend: Any) -> dict[int, str]:
    """The text of every id of a vocabulary, ids ascending; they may have holes.

    Args:
        backend: The `tokenizers.Tokenizer`.
    """
    token_of = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
    ids = sorted(token_of)
    if backend.decoder is None:
        return {token_id: token_of[token_id] for token_id in ids}
    texts = {}
    for token_id, text in zip(ids, _in_context(backend, ids), strict=True):
        if _REPLACEMENT in text:
            text = _shown_bytes(token_of[token_id], text)
        texts[token_id] = text or token_of[token_id]
    return texts


def _in_context(backend: Any, ids: Sequence[int]) -> list[str]:
    """Texts as they stand between two other tokens; behind one, or alone, where those cannot be cut off."""

    def decoded(sequences: list[list[int]]) -> list[str]:
        return list(backend.decode_batch(sequences, skip_special_tokens=False))

    anchor = _anchor(ids, decoded)
    if anchor is None:
        return decoded([[token_id] for token_id in ids])
    before, pair = decoded([[anchor], [anchor, anchor]])
    after = pair.removeprefix(before)
    texts = []
    for token_id, text in zip(ids, decoded([[anchor, token_id, anchor] for token_id in ids]), strict=True):
        if len(text) >= len(pair) and text.startswith(before) and text.endswith(after):
            texts.append(text[len(before) : len(text) - len(after)])
            continue
        # Some decoders take blanks away before punctuation, or after it.
        behind, alone = decoded([[anchor, token_id], [token_id]])
        texts.append(behind.removeprefix(before) if behind.startswith(before) else alone)
    return texts


def _anchor(ids: Sequence[int], decoded: Callable[[list[list[int]]], list[str]]) -> int | None:
    """A token of letters, if possible one that stays what it is beside itself; None if there is none."""
    tried = ids[:_ANCHORS_TRIED]
    alone = decoded([[token_id] for token_id in tried])
    plain = [pair for pair in zip(tried, alone, strict=True) if pair[1].isascii() and pair[1].isalpha()]
    twice = decoded([[token_id, token_id] for token_id, _ in plain])
    steady = (token_id for (token_id, text), both in zip(plain, twice, strict=True) if both == text + text)
    return next(steady, plain[0][0] if plain else None)


def _shown_bytes(token: str, text: str) -> str:
    """A token that may be no text: its bytes, where they are known."""
    if match := _BYTE.fullmatch(token):
        raw = bytes([int(match[1], 16)])
    else:
        known = _byte_of_character()
        if not all(character in known for character in token):
            return text
        raw = bytes(known[character] for character in token)
    return raw.decode("utf-8", errors=_NAMED_BYTES)


def _name_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


_NAMED_BYTES = "functok.named_bytes"
codecs.register_error(_NAMED_BYTES, _name_bytes)


@cache
def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def visible(token: str | None, longest: int = LONGEST_TOKEN) -> str:
    r"""A decoded token with nothing hidden in it: one line, every character printable.

    Spaces become ␣, line ends and tabs `\n`, `\r`, `\t`; other control, format, private, surrogate and
    unassigned characters become `\u{hex}`, so that no direction mark or XML-forbidden character survives.
    A leading combining mark is put on a dotted circle. Longer tokens than `longest` end in `…`;
    an id that the vocabulary has no text for is a dash.
    """
    if token is None:
        return "–"
    shown = token if len(token) <= longest else token[:longest]
    text = "".join(_visible_character(character) for character in shown)
    if text and unicodedata.combining(text[0]):
        text = DOTTED_CIRCLE + text
    return text + ("…" if len(token) > longest else "")


def _visible_character(character: str) -> str:
    if character in NAMED:
        return NAMED[character]
    if unicodedata.category(character) in {"Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"}:
        return f"\\u{{{ord(character):x}}}"
    return character


def shared_texts(connection: Any) -> frozenset[str]:
    """The texts that several tokens of the corpus have: different ids for the same bytes."""
    found = connection.execute("SELECT token FROM tokens GROUP BY token HAVING count(*) > 1").fetchall()
    return frozenset(token for (token,) in found)


def label(token: str | None, token_id: int, shared: Collection[str]) -> str:
    """A visible token, with its id where others have its text (`shared_texts`)."""
    return f"{visible(token)} (id {token_id})" if token in shared else visible(token)
