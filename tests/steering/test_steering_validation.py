"""Good cases, traits and experiments pass every expectation; each catches what is planted against it, and names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import commit_again, commit_found, make_config, make_dictionary, run_of, token_text

from infra.manifest import Manifest
from infra.storage import Storage
from schemas.config import Config
from schemas.corpus.tables import VOCABULARY
from schemas.errors import DamagedError, ExpectationError, StorageError
from schemas.expectations import SUITES
from schemas.steering.work import CaseFeatures, LayerFolder, Steered, SteeredPrompt, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine import checks
from tasks.engine.checks import expectations_table
from tasks.steering.reactivation import REACTIVATION
from tasks.steering.steering import STEERING

Row = dict[str, Any]
CHECKED = {stage.name: stage for stage in (REACTIVATION, STEERING)}
LAYERS, D_SAE, VOCABULARY_SIZE = (1, 4), 40, 30
CASES: dict[str, list[Row]] = {
    "case": [
        {"name": "two", "relation": "capital", "prompts": ["of A?", "of B?"]},
        {"name": "three", "relation": "opposite", "prompts": ["of A is", "of B is", "of C is"]},
    ],
    "trait": [
        {"name": "found", "positive": ["a", "b", "c"], "negative": ["d", "e", "f"]},
        {"name": "given", "layer": 1, "features": [9, 3], "values": [2.0, -1.5]},
    ],
    "steer": [
        {"traits": ["found"], "prompt": "Where?", "target": " here"},
        {"traits": ["found", "given"], "prompt": "Where?", "target": " here"},
        {"traits": ["found"], "prompt": "Where?", "target": " there", "name": "another target"},
    ],
}
FOUND = {1: [5, 9, 2], 4: [30, 8]}
"""The features of the trait that is found, strongest first, by layer; layer 4 is the most informative."""

STEERED: dict[str, tuple[int, list[int]]] = {
    "found": (4, [30, 8]),
    "found + given": (1, [5, 9, 3]),
    "another target": (4, [30, 8]),
}
"""Layer and features of each experiment: the two strongest of what is found, all of what is given."""


@dataclass
class Run:
    """What both stages hand on; folder and file to its rows."""

    config: Config
    shards: CorpusShards
    dictionaries: list[Dictionary]
    files: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    cases: list[CaseFeatures] = field(default_factory=list)
    traits: list[TraitFeatures] = field(default_factory=list)
    steered: list[SteeredPrompt] = field(default_factory=list)

    def add_layers(self, folder: str, files: dict[str, list[Row]]) -> tuple[LayerFolder, ...]:
        """A folder for each layer that the files have rows of."""
        layers = sorted({row["layer"] for rows in files.values() for row in rows})
        for layer in layers:
            own = {name: [row for row in rows if row["layer"] == layer] for name, rows in files.items()}
            self.files[f"{folder}-{layer}"] = own
        return tuple(LayerFolder(layer=layer, folder=f"{folder}-{layer}") for layer in layers)

    def write(self, storage: Storage) -> None:
        for folder, files in self.files.items():
            for name, rows in files.items():
                table = pa.Table.from_pylist(rows, schema=SHARD_FILES[name])
                storage.write_parquet(f"{folder}/{name}.parquet", table)
            commit_found(storage, folder, Manifest(stage="test", inputs={}))

    def check(self, stage: str, storage: Storage) -> None:
        given = {
            TOKENIZE: self.shards,
            DICTIONARIES: self.dictionaries,
            REACTIVATION: self.cases,
            STEERING: Steered(traits=tuple(self.traits), experiments=tuple(self.steered)),
        }
        checks.check(run_of(self.config, storage, given), CHECKED[stage])


def good_run(storage: Storage, cases: dict[str, list[Row]] | None = None, **steering: Any) -> Run:
    cases = CASES if cases is None else cases
    path = Path(storage.path) / "cases.toml"
    write_cases(path, cases)
    section: Row = {"features": 2, "strengths": [1.0, 2.5], "random_controls": 2, **steering}
    config = make_config(storage, LAYERS, steering={"cases": str(path), **section})
    words = [{"token_id": token, "token": token_text(token)} for token in range(VOCABULARY_SIZE)]
    storage.write_parquet("vocabulary.parquet", pa.Table.from_pylist(words, schema=VOCABULARY))
    run = Run(
        config=config,
        shards=CorpusShards(shards=(), tokenizer_key="t", vocabulary="vocabulary.parquet"),
        dictionaries=[make_dictionary(layer, D_SAE) for layer in LAYERS],
    )
    for case in cases.get("case", []):
        files = case_rows(case)
        folder = f"reactivation/{case['name']}"
        run.files[folder] = {"prompt_tokens": files["prompt_tokens"]}
        layers = run.add_layers(folder, {"prompt_features": files["prompt_features"]})
        tokens = len(files["prompt_tokens"])
        run.cases.append(CaseFeatures(case=case["name"], folder=folder, layers=layers, n_tokens=tokens))
    for trait in cases.get("trait", []):
        layers = run.add_layers(f"traits/{trait['name']}", trait_rows(trait))
        run.traits.append(TraitFeatures(trait=trait["name"], layers=layers))
    for steer in cases.get("steer", []):
        title = steer.get("name") or " + ".join(steer["traits"])
        run.files[f"steering/{title}"] = {"steering": experiment_rows(steer, title, config)}
        run.steered.append(SteeredPrompt(case=title, prompt=steer["prompt"], folder=f"steering/{title}"))
    return run


def write_cases(path: Path, cases: dict[str, list[Row]]) -> None:
    lines = [
        line
        for kind, entries in cases.items()
        for entry in entries
        for line in (f"[[{kind}]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items()))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def case_rows(case: Row) -> dict[str, list[Row]]:
    """Prompts of BOS, which is in no table, and four tokens that differ in the second."""
    tokens = [
        {
            "case": case["name"],
            "relation": case["relation"],
            "prompt": prompt,
            "position": position,
            "token_id": token,
            "token": token_text(token),
            "in_text": True,
            "in_place": position == 2,
            "looked_at": position > 2,
        }
        for number, prompt in enumerate(case["prompts"])
        for position, token in enumerate([11, 20 + number, 3, 4], 1)
    ]
    features = [
        {
            "prompt": row["prompt"],
            "position": row["position"],
            "layer": layer,
            "feature_id": (row["token_id"] + step) % D_SAE,
            "activation": 0.5 + step,
        }
        for row in tokens
        for layer in LAYERS
        for step in range(3)
    ]
    return {"prompt_tokens": tokens, "prompt_features": features}


def trait_rows(trait: Row) -> dict[str, list[Row]]:
    name = trait["name"]
    if "features" in trait:
        layers = [{"trait": name, "layer": trait["layer"], "n_pairs": 0}]
        given = zip(trait["features"], trait["values"], strict=True)
        features = [
            {"trait": name, "layer": trait["layer"], "place": place, "feature_id": feature}
            | {"coefficient": value, "clamp_value": value, "contribution": abs(value)}
            for place, (feature, value) in enumerate(given, 1)
        ]
        return {"trait_layers": layers, "trait_features": features}
    return {
        "trait_layers": [
            {"trait": name, "layer": layer, "separation": separation, "accuracy": 0.75, "n_pairs": 3}
            | {"explained_variance": 0.5}
            for layer, separation in ((1, 0.5), (4, 2.0))
        ],
        "trait_features": [
            {"trait": name, "layer": layer, "place": place, "feature_id": feature}
            | {"coefficient": 4 / place, "contribution": 8 / place, "clamp_value": 6 / place}
            | {"mean_positive": 5 / place, "mean_negative": 1 / place}
            for layer, features in FOUND.items()
            for place, feature in enumerate(features, 1)
        ],
    }


def experiment_rows(steer: Row, title: str, config: Config) -> list[Row]:
    """All conditions; the third experiment's prompt has no content token."""
    assert config.steering is not None
    layer, features = STEERED[title]
    variants = [("last function token", "trait", 0, 7), ("all positions", "trait", 0, None)]
    variants += [("content token", "trait", 0, 5)] * (title != "another target")
    variants += [("last function token", "random", draw, 7) for draw in (1, 2)]
    variants += [("all positions", "random", draw, None) for draw in (1, 2)]
    return [
        {
            "case": title,
            "prompt": steer["prompt"],
            "target": steer["target"],
            "traits": " + ".join(steer["traits"]),
            "layer": layer,
            "feature_ids": [10 + 5 * draw + n for n in range(len(features))] if draw else features,
            "mode": mode,
            "place": place,
            "position": position,
            "control": control,
            "draw": draw,
            "strength": strength,
            "baseline_text": "before",
            "steered_text": f"after {strength}" if strength else "before",
            "kl": strength / 8,
            "target_logprob": -4.0,
            "target_logprob_delta": strength,
            "baseline_perplexity": 2.0,
            "perplexity": 2.0 + strength,
            "relative_norm": strength * (0.25 if place == "all positions" else 0.5),
        }
        for mode in ("add", "clamp")
        for place, control, draw, position in variants
        for strength in config.steering.strengths
    ]


# ---- what is done to the run, and text of a row that the message must show

Plant = tuple[Callable[[Run], None], str]


def cell(folder: str, name: str, text: str, row: int = 0, **values: Any) -> Plant:
    return lambda run: run.files[folder][name][row].update(values), text


def repeated(folder: str, name: str, text: str) -> Plant:
    return lambda run: run.files[folder][name].append(dict(run.files[folder][name][0])), text


def dropped(folder: str, name: str, text: str, row: int = 0) -> Plant:
    def plant(run: Run) -> None:
        del run.files[folder][name][row]

    return plant, text


def fewer(name: str, text: str) -> Plant:
    def plant(run: Run) -> None:
        getattr(run, name).pop()

    return plant, text


def without_layer(name: str, place: int, text: str) -> Plant:
    def plant(run: Run) -> None:
        found = getattr(run, name)
        found[place] = replace(found[place], layers=found[place].layers[1:])

    return plant, text


def where(text: str, changed: Row, **wanted: Any) -> Plant:
    """Change the rows of the first experiment that have the values `wanted`."""

    def plant(run: Run) -> None:
        rows = [
            row
            for row in run.files["steering/found"]["steering"]
            if all(row[name] == value for name, value in wanted.items())
        ]
        assert rows
        for row in rows:
            row.update(changed)

    return plant, text


def swapped(run: Run) -> None:
    rows = run.files[AT_1]["trait_features"]
    for name in ("contribution", "coefficient", "mean_positive", "mean_negative"):
        rows[0][name], rows[1][name] = rows[1][name], rows[0][name]


TWO, TWO_AT_1, EXPERIMENT = "reactivation/two", "reactivation/two-1", "steering/found"
AT_1, AT_4, GIVEN = "traits/found-1", "traits/found-4", "traits/given-1"
TOKENS, FEATURES, RANKED = "prompt_tokens", "prompt_features", "trait_features"
AT_ONE = {"mode": "add", "place": "last function token", "control": "trait", "strength": 1.0}
AT_ZERO = AT_ONE | {"strength": 0.0}
RANDOM = {"control": "random", "draw": 2}

PLANTS: dict[str, dict[str, Plant]] = {
    "reactivation": {
        "every case has its folder": fewer("cases", "case: three, is_wanted: True, folders: 0"),
        "every layer of a case has its folder": without_layer(
            "cases", 1, "case: three, layer: 1, is_wanted: True, folders: 0"
        ),
        "every prompt is read": (
            lambda run: [row.update(relation="other") for row in run.files[TWO][TOKENS][:4]].clear(),
            "relation: capital, prompt: of A?, is_wanted: True, is_there: False",
        ),
        "tokens are all there": dropped(TWO, TOKENS, "case: two, n_tokens: 8, found_tokens: 7", -1),
        "positions ascend": cell(
            TWO, TOKENS, "position: 2, token: <3'\n>, position_before: 2", 2, position=2
        ),
        "prompt tokens are the tokenizer's": cell(TWO, TOKENS, "token_id: 77", 0, token_id=77),
        "prompts differ in one place alone": cell(TWO, TOKENS, "position: 3, tokens: ", 2, token_id=9),
        "what is looked at comes later": cell(TWO, TOKENS, "last_in_place: 2", 0, looked_at=True),
        "prompt feature keys are unique": repeated(TWO_AT_1, FEATURES, "feature_id: 11, rows: 2"),
        "prompt activations are positive": cell(TWO_AT_1, FEATURES, "activation: 0.0", 0, activation=0.0),
        "prompt features are in the dictionaries": cell(
            TWO_AT_1, FEATURES, "feature_id: 40", 0, feature_id=40
        ),
        "features are of tokens": cell(TWO_AT_1, FEATURES, "prompt: of A?, position: 0", 0, position=0),
    },
    "steering": {
        "every layer of a trait has its folder": without_layer(
            "traits", 0, "trait: found, layer: 1, is_wanted: True, folders: 0"
        ),
        "a folder judges its layer": dropped(AT_1, "trait_layers", "layer: 1, counted_n: None"),
        "layers are possible": cell(AT_1, "trait_layers", "accuracy: 1.5", 0, accuracy=1.5),
        "pairs are the trait's": cell(AT_1, "trait_layers", "n_pairs: 2, wanted_pairs: 3", 0, n_pairs=2),
        "places run from 1": cell(AT_1, RANKED, "place: 4, expected_place: 3", 2, place=4),
        "the strongest come first": (swapped, "contribution: 8.0, n_pairs: 3, contribution_before: 4.0"),
        "trait features are in the dictionaries": cell(AT_1, RANKED, "feature_id: 40", 2, feature_id=40),
        "coefficients are possible": cell(AT_1, RANKED, "coefficient: 4.5", 0, coefficient=4.5),
        "given features are those given": cell(GIVEN, RANKED, "counted_clamp_value: 1.0", 1, clamp_value=1.0),
        "every experiment has its folder": fewer("steered", "case: another target"),
        "rows are of their experiment": cell(
            EXPERIMENT, "steering", "target:  elsewhere", target=" elsewhere"
        ),
        "every condition is tried once": dropped(
            EXPERIMENT, "steering", "strength: 0.0, is_wanted: True, rows: 0"
        ),
        "positions are of their places": where("position: 5, last_position: 3", {"position": 3}, **AT_ONE),
        "experiments are steered at the layer chosen": where(
            "layer: 1, configured_layer: None, given_layer: None, separation: 0.5", {"layer": 1}
        ),
        "steered features are the traits'": where(
            "feature_ids: [30, 2], expected: [8, 30]", {"feature_ids": [30, 2]}, **AT_ONE
        ),
        "random features are others": where("feature_ids: [8, 20]", {"feature_ids": [8, 20]}, **RANDOM),
        "strength 0 changes nothing": where("kl: 1e-12", {"kl": 1e-12}, **AT_ZERO),
        "effects are possible": where("perplexity: 0.5", {"perplexity": 0.5}, **AT_ONE),
        "random controls move as far": where(
            "relative_norm: 0.51, trait_norm: 0.5",
            {"relative_norm": 0.51},
            **(AT_ONE | RANDOM),
        ),
    },
}

MORE: list[tuple[str, str, Plant]] = [
    ("reactivation", "positions ascend", cell(TWO, TOKENS, "position: -1", 0, position=-1)),
    (
        "reactivation",
        "prompt activations are positive",
        cell(TWO_AT_1, FEATURES, "nan", 0, activation=float("nan")),
    ),
    (
        "reactivation",
        "prompt features are in the dictionaries",
        cell(TWO_AT_1, FEATURES, "layer: 2", 0, layer=2),
    ),
    ("reactivation", "prompts differ in one place alone", cell(TWO, TOKENS, "prompts: 1", 1, in_place=False)),
    ("reactivation", "features are of tokens", cell(TWO_AT_1, FEATURES, "prompt: of Z?", 0, prompt="of Z?")),
    (
        "steering",
        "every layer of a trait has its folder",
        fewer("traits", "trait: given, layer: 1, is_wanted: True, folders: 0"),
    ),
    ("steering", "a folder judges its layer", repeated(AT_4, "trait_layers", "layer: 4, counted_n: 2")),
    (
        "steering",
        "a folder judges its layer",
        cell(AT_4, "trait_layers", "layer: 4, counted_n: None", layer=1),
    ),
    (
        "steering",
        "experiments are steered at the layer chosen",
        (
            lambda run: run.files[AT_4]["trait_features"].clear(),
            "layer: 4, configured_layer: None, given_layer: None, separation: 2.0, largest_separation: 0.5",
        ),
    ),
    ("steering", "places run from 1", cell(AT_1, RANKED, "feature_id: 5", 1, feature_id=5)),
    ("steering", "coefficients are possible", cell(AT_1, RANKED, "clamp_value: 4.0", 0, clamp_value=4.0)),
    (
        "steering",
        "every condition is tried once",
        repeated(EXPERIMENT, "steering", "is_wanted: True, rows: 2"),
    ),
    (
        "steering",
        "every condition is tried once",
        where("strength: 9.0, is_wanted: False", {"strength": 9.0}, **AT_ONE),
    ),
    (
        "steering",
        "positions are of their places",
        where("position: 8", {"position": 8}, place="content token"),
    ),
    (
        "steering",
        "positions are of their places",
        where("position: 1", {"position": 1}, place="all positions"),
    ),
    (
        "steering",
        "random features are others",
        where("feature_ids: [20, 22]", {"feature_ids": [20, 22]}, **AT_ONE | RANDOM),
    ),
    ("steering", "random features are others", where("feature_ids: [20]", {"feature_ids": [20]}, **RANDOM)),
    (
        "steering",
        "random features are others",
        where("feature_ids: [20, 40]", {"feature_ids": [20, 40]}, **RANDOM),
    ),
    (
        "steering",
        "strength 0 changes nothing",
        where("target_logprob_delta: -1e-300", {"target_logprob_delta": -1e-300}, **AT_ZERO),
    ),
    (
        "steering",
        "strength 0 changes nothing",
        where("steered_text: other", {"steered_text": "other"}, **AT_ZERO),
    ),
    ("steering", "effects are possible", where("kl: -0.001", {"kl": -0.001}, **AT_ONE)),
    ("steering", "effects are possible", where("kl: nan", {"kl": float("nan")}, **AT_ONE)),
    (
        "steering",
        "effects are possible",
        where("target_logprob_delta: 4.5", {"target_logprob_delta": 4.5}, **AT_ONE),
    ),
]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def test_every_expectation_has_its_plant() -> None:
    assert {stage: list(plants) for stage, plants in PLANTS.items()} == {
        stage: [entry.name for entry in SUITES[stage]] for stage in CHECKED
    }


@pytest.mark.parametrize(
    ("stage", "name", "planted"),
    [(stage, name, plant) for stage in CHECKED for name, plant in PLANTS[stage].items()] + MORE,
)
def test_planted_rows_are_caught_and_named(
    stage: str, name: str, planted: Plant, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, row = planted
    # Asked alone, which is quick; of good data all are asked.
    entry = next(entry for entry in SUITES[stage] if entry.name == name)
    monkeypatch.setitem(SUITES, stage, (entry,))
    run = good_run(storage)
    plant(run)
    run.write(storage)
    with pytest.raises(ExpectationError) as raised:
        run.check(stage, storage)
    told = str(raised.value)
    assert told.startswith(f"[{stage}] the expectation {name!r} on the table {entry.table} ")
    assert row in told


@pytest.mark.slow
@pytest.mark.usefixtures("great_expectations")
def test_good_data_passes_and_is_shown(storage: Storage) -> None:
    run = good_run(storage)
    run.write(storage)
    for stage in CHECKED:
        run.check(stage, storage)
    rows = expectations_table(storage).to_pylist()
    assert [(row["stage"], row["expectation"]) for row in rows] == [
        (stage, entry.name) for stage in CHECKED for entry in SUITES[stage]
    ]
    assert {(row["success"], row["observed"]) for row in rows} == {(True, 0)}
    index = storage.read_bytes("data_docs/index.html").decode()
    assert all(f"validations/{stage}/" in index for stage in CHECKED)


@pytest.mark.slow
def test_what_was_passed_is_not_asked_again_until_something_changes(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = good_run(storage)
    run.write(storage)
    for stage in CHECKED:
        run.check(stage, storage)
    with monkeypatch.context() as patch:
        patch.delattr(checks, "judge")
        for stage in CHECKED:
            run.check(stage, storage)
    run.dictionaries = [replace(entry, d_sae=10) for entry in run.dictionaries]
    for stage in CHECKED:
        with pytest.raises(ExpectationError, match="features are in the dictionaries"):
            run.check(stage, storage)


@pytest.mark.slow
def test_conditions_are_the_configurations(storage: Storage) -> None:
    run = good_run(storage)
    run.write(storage)
    others = [
        ("strengths", [0.0, 1.0], "every condition is tried once"),
        ("places", ["all positions"], "every condition is tried once"),
        ("modes", ["add"], "every condition is tried once"),
        ("random_controls", 3, "every condition is tried once"),
        ("layer", 1, "steered at the layer chosen"),
    ]
    config = run.config
    for name, value, unmet in others:
        assert config.steering is not None
        section = config.steering.model_copy(update={name: value})
        run.config = config.model_copy(update={"steering": section})
        with pytest.raises(ExpectationError, match=unmet):
            run.check("steering", storage)


@pytest.mark.parametrize("kinds", [("case",), ("trait", "steer")])
def test_a_file_of_some_kinds_alone_is_good(storage: Storage, kinds: tuple[str, ...]) -> None:
    run = good_run(storage, {kind: CASES[kind] for kind in kinds})
    run.write(storage)
    for stage in CHECKED:
        run.check(stage, storage)


def test_other_cases_than_those_of_the_file_are_named(storage: Storage) -> None:
    run = good_run(storage)
    run.write(storage)
    assert run.config.steering is not None
    write_cases(Path(run.config.steering.cases), {kind: CASES[kind][:1] for kind in CASES})
    with pytest.raises(ExpectationError, match="case: three, is_wanted: False, folders: 1"):
        run.check("reactivation", storage)
    with pytest.raises(ExpectationError, match="trait: given, layer: 1, is_wanted: False, folders: 1"):
        run.check("steering", storage)


def test_folders_that_are_not_committed_are_named(storage: Storage) -> None:
    run = good_run(storage)
    run.write(storage)
    for folder in (TWO, TWO_AT_1, AT_1, EXPERIMENT):
        storage.delete(f"{folder}/manifest.json")
    with pytest.raises(ExpectationError, match=r"case: two, is_wanted: .*committed: False") as raised:
        run.check("reactivation", storage)
    assert "case: two, layer: 1, is_wanted: True, folders: 1, committed: False" in str(raised.value)
    with pytest.raises(ExpectationError, match=r"trait: found, layer: 1, .*committed: False") as raised:
        run.check("steering", storage)
    assert "case: found, prompt: Where?, target:  here, traits: found, is_wanted: True" in str(raised.value)


def test_broken_files_are_named(storage: Storage) -> None:
    run = good_run(storage)
    run.write(storage)
    name = f"{EXPERIMENT}/steering.parquet"
    whole = storage.read_parquet(name)
    storage.write_parquet(name, whole.drop_columns(["kl"]))
    commit_again(storage, EXPERIMENT)
    with pytest.raises(ExpectationError, match=f"{EXPERIMENT}: steering.parquet has not the columns"):
        run.check("steering", storage)
    storage.write_bytes(name, b"PAR1 nothing PAR1")
    with pytest.raises(DamagedError, match=f"{EXPERIMENT}/steering.parquet is damaged"):
        run.check("steering", storage)
    commit_again(storage, EXPERIMENT)
    with pytest.raises(StorageError, match=f"{EXPERIMENT}: steering.parquet cannot be read"):
        run.check("steering", storage)
    storage.delete(f"{TWO}/prompt_tokens.parquet")
    with pytest.raises(StorageError, match=f"{TWO}: prompt_tokens.parquet cannot be read"):
        run.check("reactivation", storage)
