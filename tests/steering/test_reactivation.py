"""Features at each position of the cases' prompts, against plain hooks and `sae.encode`, and what is made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from builders import run_of

from infra.manifest import MANIFEST
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, ModelError
from schemas.steering.work import CaseFeatures
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, StagePlan
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine import run as engine
from tasks.engine.run import Run, make, plan
from tasks.models.model import load_model
from tasks.steering import prompt_features, reactivation
from tasks.steering.prompt_features import residuals_of
from tasks.steering.reactivation import REACTIVATION

SAES = {0: "jumprelu", 1: "standard", 2: "topk"}
NO_CORPUS = CorpusShards(shards=(), tokenizer_key="t", vocabulary="vocabulary.parquet")
CASES: list[dict[str, Any]] = [
    {
        "name": "capitals",
        "relation": "capital",
        "prompts": ["the river of Russia is that", "the river of Moscow is that"],
    },
    {
        "name": "with an end inside",
        "relation": "odd",
        "prompts": ["a quick fox <eos> was not the one.", "a river fox <eos> was not the one."],
        "look_at": [" the", "."],
    },
    {
        "name": "three",
        "relation": "capital",
        "prompts": [f"all {city} there, their him" for city in ("Moscow", "Russia", "Zürich")],
    },
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    for layer, kind in SAES.items():
        tiny.save_sae(folder / f"sae-{layer}", kind, seed=layer)
    tiny.save_sae(folder / "other-sae", "jumprelu", seed=9)
    return folder


def write_cases(path: Path, cases: list[dict[str, Any]]) -> Path:
    lines = []
    for case in cases:
        lines.append("[[case]]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in case.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


FILES = ("prompt_tokens", "prompt_features")


def prepare(
    parts: Path,
    root: Path,
    architecture: str = "llama",
    cases: list[dict[str, Any]] = CASES,
    saes: dict[int, str | None] | None = None,
    **sections: Any,
) -> Run:
    """A run whose dictionaries are there, without a corpus."""
    root.mkdir(exist_ok=True)
    names = {layer: f"sae-{layer}" for layer in SAES} | (saes or {})  # None: no dictionary there
    config = Config.model_validate(
        {
            "corpus": {"urls": ["corpus.jsonl"]},
            "model": {"name": str(parts / architecture)},
            "sae": [{"layer": layer, "path": str(parts / name)} for layer, name in names.items() if name],
            "steering": {"cases": str(write_cases(root / "cases.toml", cases))},
            "storage": {"root": str(root / "run")},
            **sections,
        }
    )
    run = run_of(config, Storage(config.storage.root), {TOKENIZE: NO_CORPUS})
    make(run, DICTIONARIES)
    return run


def planned(run: Run) -> StagePlan:
    """What `functok status` says, looked for anew."""
    run.forget(REACTIVATION)
    (told,) = plan(run, [REACTIVATION])
    return told


def found(run: Run) -> list[CaseFeatures]:
    """What is there, all of it."""
    run.forget(REACTIVATION)
    return run.result(REACTIVATION)


def folders_of(case: CaseFeatures, name: str) -> list[str]:
    return [case.folder] if name == "prompt_tokens" else [entry.folder for entry in case.layers]


def rows(made: list[CaseFeatures], storage: Storage, name: str) -> list[list[dict[str, Any]]]:
    read = []
    for case in made:
        tables = [storage.read_parquet(f"{folder}/{name}.parquet") for folder in folders_of(case, name)]
        assert all(table.schema == SHARD_FILES[name] for table in tables)
        read.append([row for table in tables for row in table.to_pylist()])
        if name == "prompt_features":
            layers = [[entry.layer] for entry in case.layers]
            assert [table["layer"].unique().to_pylist() for table in tables] == layers
    return read


def plain_ids(folder: Path, prompt: str, prepend_bos: bool = True) -> tuple[list[int], set[int]]:
    """A prompt's ids, and the special ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [*([tokenizer.bos_token_id] if prepend_bos else []), *ids], set(tokenizer.all_special_ids)


def plain_residuals(folder: Path, ids: list[int]) -> dict[int, torch.Tensor]:
    """(n_tokens, d_model) after each block, by a whole forward of the model with its head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    seen: dict[int, torch.Tensor] = {}
    for layer in SAES:

        def keep(_module: Any, _inputs: Any, output: Any, layer: int = layer) -> None:
            seen[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        blocks[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([ids]))
    return seen


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.slow
def test_features_are_what_plain_hooks_and_sae_encode_give(
    parts: Path, tmp_path: Path, architecture: str, prepend_bos: bool
) -> None:
    from sae_lens import SAE

    run = prepare(parts, tmp_path, architecture, windows={"prepend_bos": prepend_bos})
    made = make(run, REACTIVATION)
    assert [case.case for case in made] == [case["name"] for case in CASES]
    read = {
        (row["prompt"], row["position"], row["layer"], row["feature_id"]): row["activation"]
        for case in rows(made, run.storage, "prompt_features")
        for row in case
    }
    saes = {layer: SAE.load_from_disk(str(parts / f"sae-{layer}")) for layer in SAES}
    expected = {}
    for prompt in [prompt for case in CASES for prompt in case["prompts"]]:
        ids, special = plain_ids(parts / architecture, prompt, prepend_bos)
        for layer, residuals in plain_residuals(parts / architecture, ids).items():
            features = saes[layer].encode(residuals).detach()
            for position, token in enumerate(ids):
                if token in special:
                    continue
                for feature in features[position].nonzero().flatten().tolist():
                    expected[prompt, position, layer, feature] = float(features[position, feature])
    assert len(expected) > 2_000
    assert {key[2] for key in expected} == set(SAES)
    assert len(set(read) ^ set(expected)) <= len(expected) / 2_000
    assert all(
        read[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5) for key in set(read) & set(expected)
    )


def test_tokens_are_all_but_special_ones_and_say_where_prompts_differ(parts: Path, tmp_path: Path) -> None:
    run = prepare(parts, tmp_path)
    made = make(run, REACTIVATION)
    capitals, odd, three = rows(made, run.storage, "prompt_tokens")
    assert [case.n_tokens for case in made] == [len(capitals), len(odd), len(three)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts / "llama")
    for case, table in zip(CASES, (capitals, odd, three), strict=True):
        expected = []
        for prompt in case["prompts"]:
            ids, special = plain_ids(parts / "llama", prompt)
            expected += [
                (case["name"], case["relation"], prompt, position, token, tokenizer.decode([token]), True)
                for position, token in enumerate(ids)
                if token not in special
            ]
        columns = ("case", "relation", "prompt", "position", "token_id", "token", "in_text")
        assert [tuple(row[name] for name in columns) for row in table] == expected
    # By hand: " Russia" and " Moscow" are one token each, after BOS and three words.
    by_token = [(row["position"], row["token"], row["in_place"], row["looked_at"]) for row in capitals[:6]]
    assert by_token == [
        (1, "the", False, False),
        (2, " river", False, False),
        (3, " of", False, False),
        (4, " Russia", True, False),
        (5, " is", False, True),
        (6, " that", False, True),
    ]
    # BOS is at 0; the end-of-text token inside the prompt keeps its position, and no row has it.
    first = [row for row in odd if row["prompt"] == odd[0]["prompt"]]
    ids, _ = plain_ids(parts / "llama", odd[0]["prompt"])
    at_end = ids.index(tokenizer.eos_token_id)
    assert at_end not in {row["position"] for row in first}
    assert {row["position"] for row in first} == set(range(1, len(ids))) - {at_end}
    assert [row["token"] for row in first if row["looked_at"]] == [" the", "."]
    assert len({row["prompt"] for row in three}) == 3
    features = rows(made, run.storage, "prompt_features")
    for tokens, active in zip((capitals, odd, three), features, strict=True):
        places = {(row["prompt"], row["position"]) for row in tokens}
        assert {(row["prompt"], row["position"]) for row in active} <= places
        order = [(row["layer"], row["position"], row["feature_id"]) for row in active]
        first_prompt = [
            key for key, row in zip(order, active, strict=True) if row["prompt"] == active[0]["prompt"]
        ]
        assert first_prompt == sorted(first_prompt)


def test_a_chat_template_is_seen_and_its_special_tokens_are_in_no_file(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(parts / "llama", tmp_path / "parts" / "llama")
    for layer in SAES:
        shutil.copytree(parts / f"sae-{layer}", tmp_path / "parts" / f"sae-{layer}")
    tokenizer = AutoTokenizer.from_pretrained(parts / "llama")
    tokenizer.chat_template = "{% for m in messages %}<bos>the {{ m['content'] }}<eos>{% endfor %} was"
    tokenizer.save_pretrained(tmp_path / "parts" / "llama")
    run = prepare(tmp_path / "parts", tmp_path, cases=CASES[:1])
    ((table,), (active,)) = (
        rows(make(run, REACTIVATION), run.storage, name) for name in ("prompt_tokens", "prompt_features")
    )
    seen = [
        (row["position"], row["token"], row["in_text"], row["looked_at"])
        for row in table
        if row["prompt"] == CASES[0]["prompts"][0]
    ]
    # BOS is at 0, and the end of the user's message at 8.
    assert seen == [
        (1, "the", False, False),
        (2, " the", True, False),
        (3, " river", True, False),
        (4, " of", True, False),
        (5, " Russia", True, False),
        (6, " is", True, True),
        (7, " that", True, True),
        (9, " was", False, True),
    ]
    assert {row["position"] for row in active} == {position for position, *_ in seen}


@pytest.mark.slow
def test_a_second_call_makes_nothing_and_a_changed_case_alone_is_made_again(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(parts, tmp_path)
    assert (planned(run).done, planned(run).missing) == (0, 4 * len(CASES))
    reports: list[tuple[int, int, str]] = []
    made = make(run, REACTIVATION, lambda *report: reports.append(report))
    total = sum(case.n_tokens for case in made)
    assert reports[0] == (0, total, "tokens, cases")
    assert reports[-1] == (total, total, "tokens, cases")
    assert len(reports) == 4
    assert found(run) == made
    written: list[str] = []
    commit = engine.commit

    def counting(storage: Storage, folder: str, *rest: Any) -> Any:
        written.append(folder)
        return commit(storage, folder, *rest)

    monkeypatch.setattr(engine, "commit", counting)
    assert make(run, REACTIVATION) == made
    assert written == []
    folders = [folder for case in made for name in FILES for folder in folders_of(case, name)]
    assert len(set(folders)) == len(folders) == 4 * len(CASES)
    changes: list[tuple[dict[str, Any], int]] = [
        ({"prompts": ["the river of Russia is that", "the river of Zürich is that"]}, 4),
        # What is active is no matter of names, relations and what is looked at.
        ({"look_at": [" that"]}, 1),
        ({"relation": "another"}, 1),
        ({"name": "another"}, 1),
    ]
    for change, n_new in changes:
        changed = prepare(parts, tmp_path, cases=[CASES[0] | change, *CASES[1:]])
        told = planned(changed)
        assert (told.done, told.missing) == (4 * len(CASES) - n_new, n_new)
        assert told.details == (f"[[case]] {(CASES[0] | change)['name']!r}",)
        written.clear()
        again = make(changed, REACTIVATION)
        assert written == [again[0].folder, *(entry.folder for entry in again[0].layers)][:n_new]
        assert again[1:] == made[1:]
        assert again[0].folder not in folders
        folders.append(again[0].folder)


@pytest.mark.slow
def test_another_dictionary_makes_its_layer_alone_again_and_reads_each_prompt_once(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(parts, tmp_path)
    made, storage = make(first, REACTIVATION), first.storage
    asked: list[list[int]] = []

    def counting(model: Any, ids: Any, layers: Any) -> Any:
        asked.append(list(layers))
        return residuals_of(model, ids, layers)

    monkeypatch.setattr(reactivation, "residuals_of", counting)
    other = prepare(parts, tmp_path, saes={1: "other-sae"})
    told = planned(other)
    assert (told.done, told.missing) == (3 * len(CASES), len(CASES))
    assert told.details == tuple(f"[[case]] {case['name']!r}, layer 1" for case in CASES)
    before = storage.sizes("reactivation")
    reports: list[tuple[int, int, str]] = []
    again = make(other, REACTIVATION, lambda *report: reports.append(report))
    assert asked == [[1]] * sum(len(case["prompts"]) for case in CASES)
    assert reports[-1][1] == sum(case.n_tokens for case in again)
    new = storage.sizes("reactivation").keys() - before.keys()
    assert new == {
        f"{case.layers[1].folder}/{name}" for case in again for name in ("prompt_features.parquet", MANIFEST)
    }
    for one, two in zip(made, again, strict=True):
        assert replace(one, layers=()) == replace(two, layers=())
        assert [old == now for old, now in zip(one.layers, two.layers, strict=True)] == [True, False, True]
    # What was done in part goes on with the rest of it.
    for entry in (again[0].layers[0], again[0].layers[2]):
        kept = storage.read_bytes(f"{entry.folder}/prompt_features.parquet")
        storage.delete(f"{entry.folder}/{MANIFEST}")
        storage.write_bytes(f"{entry.folder}/prompt_features.parquet", kept[:10])
    asked.clear()
    assert planned(other).details == (f"[[case]] {CASES[0]['name']!r}, layers 0, 2",)
    reports.clear()
    assert make(other, REACTIVATION, lambda *report: reports.append(report)) == again
    assert asked == [[0, 2]] * 2
    assert reports == [(done, again[0].n_tokens, "tokens, cases") for done in (0, again[0].n_tokens)]
    assert storage.read_bytes(f"{again[0].layers[2].folder}/prompt_features.parquet") == kept
    # A layer more is read alone, and the others stay.
    fewer = prepare(parts, tmp_path, saes={1: "other-sae", 2: None})
    assert [case.layers for case in make(fewer, REACTIVATION)] == [case.layers[:2] for case in again]
    assert asked == [[0, 2]] * 2


def test_cases_of_the_same_prompts_share_what_is_active(parts: Path, tmp_path: Path) -> None:
    twin = {**CASES[0], "name": "twin", "relation": "another"}
    one, _, _, two = make(prepare(parts, tmp_path, cases=[*CASES, twin]), REACTIVATION)
    assert one.layers == two.layers
    assert one.folder != two.folder


@pytest.mark.slow
def test_a_case_is_the_same_whatever_stands_beside_it(parts: Path, tmp_path: Path) -> None:
    whole = prepare(parts, tmp_path / "whole")
    alone = prepare(parts, tmp_path / "alone", cases=CASES[2:])
    made, one = make(whole, REACTIVATION), make(alone, REACTIVATION)
    assert one == made[2:]
    for name in FILES:
        for folder in folders_of(one[0], name):
            file = f"{folder}/{name}.parquet"
            assert alone.storage.read_bytes(file) == whole.storage.read_bytes(file)
    assert make(prepare(parts, tmp_path / "whole", cases=CASES[::-1]), REACTIVATION) == made[::-1]


@pytest.mark.slow
def test_another_model_or_precision_makes_cases_again(parts: Path, tmp_path: Path) -> None:
    made = make(prepare(parts, tmp_path), REACTIVATION)
    others = [
        prepare(parts, tmp_path, "gemma2"),
        prepare(parts, tmp_path, activations={"mantissa_bits": 23}),
        prepare(parts, tmp_path, windows={"prepend_bos": False}),
    ]
    # The tokens of the first two are there.
    assert [planned(other).missing for other in others] == [9, 9, 12]
    exact = rows(make(others[1], REACTIVATION), others[1].storage, "prompt_features")
    rounded = rows(made, others[1].storage, "prompt_features")
    for one, other in zip(exact, rounded, strict=True):
        assert [row["feature_id"] for row in one] == [row["feature_id"] for row in other]
        assert [r["activation"] for r in one] == pytest.approx([r["activation"] for r in other], rel=2**-16)
        assert [row["activation"] for row in one] != [row["activation"] for row in other]
    # Nothing that another stage reads makes them be made again.
    again = prepare(parts, tmp_path, duckdb={"memory_limit": "1GB"}, activations={"batch_tokens": 77})
    assert found(again) == made


def test_no_case_is_no_work(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(parts, tmp_path)
    cases = "[[trait]]\nname = 't'\nlayer = 1\nfeatures = [1]\nvalues = [1.0]\n"
    (tmp_path / "cases.toml").write_text(
        cases + "[[steer]]\ntraits = ['t']\nprompt = 'the river'\ntarget = ' of'\n"
    )
    monkeypatch.setattr(prompt_features, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert found(run) == []
    assert make(run, REACTIVATION) == []


def test_a_case_that_cannot_be_used_names_itself_and_the_stage(parts: Path, tmp_path: Path) -> None:
    uneven = {"name": "uneven", "relation": "r", "prompts": ["the Moscow is", "the naïve café is"]}
    run = prepare(parts, tmp_path, cases=[CASES[0], uneven])
    for ask in (planned, lambda run: make(run, REACTIVATION)):
        with pytest.raises(ConfigError, match=r"^\[reactivation\] \[\[case\]\] 'uneven'"):
            ask(run)


def test_residuals_are_those_of_the_whole_model(parts: Path, tmp_path: Path) -> None:
    run = prepare(parts, tmp_path)
    model = load_model(run.config.model, run.storage)
    ids, _ = plain_ids(parts / "llama", CASES[0]["prompts"][0])
    read = residuals_of(model, ids, [2, 0, 2])
    expected = plain_residuals(parts / "llama", ids)
    assert set(read) == {0, 2}
    for layer, residuals in read.items():
        assert residuals.dtype == torch.float32
        torch.testing.assert_close(residuals, expected[layer])
    assert residuals_of(model, ids, []) == {}
    assert all(not block._forward_hooks for block in model.blocks)
    with pytest.raises(ModelError, match="no block 3: it has 3"):
        residuals_of(model, ids, [3])
    with pytest.raises(ModelError, match=r"a prompt of 129 tokens .* \(128\)"):
        residuals_of(model, [5] * 129, [0])
    with pytest.raises(ModelError, match="token id 100000 is outside"):
        residuals_of(model, [100_000], [0])
    with pytest.raises(ModelError, match="has no token"):
        residuals_of(model, [], [0])
    with torch.no_grad():
        model.blocks[1].post_attention_layernorm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="layer 1: the residual stream of a prompt is not finite"):
        residuals_of(model, ids, [0, 1])
