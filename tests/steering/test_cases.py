"""The file of cases: prompts as the model sees them, their places, and an error for each thing that can be wrong."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from builders import Cut, Document, make_config, make_dictionary, run_of, write_corpus

from infra.config_file import load_config
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, ModelError, StorageError
from schemas.steering.section import Case, Cases, Steering, short
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.facts import Facts
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.stages import check_fit
from tasks.steering import EXPERIMENT
from tasks.steering.cases import check_cases, check_clamps, check_feature_ids, place_of, read_cases
from tasks.steering.prompts import Prompt, content_position, last_function_position, target_ids, tokenized

REPOSITORY = Path(__file__).parents[2]
N_POSITIONS = 128

TURNS = (
    "{{ bos_token }}be kind\n{% for m in messages %}<eos>{{ m['role'] }}\n{{ CONTENT }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}the answer\n{% endif %}"
)
TEMPLATES = {
    "as it is": TURNS.replace("CONTENT", "m['content']"),
    "stripped": TURNS.replace("CONTENT", "m['content'] | trim"),
    "depends on it": TURNS.replace("CONTENT", "m['content']").replace(
        "be kind", "{{ messages[0]['content'] | length }}"
    ),
    "changed": TURNS.replace("CONTENT", "m['content'] | upper"),
    "failing": "{{ raise_exception('no user here') }}",
    "dividing": "{{ 1 / 0 }}",
    "dated": TURNS.replace("CONTENT", "m['content']").replace(
        "be kind", "{{ strftime_now('%d %b %Y, %A %-d.%-m.%y %H:%M') }}"
    ),
    "of one day": TURNS.replace("CONTENT", "m['content']").replace(
        "be kind", "26 Jul 2024, Friday 26.7.24 00:00"
    ),
}

CASE: dict[str, Any] = {
    "name": "place",
    "relation": "where",
    "prompts": ["is he of Russia?", "is he of Moscow?"],
    "targets": ["river", "mountain"],
}
TRAIT: dict[str, Any] = {
    "name": "plural",
    "positive": ["they are in the river.", "we are in London."],
    "negative": ["he is in the river.", "he is in London."],
}
GIVEN: dict[str, Any] = {"name": "given", "layer": 1, "features": [3, 0], "values": [1.5, 2.0]}
STEER: dict[str, Any] = {"traits": ["plural"], "prompt": "who is in the river?", "target": " they"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """A tiny model for each chat template; None: without one."""
    made: dict[str | None, Path] = {}

    def model(template: str | None) -> Path:
        if template not in made:
            made[template] = tiny.save_model(tmp_path_factory.mktemp("model"))
            if template is not None:
                (made[template] / "chat_template.jinja").write_text(TEMPLATES[template])
        return made[template]

    return model


def toml(cases: dict[str, list[dict[str, Any]]]) -> str:
    """Entries as a TOML file: JSON's strings, numbers and lists are TOML's."""
    return "".join(
        f"[[{kind}]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())
        for kind, entries in cases.items()
        for entry in entries
    )


class Setup:
    """A configuration on a tiny model, and a file of cases."""

    def __init__(self, folder: Path, model: Path, **changes: Any) -> None:
        self.storage = Storage(str(folder / "run"))
        self.file = folder / "cases.toml"
        sae = {"layer": 1, "train": {"d_sae": 16, "k": 4}}, {"layer": 2, "train": {"d_sae": 16, "k": 4}}
        values = {
            "corpus": {"urls": ["a.jsonl"]},
            "model": {"name": str(model)},
            "windows": {"context_size": 32},
            "sae": list(sae),
            "storage": {"root": self.storage.root},
            **changes,
        }
        values["steering"] = {"cases": str(self.file), **changes.get("steering", {})}
        self.config = Config.model_validate(values)

    def write(self, **cases: list[dict[str, Any]]) -> None:
        self.file.write_text(toml(cases), encoding="utf-8")

    @property
    def tokenizer(self) -> LoadedTokenizer:
        return load_tokenizer(self.config.model, self.storage)

    def prompt(self, text: str) -> Prompt:
        return tokenized(text, self.config, self.tokenizer)


@pytest.fixture
def setup(tmp_path: Path, models: Callable[[str | None], Path]) -> Setup:
    return Setup(tmp_path, models(None))


def at(setup: Setup, address: str) -> Config:
    """The configuration with its cases elsewhere."""
    return setup.config.model_copy(update={"steering": Steering(cases=address)})


def refused(setup: Setup, *parts: str) -> str:
    """The message of the error that checking gives, which has all of `parts`."""
    with pytest.raises(ConfigError) as raised:
        check_cases(setup.config, setup.storage)
    message = str(raised.value)
    for part in parts:
        assert part in message
    assert raised.value.hint
    return message


# How the model sees a prompt


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_without_a_chat_template_a_prompt_is_its_text_after_bos(
    tmp_path: Path, models: Callable[[str | None], Path], prepend_bos: bool
) -> None:
    setup = Setup(tmp_path, models(None), windows={"context_size": 32, "prepend_bos": prepend_bos})
    prompt, plain = setup.prompt("naïve 🙂 日本"), setup.tokenizer.tokenizer
    assert (
        list(prompt.ids) == [0] * prepend_bos + plain("naïve 🙂 日本", add_special_tokens=False)["input_ids"]
    )
    assert prompt.is_special == (True,) * prepend_bos + (False,) * (len(prompt.ids) - prepend_bos)
    assert prompt.in_text == tuple(not special for special in prompt.is_special)
    vocabulary = setup.tokenizer.texts
    assert prompt.tokens == tuple(vocabulary[i] for i in prompt.ids)


@pytest.mark.parametrize(
    ("template", "text", "seen"),
    [
        ("as it is", "  the river? ", "  the river? "),
        ("as it is", "be kind", "be kind"),  # the template says the same
        ("as it is", "user", "user"),
        ("as it is", "naïve 🙂 日本", "naïve 🙂 日本"),
        ("stripped", "  the river? \n", "the river?"),
        ("depends on it", "the mountain is in Zürich", "the mountain is in Zürich"),
    ],
)
def test_a_prompt_is_found_in_the_chat_template(
    tmp_path: Path, models: Callable[[str | None], Path], template: str, text: str, seen: str
) -> None:
    setup = Setup(tmp_path, models(template))
    prompt, tokenizer = setup.prompt(text), setup.tokenizer.tokenizer
    whole = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert list(prompt.ids) == list(whole["input_ids"])  # transformers' own: with one BOS, its template's
    assert prompt.ids.count(0) == 1
    assert [i in (0, 1, 2) for i in prompt.ids] == list(prompt.is_special)
    own = [position for position, is_own in enumerate(prompt.in_text) if is_own]
    assert tokenizer.decode([prompt.ids[position] for position in own]) == seen
    assert own == list(range(own[0], own[-1] + 1))
    # Of a text that the template says too, it is the one in the message.
    assert prompt.is_special[own[-1] + 1]


def test_a_chat_template_that_shows_the_date_shows_one_day(
    tmp_path: Path, models: Callable[[str | None], Path]
) -> None:
    dated, fixed = (Setup(tmp_path, models(name)).prompt("the river?") for name in ("dated", "of one day"))
    assert dated == fixed


@pytest.mark.parametrize("template", [None, "as it is"])
@pytest.mark.parametrize("text", ["the  cat", "  the cat  ", "   the \n\n cat", " a \u3000 🙂 b "])
def test_blank_tokens_are_of_the_text_whatever_the_tokenizer_says_of_spans(
    tmp_path: Path, models: Callable[[str | None], Path], template: str | None, text: str
) -> None:
    from tokenizers import processors

    setup = Setup(tmp_path, models(template))
    tokenizer = setup.tokenizer
    plain = tokenized(text, setup.config, tokenizer)
    spans = tokenizer.backend.encode(text).offsets
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer.backend.encode(text).offsets != spans
    assert tokenized(text, setup.config, tokenizer) == plain
    assert sum(plain.in_text) == len(spans)


def test_a_chat_template_can_be_left_out(tmp_path: Path, models: Callable[[str | None], Path]) -> None:
    chat, bare = Setup(tmp_path, models("as it is"), steering={"chat_template": False}), models(None)
    assert chat.prompt("the river").ids == Setup(tmp_path, bare).prompt("the river").ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("changed", "does not show the prompt"),
        ("failing", "no user here"),
        ("dividing", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_chat_template_that_hides_the_prompt_is_refused(
    tmp_path: Path, models: Callable[[str | None], Path], template: str, reason: str
) -> None:
    setup = Setup(tmp_path, models(template))
    setup.write(case=[CASE])
    refused(setup, "[[case]] 'place'", "'is he of Russia?'", reason, "steering.chat_template = false")


def test_bos_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).exists():
            saved = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps({k: v for k, v in saved.items() if k != "bos_token"}))
    setup = Setup(tmp_path, model)
    setup.write(case=[CASE])
    with pytest.raises(ModelError, match=r"\[\[case\]\] 'place': the tokenizer of .* has no BOS token"):
        check_cases(setup.config, setup.storage)


# Places


def of_ids(ids: list[int], special: set[int], own: set[int]) -> Prompt:
    positions = range(len(ids))
    return Prompt(
        text="a prompt",
        ids=tuple(ids),
        tokens=tuple(f"<{i}>" for i in ids),
        is_special=tuple(i in special for i in ids),
        in_text=tuple(position in own for position in positions),
    )


def test_function_and_content_positions_are_those_of_the_plainest_search() -> None:
    rng, searched = random.Random(1), Counter[str]()
    for _ in range(300):
        ids = [rng.randrange(8) for _ in range(rng.randrange(1, 9))]
        start = rng.randrange(len(ids))
        prompt = of_ids(ids, {0, 7}, set(range(start, rng.randrange(start, len(ids)) + 1)))
        function = {0, 1, 2, 3}
        ordinary = [p for p in range(len(ids)) if ids[p] in (1, 2, 3)]
        if not ordinary:
            searched["none"] += 1
            with pytest.raises(ConfigError, match=r"'a prompt' has no function token of this corpus; .*<"):
                last_function_position(prompt, function)
            continue
        assert last_function_position(prompt, function) == ordinary[-1]
        content = [p for p in range(ordinary[-1]) if ids[p] in (4, 5, 6) and prompt.in_text[p]]
        assert content_position(prompt, function) == (content[-1] if content else None)
        searched["content" if content else "no content"] += 1
    assert min(searched.values()) > 10
    assert len(searched) == 3


def test_the_place_is_the_run_of_tokens_that_differ(setup: Setup) -> None:
    case = Case.model_validate(
        {**CASE, "prompts": [" of Russia in", " of Moscow in", " of mountain in"], "targets": None}
    )
    words = {len(setup.tokenizer.backend.encode(f" {w}").ids) for w in ("Russia", "Moscow", "mountain")}
    assert words == {1}
    assert place_of(case, [setup.prompt(text) for text in case.prompts]) == (2, 3)
    ids = [[5, 1, 2, 6], [5, 3, 2, 6], [5, 3, 4, 6]]
    assert place_of(case, [of_ids(i, set(), set()) for i in ids]) == (1, 3)


def test_the_function_tokens_are_those_of_the_table(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    rng = random.Random(0)
    tokens = rng.choices(range(12), [2.0**-rank for rank in range(12)], k=500)
    config = make_config(storage, layers=(), function_tokens={"share": 0.8})
    shards = write_corpus(
        storage, [Cut(source="a.jsonl", documents=[Document(tokens=tokens, active={})], in_graph=0)]
    )
    counts, expected, total = Counter(tokens), [], 0
    for token in sorted(counts, key=lambda token: (-counts[token], token)):
        expected.append(token)
        total += counts[token]
        if total >= 0.8 * len(tokens):
            break
    found = function_token_ids(config, storage, shards)
    assert found.tolist() == sorted(expected)
    assert str(found.dtype) == "int32"
    assert 1 < len(expected) < 12
    assert not storage.sizes("tables"), "who only asks writes nothing"
    name = CorpusTables().build(run_of(config, storage, {TOKENIZE: shards})).tables["tokens"]
    rows = storage.read_parquet(name).to_pylist()
    assert sorted(row["token_id"] for row in rows if row["is_function"]) == found.tolist()
    assert function_token_ids(config, storage, shards).tolist() == found.tolist()


# The file


def test_a_file_of_all_kinds_is_read_as_it_is(setup: Setup) -> None:
    setup.write(case=[CASE], trait=[TRAIT, GIVEN], steer=[STEER, {**STEER, "traits": ["plural", "given"]}])
    cases = check_cases(setup.config, setup.storage)
    assert cases == read_cases(setup.config, setup.storage)
    assert cases == Cases.model_validate(
        {"case": [CASE], "trait": [TRAIT, GIVEN], "steer": [STEER, {**STEER, "traits": ["plural", "given"]}]}
    )
    assert [steer.title for steer in cases.steer] == ["plural", "plural + given"]
    check_feature_ids(cases, [make_dictionary(1, 4), make_dictionary(2, 1)])


def test_a_run_begins_with_the_cases(setup: Setup) -> None:
    setup.write(case=[CASE])
    check_fit(setup.config, setup.storage)
    setup.write(case=[{**CASE, "prompts": ["", "a"]}])
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        check_fit(setup.config, setup.storage)


@pytest.mark.parametrize("address", ["nowhere/cases.toml", "."])
def test_a_file_that_is_not_there(setup: Setup, tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"steering\.cases = .*: no such file \(give the path or URL"):
        check_cases(at(setup, str(tmp_path / address)), setup.storage)


SECRET = "user:hunter2@"


@pytest.mark.parametrize("scheme", ["memory", "nothing-like-it"])
def test_secrets_of_an_address_are_not_in_messages(setup: Setup, scheme: str) -> None:
    with pytest.raises(ConfigError, match=rf"steering\.cases = {scheme}://place/cases.toml") as raised:
        read_cases(at(setup, f"{scheme}://{SECRET}place/cases.toml?token=hunter2"), setup.storage)
    assert "hunter2" not in str(raised.value)


def test_a_place_that_does_not_answer(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, *_: object, **__: object) -> None:
        raise OSError(f"no answer from {url}")

    monkeypatch.setattr("tasks.steering.cases.fsspec.open", fail)
    with pytest.raises(
        StorageError, match=r"cannot read steering\.cases = s3://bucket/cases.toml \(OSError\)"
    ) as raised:
        read_cases(at(setup, f"s3://{SECRET}bucket/cases.toml"), setup.storage)
    assert "hunter2" not in str(raised.value)


def test_no_secret_of_a_readable_place_is_in_messages(setup: Setup) -> None:
    import fsspec

    address = f"memory://{SECRET}place/cases.toml"
    config = at(setup, address)
    for content in (
        b"[[case",
        b"[[case]]\nname = 1\n",
        toml({"case": [{**CASE, "prompts": ["in", "in the"]}]}).encode(),
    ):
        with fsspec.open(address, "wb") as file:
            file.write(content)
        with pytest.raises(ConfigError, match=r"memory://place/cases\.toml") as raised:
            check_cases(config, setup.storage)
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("content", [b"[[case]\n", b"\xff\xfe[[case]]\n"])
def test_a_file_that_is_not_toml(setup: Setup, content: bytes) -> None:
    setup.file.write_bytes(content)
    refused(setup, f"steering.cases = {setup.file} is not valid TOML")


@pytest.mark.parametrize(
    ("cases", "parts"),
    [
        (
            {"case": [{**CASE, "promts": []}]},
            ["[[case]] 'place', promts: no such key; did you mean prompts?"],
        ),
        ({"cases": [CASE]}, ["cases: no such key; did you mean case?"]),
        ({"case": [{**CASE, "prompts": ["a", " \n"]}]}, ["[[case]] 'place': prompt 2 is empty"]),
        (
            {"case": [CASE, {"name": "x"}]},
            ["[[case]] 'x', relation: Field required", "[[case]] 'x', prompts: "],
        ),
        ({"case": [{"relation": "r", "prompts": ["a", "b"]}]}, ["[[case]] number 1, name: Field required"]),
        ({"case": [{**CASE, "prompts": ["a", "a"]}]}, ["[[case]] 'place': two of its prompts are the same"]),
        ({"case": [{**CASE, "prompts": ["a"]}]}, ["[[case]] 'place', prompts: "]),
        ({"case": [{**CASE, "targets": ["a"]}]}, ["[[case]] 'place': 2 prompts have 1 targets"]),
        ({"case": [CASE, CASE]}, ["two [[case]] entries have the name 'place'"]),
        ({"trait": [{**TRAIT, "negative": ["a", ""]}]}, ["[[trait]] 'plural': one of its prompts is empty"]),
        (
            {"trait": [{**TRAIT, "negative": ["a", "b", "c"]}]},
            ["[[trait]] 'plural': 2 positive prompts have 3"],
        ),
        (
            {"trait": [{**TRAIT, "layer": 1}]},
            ["[[trait]] 'plural': give either positive and negative prompts"],
        ),
        ({"trait": [{**GIVEN, "features": [-1, 3]}]}, ["[[trait]] 'given', features.0: "]),
        ({"steer": [STEER]}, ["[[steer]] 'plural' names the trait 'plural'; there are none"]),
        (
            {"trait": [TRAIT], "steer": [{**STEER, "traits": ["plural", "singular"]}]},
            ["[[steer]] 'plural + singular' names the trait 'singular'; there are plural"],
        ),
        ({"trait": [TRAIT], "steer": [{**STEER, "prompt": " "}]}, ["[[steer]]", "its prompt is empty"]),
        (
            {"trait": [TRAIT], "steer": [{**STEER, "target": ""}]},
            ["[[steer]] 'who is in the river?', target: "],
        ),
        ({"trait": [TRAIT]}, ["it has neither a [[case]] nor a [[steer]]"]),
    ],
)
def test_entries_that_are_wrong_in_themselves(setup: Setup, cases: dict[str, Any], parts: list[str]) -> None:
    setup.write(**cases)
    refused(setup, str(setup.file), *parts)


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        (
            ["is he of Russia?", "is he of Russia and Moscow?"],
            [
                "its prompts need equally many tokens",
                "'is he of Russia?' has 7",
                "has 9",
                "fillers of another length",
            ],
        ),
        (["is he of Russia?", "is she of Moscow?"], ["differ in more than one place", "' of', position 4"]),
        (["is he of Russia", "is he of Moscow"], ["nothing follows the place"]),
    ],
)
def test_prompts_that_cannot_be_compared(setup: Setup, prompts: list[str], parts: list[str]) -> None:
    setup.write(case=[{**CASE, "prompts": prompts}])
    refused(setup, f"{setup.file}: [[case]] 'place': ", *parts)


def test_prompts_that_differ_in_spaces_that_the_template_strips(
    tmp_path: Path, models: Callable[[str | None], Path]
) -> None:
    setup = Setup(tmp_path, models("stripped"))
    setup.write(case=[{**CASE, "prompts": ["in the river", "in the river "]}])
    refused(setup, "[[case]] 'place': its prompts have the same tokens")


def test_a_target_without_a_token(setup: Setup) -> None:
    setup.write(case=[{**CASE, "targets": ["river", ""]}])
    refused(setup, "[[case]] 'place': the target '' has no token")


def sentencepiece(kind: str) -> Any:
    """A tokenizer that puts a space before a text and writes spaces as `▁`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    specials = ["<bos>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=["\n", "<", ">"], show_progress=False
    )
    if kind == "normalizer":  # as Llama 2's
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(tiny.texts(200), trainer)
    if kind == "normalizer":
        backend.pre_tokenizer = None
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend


def wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["[UNK]", "<bos>", "<eos>", "<unk>", "the", "riv", "river", "er", "##ver", "##s"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def with_tokenizer(tmp_path: Path, model: Path, backend: Any, template: str | None = None) -> Setup:
    """A setup on a model with another tokenizer."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template and TEMPLATES[template]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    setup = Setup(tmp_path, model)
    named = setup.config.model.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    setup.config = setup.config.model_copy(update={"model": named})
    return setup


@pytest.mark.parametrize("template", [None, "as it is"])
@pytest.mark.parametrize("kind", ["normalizer", "pre-tokenizer"])
def test_a_target_is_what_goes_on_from_the_prompt(
    tmp_path: Path, models: Callable[[str | None], Path], kind: str, template: str | None
) -> None:
    setup = with_tokenizer(tmp_path, models(None), sentencepiece(kind), template)
    tokenizer = setup.tokenizer
    n_alone = 0
    # The last three merge with what stands before them: the prompt, or its template's end.
    for text, target in [
        ("he is in", " London"),
        ("he is in", " the river."),
        ("he is in", "."),
        ("he is in ", "London"),
        ("he is in", "side London"),
        ("he is in\n", "\nLondon"),
    ]:
        prompt, found = setup.prompt(text), target_ids(target, text, setup.config, tokenizer)
        whole = tokenizer.tokenizer.decode([*prompt.ids, *found])
        assert whole == tokenizer.tokenizer.decode(list(prompt.ids)) + target
        n_alone += found == tokenizer.backend.encode(target, add_special_tokens=False).ids
    assert n_alone < 6
    london = setup.tokenizer.backend.token_to_id("▁London")
    if template is None:
        assert target_ids(" London", "he is in", setup.config, tokenizer) == [london]
        assert target_ids("London", "he is in ", setup.config, tokenizer)[0] != london


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("he is in", " London"),
        ("in the riv", "er?"),
        ("in the river ", "Thames"),
        ("in\n", "\n\n naïve 🙂"),
        ("in ", "  two"),
    ],
)
@pytest.mark.parametrize("template", [None, "as it is"])
def test_bytes_have_the_same_tokens_anywhere(
    tmp_path: Path, models: Callable[[str | None], Path], template: str | None, text: str, target: str
) -> None:
    setup = Setup(tmp_path, models(template))
    found = target_ids(target, text, setup.config, setup.tokenizer)
    assert found == setup.tokenizer.backend.encode(target, add_special_tokens=False).ids


def test_pieces_of_words_follow_as_pieces(tmp_path: Path, models: Callable[[str | None], Path]) -> None:
    setup = with_tokenizer(tmp_path, models(None), wordpiece())
    pieces = [
        setup.tokenizer.backend.id_to_token(i)
        for i in target_ids("s", "the er", setup.config, setup.tokenizer)
    ]
    assert pieces == ["##s"]
    setup.write(trait=[TRAIT], steer=[{**STEER, "prompt": "the riv", "target": "er"}])
    refused(
        setup, "[[steer]] 'plural', 'the riv': the target 'er' merges with the end of the prompt 'the riv'"
    )


def test_later_tokens_to_look_at(setup: Setup) -> None:
    setup.write(case=[{**CASE, "look_at": ["?", "never"]}])
    check_cases(setup.config, setup.storage)
    setup.write(case=[{**CASE, "look_at": [" of"]}])
    refused(setup, "[[case]] 'place': look_at: ' of' are not among", "differ: '?'")


def long(setup: Setup, n_tokens: int, end: str = "") -> str:
    """A prompt of that many tokens, BOS not counted."""
    text = " the" * (n_tokens - len(setup.tokenizer.backend.encode(end).ids)) + end
    assert len(setup.tokenizer.backend.encode(text).ids) == n_tokens
    return text


@pytest.mark.parametrize("too_many", [0, 1])
def test_prompts_at_the_end_of_the_window(setup: Setup, too_many: int) -> None:
    setup = Setup(setup.file.parent, Path(setup.config.model.name), steering={"max_new_tokens": 2})
    n = N_POSITIONS + too_many  # tokens that the model sees, BOS among them
    pair = [long(setup, n - 1, end) for end in (" Russia.", " Moscow.")]
    contrast = ["in the", long(setup, n - 1)]
    before_target, before_text = long(setup, n - 4), long(setup, n - 3)
    expected: list[tuple[dict[str, Any], str]] = [
        ({"case": [{**CASE, "prompts": pair}]}, f"[[case]] 'place': the {n} tokens of the prompt ' the"),
        ({"case": [CASE], "trait": [{**TRAIT, "negative": contrast}]}, f"[[trait]] 'plural': the {n} tokens"),
        (
            {"trait": [TRAIT], "steer": [{**STEER, "prompt": before_target, "target": " the the the"}]},
            f"[[steer]] 'plural', {short(before_target)}: the {n - 3} tokens",
        ),
        (
            {"trait": [TRAIT], "steer": [{**STEER, "prompt": before_text, "target": " the"}]},
            f"[[steer]] 'plural', {short(before_text)}: the {n - 2} tokens",
        ),
    ]
    for cases, message in expected:
        setup.write(**cases)
        if too_many:
            told = refused(setup, message, f"built for ({N_POSITIONS})", "shorten the prompt")
            assert (" that may follow" in told) == ("steer" in message)
        else:
            check_cases(setup.config, setup.storage)


def test_layers_and_features_that_there_are_not(setup: Setup) -> None:
    steer = {**STEER, "traits": ["given"]}
    setup.write(trait=[{**GIVEN, "layer": 0}], steer=[steer])
    refused(setup, "[[trait]] 'given': layer 0 has no dictionary; the layers are [1, 2]")
    setup.write(trait=[{**GIVEN, "values": [1.5, -2.0]}], steer=[steer])
    refused(setup, "[[trait]] 'given': one of its values is below 0", 'steering.modes = ["add"]')
    setup.write(trait=[{**GIVEN, "features": [3, 16]}], steer=[steer])
    refused(setup, "[[trait]] 'given': feature 16 is not in the dictionary of layer 1, which has 16")
    setup.write(trait=[{**GIVEN, "features": [3, 15]}], steer=[steer])
    cases = check_cases(setup.config, setup.storage)
    check_feature_ids(cases, [make_dictionary(1, 16)])
    with pytest.raises(ConfigError, match=r"\[\[trait\]\] 'given': feature 15 .* layer 1, which has 15"):
        check_feature_ids(cases, [make_dictionary(1, 15)])
    with pytest.raises(ConfigError, match=r"\[\[trait\]\] 'given': layer 1 has no dictionary; .* \[2\]"):
        check_feature_ids(cases, [make_dictionary(2, 16)])


def test_dictionaries_whose_features_cannot_be_clamped(setup: Setup) -> None:
    found = {"name": "found", "positive": ["river", "fox"], "negative": ["the", "of"]}
    setup.write(trait=[GIVEN, found], steer=[{**STEER, "traits": ["given"]}])
    cases = check_cases(setup.config, setup.storage)
    facts = {
        1: Facts(architecture="jumprelu", d_in=4, d_sae=16),
        2: Facts(architecture="topk", d_in=4, d_sae=16),
    }
    # The given features are at layer 1, so that layer 2 is not steered.
    check_clamps(setup.config, cases, facts)
    with pytest.raises(ConfigError, match=r"\[\[steer\]\] 'given', .*layer 1 cannot be clamped: .* topk"):
        check_clamps(setup.config, cases, {1: facts[2], 2: facts[1]})
    # The layer is still to be chosen: one that can be clamped may be.
    setup.write(trait=[GIVEN, found], steer=[STEER | {"traits": ["found"]}])
    cases = check_cases(setup.config, setup.storage)
    check_clamps(setup.config, cases, facts)
    check_clamps(setup.config, cases, {1: facts[2]})
    neither = {1: facts[2], 2: facts[2]}
    with pytest.raises(
        ConfigError, match=r"\[\[steer\]\] 'found', .*layer 1 cannot be clamped: .* topk dictionary"
    ):
        check_clamps(setup.config, cases, neither)
    model = Path(setup.config.model.name)
    at_2 = Setup(setup.file.parent, model, steering={"layer": 2}).config
    with pytest.raises(ConfigError, match="layer 2 cannot be clamped"):
        check_clamps(at_2, cases, facts)
    check_clamps(Setup(setup.file.parent, model, steering={"modes": ["add"]}).config, cases, neither)


def test_a_dictionary_on_disk_that_cannot_be_clamped_is_refused_at_once(setup: Setup, tmp_path: Path) -> None:
    tiny.save_sae(tmp_path / "sae", "topk")
    entry = {"layer": 1, "path": str(tmp_path / "sae")}
    asked = Setup(tmp_path, Path(setup.config.model.name), sae=[entry])
    asked.write(trait=[{**GIVEN, "layer": 1}], steer=[{**STEER, "traits": ["given"]}])
    with pytest.raises(ConfigError, match=r"features of layer 1 cannot be clamped.*modes = \[\"add\"\]"):
        check_fit(asked.config, asked.storage)


def test_traits_that_cannot_be_steered_together(setup: Setup) -> None:
    other = {**GIVEN, "name": "other", "layer": 2}
    setup.write(trait=[GIVEN, other], steer=[{**STEER, "traits": ["given", "other"]}])
    refused(setup, "[[steer]] 'given + other'", "'given' at layer 1, 'other' at layer 2")
    setup = Setup(setup.file.parent, Path(setup.config.model.name), steering={"layer": 2})
    setup.write(trait=[GIVEN], steer=[{**STEER, "traits": ["given"]}])
    refused(setup, "[[trait]] 'given': its features are of layer 1, but steering.layer = 2")


def test_steering_at_a_layer_without_a_dictionary(setup: Setup) -> None:
    with pytest.raises(ValueError, match=r"steering\.layer = 5 has no sae entry; the layers are \[1, 2\]"):
        Setup(setup.file.parent, Path(setup.config.model.name), steering={"layer": 5})


def test_a_configuration_without_cases(setup: Setup) -> None:
    config = setup.config.model_copy(update={"steering": None})
    check_fit(config, setup.storage)
    for stage in EXPERIMENT.stages:
        assert not stage.applies(config)
        assert str(stage.refuse(config)).startswith(
            f"[{stage.name}] this configuration has no steering section"
        )
        assert stage.refuse(config).hint == "configs/steering.toml shows one"
        assert stage.applies(setup.config)
        assert stage.subject(setup.config) == "cases.toml"


# What is shipped


SHIPPED = {
    "cases.toml": [],
    "cases-chat.toml": ["steering.cases=configs/cases-chat.toml", "steering.chat_template=true"],
}
"""The files of cases, and the assignments under which configs/steering.toml takes them."""


def shipped(name: str) -> Cases:
    config = load_config(REPOSITORY / "configs" / "steering.toml", SHIPPED[name])
    section = config.steering
    assert section is not None
    there = section.model_copy(update={"cases": str(REPOSITORY / section.cases)})
    return read_cases(config.model_copy(update={"steering": there}), Storage("unused"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_cases_are_many(name: str) -> None:
    cases = shipped(name)
    assert len(cases.case) >= 20
    assert len({case.relation for case in cases.case}) >= 5
    assert len(cases.trait) >= 5
    assert all(trait.positive is not None and len(trait.positive) >= 8 for trait in cases.trait)
    assert len(cases.steer) >= 12
    assert sum(len(steer.traits) > 1 for steer in cases.steer) >= 2
    assert {name for steer in cases.steer for name in steer.traits} == {trait.name for trait in cases.trait}
    assert all(case.targets is not None and len({*case.targets}) > 1 for case in cases.case)


def test_the_shipped_configuration_shares_the_demos_dictionaries() -> None:
    demo, steering = (load_config(REPOSITORY / "configs" / f"{name}.toml") for name in ("demo", "steering"))
    for section in ("corpus", "model", "windows", "activations", "sae", "function_tokens"):
        assert getattr(demo, section) == getattr(steering, section)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.skipif(
    not (REPOSITORY / "assets" / "SmolLM2-135M-Instruct.Q4_1.gguf").exists(),
    reason="`make assets` fetches it",
)
def test_the_shipped_cases_fit_the_demo_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.chdir(REPOSITORY)
    config = load_config("configs/steering.toml", SHIPPED[name])
    # Without the weights, whose conversion takes most of a minute.
    place = {"pretrained_model_name_or_path": "assets", "gguf_file": Path(config.model.name).name}
    for part in (AutoConfig, AutoTokenizer):
        part.from_pretrained(**place).save_pretrained(tmp_path / "model")
    model = config.model.model_copy(update={"name": str(tmp_path / "model")})
    config, storage = config.model_copy(update={"model": model}), Storage(str(tmp_path))
    cases = check_cases(config, storage)
    tokenizer = load_tokenizer(config.model, storage)
    for case in cases.case:
        prompts = [tokenized(text, config, tokenizer) for text in case.prompts]
        first, end = place_of(case, prompts)
        # What follows in the text itself is to be looked at, not the template alone.
        assert sum(prompts[0].in_text[end:]) >= 4
        assert all(prompts[0].in_text[first:end])
        assert (prompts[0].tokens[-1] == "\n") == ("chat" in name)
