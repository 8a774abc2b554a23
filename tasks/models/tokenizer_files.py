"""What the files of a folder or repository say of its tokenizer, without the classes of transformers.

A class of transformers builds its own normalizer, pre-tokenizer and decoder around a vocabulary, and adds its default
tokens, whatever `tokenizer.json` says: Qwen2's cuts numbers into digits, Llama's joins words that a byte-level
vocabulary keeps apart. And `tokenizers` itself gives an added token the next number where the file gives it another
one. Here the files win, or they are refused where they contradict each other.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from schemas.errors import ModelError, whole_message

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_HOW_TO_MEND = (
    "save the tokenizer again where it is right (save_pretrained writes tokenizer.json and its configuration "
    "together), or name another one as model.tokenizer"
)
_GPT2_CUT = ("default", "gpt-2", "phi-2", "mpt", "olmo")
_SINGLE_DIGITS_THEN_GPT2_CUT = ("smollm", "starcoder", "refact", "codeshell", "command-r")
_COMPOSED = ("qwen2", "mpt", "olmo", "command-r")
"""Names in `tokenizer.ggml.pre` by how text is cut, as llama.cpp has them (src/llama-vocab.cpp), and those of models
whose tokenizer.json composes characters (NFC) before, which no GGUF says."""


def find_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder or hub repository, fetched where it is not here; None where there is none.

    Raises:
        OSError: if the hub cannot be asked.
    """
    from transformers.utils import cached_file

    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def stated_tokens(name: str, revision: str | None) -> dict[str, dict[str, Any]]:
    """Tokens to which the files beside `tokenizer.json` give ids, as its `added_tokens` has them, by content.

    Raises:
        ModelError: if such a file is no JSON object.
    """
    stated: dict[str, dict[str, Any]] = {}
    for content, token_id in _object(find_file(name, "added_tokens.json", revision)).items():
        stated[content] = _added(content, token_id, {})
    configuration = _object(find_file(name, "tokenizer_config.json", revision))
    for token_id, token in (configuration.get("added_tokens_decoder") or {}).items():
        properties = token if isinstance(token, dict) else {"content": str(token)}
        stated[properties["content"]] = _added(properties["content"], token_id, properties)
    return stated


def own_backend(file: Path, stated: dict[str, dict[str, Any]]) -> Any:
    """The `tokenizers.Tokenizer` that a `tokenizer.json` describes, its added tokens at the ids that it gives them.

    Args:
        file: The `tokenizer.json`.
        stated: Of `stated_tokens`; those that the file lacks are added.

    Raises:
        ModelError: if it is damaged, gives one id to two tokens, or cannot give a token the id that is stated.
    """
    from tokenizers import Tokenizer

    values = _object(file)
    added = {token["content"]: token for token in values.get("added_tokens") or ()}
    try:
        backend = Tokenizer.from_file(str(file))
        known = backend.get_vocab(with_added_tokens=True)
        missing = {content: token for content, token in stated.items() if content not in known}
        if missing or any(known.get(content) != token["id"] for content, token in added.items()):
            backend = Tokenizer.from_str(json.dumps(_placed(values, added | missing, file)))
    # The library raises Exception itself.
    except Exception as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{file} cannot be read by tokenizers: {whole_message(error)}",
            hint="it is damaged, half copied, or of a newer release of tokenizers: copy it again, or "
            + _HOW_TO_MEND,
        ) from error
    require_ids(backend, added | missing, file)
    return backend


def require_ids(backend: Any, stated: dict[str, dict[str, Any]], place: Path | str) -> None:
    """Whether a tokenizer gives every token an id of its own, and the stated ones theirs.

    Raises:
        ModelError: naming the first token that it does not.
    """
    known = backend.get_vocab(with_added_tokens=True)
    for content, token in stated.items():
        if known.get(content) != token["id"]:
            raise ModelError(
                f"{place}: the token {content!r} should have the id {token['id']}, but the tokenizer gives it "
                f"{known.get(content, 'none')}",
                hint=_HOW_TO_MEND,
            )
    if len(set(known.values())) < len(known):
        by_id: dict[int, str] = {}
        for content, token_id in sorted(known.items()):
            if token_id in by_id:
                raise ModelError(
                    f"{place} gives the id {token_id} to two tokens, {by_id[token_id]!r} and {content!r}",
                    hint=_HOW_TO_MEND,
                )
            by_id[token_id] = content


def read_as_gguf_says(backend: Any, file: Path) -> None:
    """Let a `tokenizers.Tokenizer` that transformers made of a GGUF file cut text as the file says.

    Raises:
        ModelError: if the file names a way of cutting that is unknown here.
    """
    from gguf import GGUFReader
    from tokenizers import decoders, normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = GGUFReader(file).fields
    kind, cut, prefixed = (
        fields[name].contents() if name in fields else None
        for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix")
    )
    if kind == "llama" and prefixed is False and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    if kind != "gpt2":
        return
    if cut is None or cut == "default":
        logger.warning(
            "%s does not say how it cuts text (tokenizer.ggml.pre): it is cut as GPT-2 does; model.tokenizer may name "
            "the folder or hub id that it was made from",
            file,
        )
    elif cut in _SINGLE_DIGITS_THEN_GPT2_CUT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif cut not in GGUF_PRE_TOKENIZER_SPLITS and cut not in _GPT2_CUT:
        raise ModelError(
            f"{file} cuts text as {cut!r} says (tokenizer.ggml.pre), which neither transformers nor functok knows",
            hint="give the folder or hub id that it was made from as model.tokenizer",
        )
    if cut in _COMPOSED and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()


def _placed(values: dict[str, Any], added: dict[str, dict[str, Any]], file: Path) -> dict[str, Any]:
    """A `tokenizer.json` with its added tokens in the model's vocabulary too, which is where ids are kept."""
    vocabulary = values["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        # Of a Unigram model ids are places in a list; added tokens come behind it.
        return {**values, "added_tokens": sorted(added.values(), key=lambda token: token["id"])}
    token_of = {token_id: token for token, token_id in vocabulary.items()}
    for content, token in added.items():
        there = token_of.setdefault(token["id"], content)
        if there != content:
            raise ModelError(
                f"{file} gives the id {token['id']} to the token {there!r}, but to {content!r} as an added token "
                "(added_tokens, or added_tokens_decoder in tokenizer_config.json)",
                hint=_HOW_TO_MEND,
            )
    ids = {content: token["id"] for content, token in added.items()}
    model = {**values["model"], "vocab": vocabulary | ids}
    return {**values, "model": model, "added_tokens": list(added.values())}


def _added(content: str, token_id: int | str, properties: dict[str, Any]) -> dict[str, Any]:
    flags = {
        name: bool(properties.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")
    }
    normalized = bool(properties.get("normalized", not flags["special"]))
    return {"id": int(token_id), "content": content, **flags, "normalized": normalized}


def _object(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(
            f"{file} is no JSON: {error}", hint="it is damaged or half copied: copy it again"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} is no JSON object", hint="it is damaged or half copied: copy it again")
    return values
