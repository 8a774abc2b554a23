"""Tokenizers: the folder's own files decide, ids may have holes, and what cannot be right is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plain import finished
from tiny import save_tokenizer, texts, write_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError
from tasks.corpus.tokenization import TOKENIZE
from tasks.models.tokenizer_files import read_as_gguf_says
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer, require_rows

NUMBERS = [f"in 20{i:02d} and 1{i:03d}" for i in range(40)] * 5 + ["20 23 20 23 202"] * 400
THREE_DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SENTENCEPIECE = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def own(pre_tokenizer: Any, decoder: Any = None, normalizer: Any = None, **options: Any) -> Tokenizer:
    """A small BPE with its own way of cutting text."""
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder or decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    byte_level = decoder is None
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else ["▁"],
        show_progress=False,
    )
    backend.train_from_iterator(texts(150) + NUMBERS, trainer)
    return backend


def saved(folder: Path, backend: Tokenizer, *, model_type: str = "", **configuration: Any) -> Path:
    """A folder with a `tokenizer.json` and its configuration, as it comes from a hub."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    configuration = {"eos_token": "</s>", **configuration}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    return folder


def edit(folder: Path, **values: Any) -> dict[str, Any]:
    """Change top-level values of a folder's `tokenizer.json`; gives what it holds."""
    file = folder / "tokenizer.json"
    whole: dict[str, Any] = {**json.loads(file.read_bytes()), **values}
    file.write_text(json.dumps(whole))
    return whole


def loaded(folder: Path, tmp_path: Path) -> LoadedTokenizer:
    return load_tokenizer(Model(name=str(folder)), Storage(str(tmp_path / "root")))


def ids_of(backend: Any, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


TWO_CUTS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(THREE_DIGITS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@pytest.mark.parametrize(
    ("backend", "model_type", "tokenizer_class", "text"),
    [
        # The issue's own: Qwen2's class cuts digits one by one.
        (lambda: own(BYTE_LEVEL), "qwen2", "Qwen2Tokenizer", "in 2024"),
        # Granite 4 and OLMo 2 (huggingface/transformers#45812, #45920): GPT-2's class, numbers of three digits. Since
        # then transformers lists these two model types, and no others.
        (lambda: own(TWO_CUTS), "llama", "GPT2Tokenizer", "in 2023"),
        # DeepSeek (#45488, #48206): byte-level words under the name of Llama's class, which joins them. Since then
        # transformers looks for that, in this class and not in its kin.
        (lambda: own(BYTE_LEVEL), "llama", "CodeLlamaTokenizer", "the river of Moscow"),
        # Llama's legacy normalizer, which puts a blank before every piece of text between special tokens
        # (#24565, #26455), where the class of today has a pre-tokenizer.
        (
            lambda: own(None, decoders.Sequence([*SENTENCEPIECE]), PREPEND, byte_fallback=True),
            "llama",
            "LlamaTokenizer",
            " the</s>the  river",
        ),
        # A normalizer of the folder's own (lower case, as the CamemBERT of #45701 has one) is dropped by the class.
        (
            lambda: own(BYTE_LEVEL, normalizer=normalizers.Lowercase()),
            "gpt2",
            "GPT2Tokenizer",
            "The River",
        ),
    ],
    ids=["digits one by one", "digits by three", "byte level as Llama", "legacy Llama", "normalizer"],
)
def test_the_folders_own_file_is_the_tokenizer(
    backend: Any,
    model_type: str,
    tokenizer_class: str,
    text: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import AutoTokenizer

    folder = saved(
        tmp_path / "model", backend(), model_type=model_type, tokenizer_class=tokenizer_class, bos_token="<s>"
    )
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(folder)
    assert ids_of(auto.backend_tokenizer, text) != ids_of(expected, text)  # the trap is there
    tokenizer = loaded(folder, tmp_path)
    assert ids_of(tokenizer.backend, text) == ids_of(expected, text)
    assert tokenizer.bos_id == expected.token_to_id("<s>")
    assert f"{tokenizer_class} reads text otherwise than its tokenizer.json says" in caplog.text


def test_tokens_that_a_class_adds_behind_the_vocabulary_are_none(tmp_path: Path) -> None:
    backend = own(BYTE_LEVEL)
    folder = saved(tmp_path / "model", backend, model_type="gemma", tokenizer_class="GemmaTokenizer")
    tokenizer = loaded(folder, tmp_path)
    # Gemma's class would add <bos>, <pad> and <mask>, where the model has no embedding.
    assert tokenizer.highest_id == backend.get_vocab_size() - 1
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.backend.token_to_id("</s>")
    assert set(tokenizer.special_ids) == {tokenizer.backend.token_to_id(name) for name in ("<unk>", "</s>")}
    assert tokenizer.tokenizer.all_special_ids
    assert max(tokenizer.tokenizer.get_vocab().values()) == tokenizer.highest_id


def test_the_corpus_is_counted_as_the_file_says(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", own(BYTE_LEVEL), model_type="qwen2", tokenizer_class="Qwen2Tokenizer")
    with_holes(folder)
    corpus = write_jsonl(tmp_path / "a.jsonl", ["in 2024", "the last tokens: café in Zürich"])
    config = Config.model_validate(
        {
            "corpus": {"urls": [str(corpus)]},
            "model": {"name": str(folder)},
            "storage": {"root": str(tmp_path / "root")},
        }
    )
    storage = Storage(config.storage.root)
    shards = finished(config, storage, TOKENIZE).result(TOKENIZE)
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    occurrences = storage.read_parquet(f"{shards.shards[0].folder}/occurrences.parquet").to_pylist()
    first = [row["token_id"] for row in occurrences if row["doc"] == 0]
    assert first == ids_of(expected, "in 2024")
    assert len(first) < len("in 2024") - 1  # digits are merged
    text_of = {row["token_id"]: row["token"] for row in storage.read_parquet(shards.vocabulary).to_pylist()}
    assert max(row["token_id"] for row in occurrences) >= expected.get_vocab_size()  # beyond the hole
    assert "".join(text_of[token_id] for token_id in first) == "in 2024"
    assert all(row["token_id"] in text_of for row in occurrences)


def with_holes(folder: Path) -> dict[str, int]:
    """Add 6 to the last 40 ids of a folder's vocabulary; gives it."""
    model = edit(folder)["model"]
    first = len(model["vocab"]) - 40
    model["vocab"] = {token: i + 6 * (i >= first) for token, i in model["vocab"].items()}
    edit(folder, model=model)
    return dict(model["vocab"])


def test_a_vocabulary_may_have_holes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", own(BYTE_LEVEL))
    vocabulary = with_holes(folder)
    tokenizer = loaded(folder, tmp_path)
    assert list(tokenizer.texts) == sorted(vocabulary.values())
    assert tokenizer.highest_id == max(vocabulary.values()) == len(vocabulary) + 5
    config = Config.model_validate({"corpus": {"urls": ["a"]}, "model": {"name": "m"}})
    require_rows(tokenizer, len(vocabulary) + 6, config)
    with pytest.raises(ModelError, match=rf"has the id {len(vocabulary) + 5}, but m has an embedding of"):
        require_rows(tokenizer, len(vocabulary) + 5, config)


def test_an_added_token_keeps_the_id_that_the_file_gives_it(tmp_path: Path) -> None:
    # tokenizers gives it the next number instead (huggingface/tokenizers#1366), here that of another token.
    folder = saved(tmp_path / "model", own(BYTE_LEVEL))
    vocabulary = with_holes(folder)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [*edit(folder)["added_tokens"], {"id": 500, "content": "<|call|>", **flags}]
    edit(folder, added_tokens=added)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|call|>") != 500
    tokenizer = loaded(folder, tmp_path)
    assert ids_of(tokenizer.backend, "the<|call|>")[-1] == 500
    assert tokenizer.texts[500] == "<|call|>"
    assert {token: i for token, i in tokenizer.backend.get_vocab().items() if i != 500} == vocabulary
    # and so it is where workers load it again
    again = Tokenizer.from_str(tokenizer.backend.to_str())
    assert again.get_vocab() == tokenizer.backend.get_vocab()


def test_tokens_that_only_the_configuration_adds_have_their_ids(tmp_path: Path) -> None:
    # Fine-tunes add <|im_start|> in added_tokens.json or tokenizer_config.json beside their base's tokenizer.json.
    folder = saved(
        tmp_path / "model",
        own(BYTE_LEVEL),
        added_tokens_decoder={"425": {"content": "<|im_start|>", "special": True, "normalized": False}},
    )
    # Open-Orca/Mistral-7B-OpenOrca repeats its base's tokens there (ggml-org/llama.cpp#3585).
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 1, "<|im_end|>": 422}))
    tokenizer = loaded(folder, tmp_path)
    ids = ids_of(tokenizer.backend, "<|im_start|>the<|im_end|>")
    assert (ids[0], ids[-1]) == (425, 422)
    assert tokenizer.backend.token_to_id("<s>") == 1


def two_for_one_id(folder: Path) -> None:
    model = edit(folder)["model"]
    model["vocab"]["zz"] = 300
    edit(folder, model=model)


def renamed_token(folder: Path) -> None:
    configuration = {"added_tokens_decoder": {"300": {"content": "<|im_start|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))


def half_copied(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])


def of_a_later_release(folder: Path) -> None:
    edit(folder, model={**edit(folder)["model"], "type": "Hyper"})


def no_files(folder: Path) -> None:
    # Qwen2's class then makes a tokenizer of one token.
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))


def code_of_its_own(folder: Path) -> None:
    configuration = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "config.json").write_text(json.dumps({}))


@pytest.mark.parametrize(
    ("damage", "message", "way_out"),
    [
        (two_for_one_id, r"gives the id 300 to two tokens, .*'zz'", "model.tokenizer"),
        (renamed_token, r"the id 300 to the token '.*', but to '<\|im_start\|>'", "save the tokenizer again"),
        (half_copied, r"(no JSON|cannot load the tokenizer of .*): ", "damaged"),
        (of_a_later_release, r"(cannot be read by tokenizers|cannot load the tokenizer of .*): ", "damaged"),
        (no_files, r"has no tokenizer: neither tokenizer.json nor .*vocab.json", "model.tokenizer"),
        (code_of_its_own, r"cannot load the tokenizer of .*model \(model.name\): ", "runs no code"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(
    damage: Any, message: str, way_out: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", own(BYTE_LEVEL))
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        loaded(folder, tmp_path)
    assert str(folder) in caught.value.message
    assert re.search(way_out, caught.value.hint)


def test_a_package_that_is_missing_is_named_with_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def lacks(*_: Any, **__: Any) -> Any:
        raise ImportError("Tokenizer needs these packages:\n\n  blobfile, tiktoken\n\nInstall them.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lacks)
    with pytest.raises(
        ModelError, match=r"packages: blobfile, tiktoken Install them\. \(install that package"
    ) as caught:
        loaded(saved(tmp_path / "model", own(BYTE_LEVEL)), tmp_path)
    assert str(tmp_path / "model") in caught.value.message


def gguf(path: Path, pre: str | None, *, kind: str = "gpt2", prefixed: bool | None = None) -> Path:
    """The header of a GGUF file: how it cuts text, and no more."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if prefixed is not None:
        writer.add_add_space_prefix(prefixed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_file_says_how_it_cuts_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = own(BYTE_LEVEL)
    assert len(ids_of(cut, "in 2024")) < 6
    # transformers does not know SmolLM's way, which is one digit a token.
    read_as_gguf_says(cut, gguf(tmp_path / "smollm.gguf", "smollm"))
    assert [cut.id_to_token(i) for i in ids_of(cut, "2024")] == ["2", "0", "2", "4"]
    with pytest.raises(ModelError, match=r"unheard\.gguf cuts text as 'unheard' .*model\.tokenizer"):
        read_as_gguf_says(own(BYTE_LEVEL), gguf(tmp_path / "unheard.gguf", "unheard"))
    composed = own(BYTE_LEVEL)
    read_as_gguf_says(composed, gguf(tmp_path / "olmo.gguf", "olmo"))
    assert ids_of(composed, "u\u0308") == ids_of(composed, "ü")
    untold = own(BYTE_LEVEL)
    read_as_gguf_says(untold, gguf(tmp_path / "untold.gguf", None))
    assert "untold.gguf does not say how it cuts text" in caplog.text


def test_a_gguf_file_may_put_no_blank_before_a_text(tmp_path: Path) -> None:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces = own(metaspace, decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)]))
    blank, plain = (pieces.token_to_id(token) for token in ("▁the", "the"))
    assert ids_of(pieces, "the") == [blank]
    read_as_gguf_says(pieces, gguf(tmp_path / "pieces.gguf", "default", kind="llama", prefixed=False))
    assert blank not in ids_of(pieces, "the")
    assert plain is None or ids_of(pieces, "the") == [plain]
    assert pieces.decode(ids_of(pieces, " the")) == " the"


def test_a_tokenizer_saved_by_transformers_is_read_as_before(tmp_path: Path) -> None:
    own_tokenizer = save_tokenizer(tmp_path / "model")
    tokenizer = loaded(tmp_path / "model", tmp_path)
    assert tokenizer.special_ids == (0, 1, 2)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 2)
    for text in texts(20):
        assert ids_of(tokenizer.backend, text) == own_tokenizer.encode(text, add_special_tokens=False)


def test_dropout_of_training_is_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    text = " ".join(texts(20))
    storage = Storage(str(tmp_path / "storage"))
    expected = load_tokenizer(Model(name=str(tmp_path)), storage).backend.encode(text).ids
    value = json.loads(file.read_text())
    value["model"]["dropout"] = 0.5
    file.write_text(json.dumps(value))
    assert load_tokenizer(Model(name=str(tmp_path)), storage).backend.encode(text).ids == expected
    assert "BPE dropout" in caplog.text
