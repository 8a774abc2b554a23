"""The tables of reactivation and steering against slow twins in plain Python, and the expectations on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import steering_catalogue
from builders import make_config, run_of
from steering_catalogue import LAYERS, RESAMPLES, Made, SteeringRun, steering_run

from infra.catalog import Catalog, ShardFile, read_catalog, write_catalog
from infra.duck import connect, open_duckdb
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ExpectationError
from schemas.steering.table_expectations import STEERING_TABLES
from schemas.steering.work import Steered
from schemas.tables import TABLES
from tasks.corpus.tables import CorpusTables, corpus_group
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.catalog_file import write_catalog_file
from tasks.engine.checks import check_tables
from tasks.engine.offenders import find_in_views
from tasks.engine.tables import candidate, merged
from tasks.steering.intervals import EFFECTS, SCORES
from tasks.steering.reactivation import REACTIVATION
from tasks.steering.steering import STEERING
from tasks.steering.tables import OF_CASES, OF_EXPERIMENTS, OF_TRAITS, STEERING_GROUP

Row = dict[str, Any]

MADE = (*OF_CASES, *OF_TRAITS, *OF_EXPERIMENTS)
RANDOM = Made(
    cases=3,
    relations=("a", "b", "c"),
    prompts=3,
    function=0.6,
    unrelated=0.3,
    experiments=5,
    noise=1.0,
    seed=4,
)


@dataclass(frozen=True)
class Tables:
    """A run and its tables, only to be read."""

    storage: Storage
    run: SteeringRun
    catalog: Catalog
    rows: dict[str, list[Row]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    storage = Storage(str(tmp_path_factory.mktemp("made")))
    run = steering_run(storage, RANDOM)
    _make_uneven(run)
    catalog = steering_catalogue.published(run.write(storage))
    rows = {table: storage.read_parquet(catalog.tables[table]).to_pylist() for table in MADE}
    return Tables(storage, run, catalog, rows)


def _make_uneven(run: SteeringRun) -> None:
    """A case of two prompts, one that looks at one function token only, one without own features at a layer.

    And one with a token that no other case has.
    """
    two, looking, empty, alone = sorted(run.tokens)[:4]
    for row in run.tokens[alone]:
        if row["position"] == 5:
            row["token_id"], row["token"] = 21, " alone"
    gone = sorted({row["prompt"] for row in run.tokens[two]})[-1]
    for rows in (run.tokens, run.features):
        rows[two] = [row for row in rows[two] if row["prompt"] != gone]
    for row in run.tokens[looking]:
        row["looked_at"] = row["position"] == 9
    run.features[empty] = [
        row for row in run.features[empty] if row["layer"] != LAYERS[0] or row["position"] not in (3, 4)
    ]


def function_ids(storage: Storage, catalog: Catalog) -> set[int]:
    tokens = storage.read_parquet(catalog.tables["tokens"]).to_pylist()
    found = {row["token_id"] for row in tokens if row["is_function"]}
    assert found
    assert len(found) < len(tokens)
    return found


def twin_positions(run: SteeringRun, function: set[int]) -> list[Row]:
    """Own features and where they are active again, counted one by one."""
    active: dict[Any, set[int]] = {}
    tokens = {
        (case, row["prompt"], row["position"]): row for case, rows in run.tokens.items() for row in rows
    }
    for case, rows in run.features.items():
        for row in rows:
            active.setdefault((case, row["prompt"], row["position"], row["layer"]), set()).add(
                row["feature_id"]
            )
    counted = []
    for (case, prompt, position), token in tokens.items():
        mine = [row for row in run.tokens[case] if row["in_place"]]
        others = sorted({row["prompt"] for row in run.tokens[case]} - {prompt})
        if position <= max(row["position"] for row in mine):
            continue
        is_function = token["token_id"] in function
        if is_function and not token["looked_at"]:
            continue
        for layer in LAYERS:

            def at_place(
                whose: str, case: str = case, layer: int = layer, mine: list[Row] = mine
            ) -> set[int]:
                places = {row["position"] for row in mine}
                return {f for place in places for f in active.get((case, whose, place, layer), set())}

            own = at_place(prompt) - {f for other in others for f in at_place(other)}
            unrelated = [
                key
                for key, other in tokens.items()
                if other["token_id"] == token["token_id"]
                and other["relation"] != token["relation"]
                and key[2] > max(row["position"] for row in run.tokens[key[0]] if row["in_place"])
            ]
            counted.append(
                {
                    "case": case,
                    "relation": token["relation"],
                    "prompt": prompt,
                    "layer": layer,
                    "position": position,
                    "token_id": token["token_id"],
                    "token": token["token"],
                    "is_function": is_function,
                    "in_text": token["in_text"],
                    "n_own": len(own),
                    "own": len(own & active.get((case, prompt, position, layer), set())),
                    "n_counterfactual": len(own) * len(others),
                    "counterfactual": sum(
                        len(own & active.get((case, other, position, layer), set())) for other in others
                    ),
                    "n_unrelated": len(own) * len(unrelated),
                    "unrelated": sum(len(own & active.get((*key, layer), set())) for key in unrelated),
                }
            )
    return sorted(counted, key=lambda row: (row["case"], row["prompt"], row["layer"], row["position"]))


def twin_scores(rows: list[Row]) -> dict[str, float]:
    """Each position weighs as many as it has own features, in all shares alike."""
    matched = [row for row in rows if row["n_unrelated"]]
    n, n_matched = sum(row["n_own"] for row in rows), sum(row["n_own"] for row in matched)
    own, among = sum(row["own"] for row in rows), sum(row["own"] for row in matched)
    other = sum(row["n_own"] * row["counterfactual"] / row["n_counterfactual"] for row in rows)
    unrelated = sum(row["n_own"] * row["unrelated"] / row["n_unrelated"] for row in matched)
    return {
        "own": own / n,
        "counterfactual": other / n,
        "unrelated": unrelated / n_matched if n_matched else math.nan,
        "excess": (own - other) / n,
        "excess_unrelated": (among - unrelated) / n_matched if n_matched else math.nan,
    }


def test_prompt_tokens_have_the_corpus_kinds(made: Tables) -> None:
    function = function_ids(made.storage, made.catalog)
    expected = sorted(
        (
            {**row, "is_function": row["token_id"] in function}
            for rows in made.run.tokens.values()
            for row in rows
        ),
        key=lambda row: (row["case"], row["prompt"], row["position"]),
    )
    assert made.rows["prompt_tokens"] == [
        {name: row[name] for name in TABLES["prompt_tokens"].names} for row in expected
    ]
    kinds = {row["token_id"]: row["is_function"] for row in expected}
    assert kinds[steering_catalogue.FUNCTION]
    assert not kinds[steering_catalogue.UNKNOWN]


def test_positions_are_those_of_the_slow_twin(made: Tables) -> None:
    expected = twin_positions(made.run, function_ids(made.storage, made.catalog))
    assert made.rows["reactivation_positions"] == expected
    assert {row["n_own"] for row in expected} > {0, 2}
    assert any(row["n_unrelated"] == 0 < row["n_own"] for row in expected)
    assert 0 < sum(row["unrelated"] for row in expected) < sum(row["n_unrelated"] for row in expected)
    assert sum(row["own"] for row in expected) > 0


def test_reactivations_say_what_is_whose_own(made: Tables) -> None:
    rows = made.rows["reactivations"]
    assert len(rows) == sum(map(len, made.run.features.values()))
    positions = {
        (row["case"], row["prompt"], row["layer"]): row["n_own"]
        for row in made.rows["reactivation_positions"]
    }
    own: dict[Any, set[int]] = {}
    for row in rows:
        if row["is_own"]:
            own.setdefault((row["case"], row["prompt"], row["layer"]), set()).add(row["feature_id"])
    assert {key: len(own.get(key, ())) for key in positions} == positions
    values = {
        (case, row["prompt"], row["layer"], row["position"], row["feature_id"]): row["activation"]
        for case, found in made.run.features.items()
        for row in found
    }
    assert values == {
        (row["case"], row["prompt"], row["layer"], row["position"], row["feature_id"]): row["activation"]
        for row in rows
    }


def test_scores_and_intervals_are_those_of_the_slow_twin(made: Tables) -> None:
    positions = [row for row in made.rows["reactivation_positions"] if row["n_own"]]
    groups: dict[Any, list[Row]] = {}
    for row in positions:
        kind = "function" if row["is_function"] else "content"
        for token in (None, row["token"]):
            groups.setdefault((row["layer"], kind, token), []).append(row)
    found = {(row["layer"], row["kind"], row["token"]): row for row in made.rows["reactivation_scores"]}
    assert found.keys() == groups.keys()
    cases = sorted({row["case"] for row in positions})
    rng = np.random.default_rng(0)
    draws = [[cases[index] for index in rng.integers(0, len(cases), len(cases))] for _ in range(RESAMPLES)]
    for key, rows in groups.items():
        scores, row = twin_scores(rows), found[key]
        assert row["n_cases"] == len({each["case"] for each in rows})
        assert row["n_positions"] == len(rows)
        for score in SCORES:
            value = math.nan if row[score] is None else row[score]
            assert value == pytest.approx(scores[score], abs=1e-8, nan_ok=True)
        if key[2] is None:
            by_case = {case: [each for each in rows if each["case"] == case] for case in cases}
            drawn = [twin_scores([each for case in draw for each in by_case[case]]) for draw in draws]
            for score in SCORES:
                ends = np.percentile([each[score] for each in drawn], [2.5, 97.5])
                assert [row[f"{score}_low"], row[f"{score}_high"]] == pytest.approx(ends, abs=1e-8)
                assert row[f"{score}_low"] < row[score] < row[f"{score}_high"]


def test_effects_are_those_of_the_slow_twin(made: Tables) -> None:
    def measured(rows: list[Row], effect: str) -> float | None:
        values = [
            math.log(row["perplexity"]) - math.log(row["baseline_perplexity"])
            if effect == "log_perplexity_delta"
            else row[effect]
            for row in rows
            if effect != "log_perplexity_delta" or None not in (row["perplexity"], row["baseline_perplexity"])
        ]
        return fmean(values) if values else None

    settings: dict[Any, dict[Any, list[Row]]] = {}
    for key, rows in made.run.steering.items():
        for row in rows:
            setting = (row["mode"], row["place"], row["control"], row["strength"])
            settings.setdefault(setting, {}).setdefault(key, []).append(row)
    experiments = sorted(made.run.steering)
    rng = np.random.default_rng(0)
    draws = [
        [experiments[index] for index in rng.integers(0, len(experiments), len(experiments))]
        for _ in range(RESAMPLES)
    ]
    found = {
        (row["mode"], row["place"], row["control"], row["strength"]): row
        for row in made.rows["steering_effects"]
    }
    assert found.keys() == settings.keys()
    assert {row["n"] for row in found.values()} == {4, 5}
    for setting, by_experiment in settings.items():
        row = found[setting]
        assert row["n"] == len(by_experiment)
        for effect in EFFECTS:
            values: dict[Any, float] = {}
            for key, rows in by_experiment.items():
                value = measured(rows, "target_logprob_delta" if effect == "advantage" else effect)
                if effect == "advantage":
                    random = settings.get((*setting[:2], "random", setting[3]), {}).get(key)
                    if setting[2] == "random" or random is None:
                        continue
                    against = measured(random, "target_logprob_delta")
                    assert value is not None
                    assert against is not None
                    value -= against
                if value is not None:
                    values[key] = value
            if not values:
                assert (row[effect], row[f"{effect}_low"]) == (None, None)
                assert effect == "advantage"
                continue
            assert row[effect] == pytest.approx(fmean(values.values()), abs=1e-9)
            drawn = [[values[key] for key in draw if key in values] for draw in draws]
            ends = np.percentile([fmean(each) for each in drawn if each], [2.5, 97.5])
            assert [row[f"{effect}_low"], row[f"{effect}_high"]] == pytest.approx(ends, abs=1e-9)
        texts = [
            fmean(row["steered_text"] != row["baseline_text"] for row in rows)
            for rows in by_experiment.values()
        ]
        assert row["changed"] == pytest.approx(fmean(texts))
    for (_, place, control, strength), row in found.items():
        assert (row["advantage"] is None) == (control == "random" or place == "content token")
        if strength == 0:
            assert [row[effect] for effect in ("target_logprob_delta", "kl", "log_perplexity_delta")] == [
                0
            ] * 3


def test_the_folders_rows_are_gathered_and_sorted(made: Tables) -> None:
    for table, written in (
        ("trait_layers", made.run.trait_layers),
        ("trait_features", made.run.trait_features),
        ("steering", made.run.steering),
    ):
        assert sorted(map(repr, made.rows[table])) == sorted(
            repr({name: row[name] for name in TABLES[table].names})
            for rows in written.values()  # type: ignore[attr-defined]
            for row in rows
        )
    keys = [(row["trait"], row["layer"], row["place"]) for row in made.rows["trait_features"]]
    assert keys == sorted(keys)


def test_schemas_and_views_are_the_contracts(made: Tables, tmp_path: Path) -> None:
    for table in MADE:
        schema = made.storage.read_parquet(made.catalog.tables[table]).schema
        assert [(f.name, f.type) for f in schema] == [(f.name, f.type) for f in TABLES[table]], table
    with closing(connect(made.storage)) as connection:
        n = connection.execute('SELECT count(DISTINCT "case") FROM reactivations').fetchone()[0]
        assert n == len(made.run.tokens)
    write_catalog_file(made.storage, str(tmp_path / "all.duckdb"), made.run.config.duckdb)


@pytest.mark.slow
def test_neither_order_nor_threads_change_a_byte(made: Tables, tmp_path: Path) -> None:
    for seed, threads in ((1, 1), (2, 4)):
        storage = Storage(str(tmp_path / str(seed)))
        run = steering_run(storage, RANDOM)
        _make_uneven(run)
        threaded = run.config.duckdb.model_copy(update={"threads": threads})
        run.config = run.config.model_copy(update={"duckdb": threaded})
        catalog = steering_catalogue.published(run.write(storage, seed))
        for table in MADE:
            assert storage.read_parquet(catalog.tables[table]).equals(
                made.storage.read_parquet(made.catalog.tables[table])
            ), table
        assert catalog.lineage == made.catalog.lineage


@pytest.mark.slow
def test_one_case_and_one_experiment_have_no_intervals(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    _, catalog = steering_catalogue.built(storage, Made(cases=1, relations=("one",), experiments=1))
    scores = storage.read_parquet(catalog.tables["reactivation_scores"]).to_pylist()
    assert {row["n_cases"] for row in scores} == {1}
    assert all(row["own"] is not None and row["unrelated"] is None for row in scores)
    assert {row[f"{score}{end}"] for row in scores for score in SCORES for end in ("_low", "_high")} == {None}
    effects = storage.read_parquet(catalog.tables["steering_effects"]).to_pylist()
    assert {row[f"{effect}_low"] for row in effects for effect in EFFECTS} == {None}
    assert all(row["n"] == 1 and row["kl"] is not None for row in effects)


@pytest.mark.slow
def test_only_what_a_run_has_is_made(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    made = steering_run(storage, Made(cases=2, experiments=2))
    whole = made.write(storage)
    cases, steered = whole.result(REACTIVATION), whole.result(STEERING)
    keys = set()
    for some, more, tables in (
        (cases, steered, MADE),
        (cases, Steered(), OF_CASES),
        ([], steered, (*OF_TRAITS, *OF_EXPERIMENTS)),
        ([], Steered(), ()),
    ):
        run = run_of(made.config, storage, {TOKENIZE: made.shards, REACTIVATION: some, STEERING: more})
        group = STEERING_GROUP.planned(run)
        assert tuple(group.tables) == tables
        assert group.made == list(group.tables.values())
        keys.add(group.key)
        built = STEERING_GROUP.build(run)
        assert built == group
        assert all(storage.exists(name) for name in built.made)
    assert len(keys) == 4


def with_corpus(made: SteeringRun, storage: Storage, config: Config) -> Catalog:
    """What would be published with the corpus' tables alone made anew."""
    return candidate(storage, [CorpusTables().build(run_of(config, storage, {TOKENIZE: made.shards}))])


@pytest.mark.slow
def test_the_group_goes_with_its_corpus_and_stays_beside_the_others(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    made, _ = steering_catalogue.built(storage, Made(cases=1, experiments=1))
    assert "steering" in with_corpus(made, storage, made.config).tables
    function_tokens = made.config.function_tokens.model_copy(update={"share": 0.2})
    other = made.config.model_copy(update={"function_tokens": function_tokens})
    gone = with_corpus(made, storage, other)
    assert not set(MADE) & set(gone.tables)
    assert "steering" not in gone.lineage
    graph_only = made.config.model_copy(update={"steering": None})
    assert with_corpus(made, storage, graph_only).lineage.keys() == {"corpus", "steering"}
    retrained = graph_only.model_copy(
        update={"sae": [entry.model_copy(update={"path": "new"}) for entry in made.config.sae]}
    )
    assert with_corpus(made, storage, retrained).lineage.keys() == {"corpus"}
    published = read_catalog(storage)
    # So does what an experiment has published that this version does not have.
    unknown = replace(
        published,
        tables=published.tables | {"novelties": "n.parquet"},
        lineage=published.lineage | {"novel": "n"},
        about=published.about | {"novel": published.about["steering"]},
    )
    write_catalog(storage, unknown)
    kept, gone = with_corpus(made, storage, made.config), with_corpus(made, storage, other)
    assert (kept.tables["novelties"], kept.lineage["novel"]) == ("n.parquet", "n")
    assert "novelties" not in gone.tables
    assert gone.lineage.keys() == {"corpus"}
    assert set(MADE) <= set(kept.tables)
    onto = Catalog(
        sharded={"edges": [ShardFile(name="x.parquet")]},
        lineage=published.lineage,
        about=published.about | {"graph": published.about["steering"]},
    )
    run = made.write(storage)
    built = merged(onto, corpus_group(run.config, made.shards), STEERING_GROUP.planned(run))
    assert built.sharded["edges"] == onto.sharded["edges"]
    key = STEERING_GROUP.planned(run).key
    made.config = make_config(storage, LAYERS, steering={"cases": "cases.toml", "resamples": 101})
    assert STEERING_GROUP.planned(made.write(storage)).key != key


@pytest.mark.slow
def test_a_finished_group_is_not_made_again(tmp_path: Path) -> None:
    storage, told = Storage(str(tmp_path)), list[str]()
    run = steering_run(storage, Made(cases=1, experiments=1)).write(storage)
    STEERING_GROUP.build(run, lambda done, total, what: told.append(what))
    assert {"reactivation scores", "steering effects"} <= set(told)
    told.clear()
    STEERING_GROUP.build(run, lambda done, total, what: told.append(what))
    assert set(told) == {"steering tables"}


@pytest.fixture(scope="module")
def connection(made: Tables) -> Iterator[Any]:
    """A connection that has the tables as tables."""
    with closing(open_duckdb(made.storage)) as connection:
        for name in (*MADE, "tokens"):
            connection.register("_rows", made.storage.read_parquet(made.catalog.tables[name]))
            connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _rows")
            connection.unregister("_rows")
        yield connection


def unmet(connection: Any, table: str = "") -> set[str]:
    """Names of the expectations that are not met, of those that read the table or of all."""
    asked = [entry for entry in STEERING_TABLES if not table or table in {entry.table, *entry.needs}]
    found = find_in_views(connection, asked, {*MADE, "tokens"}, "here")
    assert len(found) == len(asked)
    return {finding.expectation.name for finding in found if finding.count}


@pytest.mark.slow
def test_tables_as_they_are_meet_all_expectations(made: Tables, connection: Any) -> None:
    assert unmet(connection) == set()
    check_tables(made.run.config, made.storage, read_catalog(made.storage))


def _set(
    name: str, value: Any, where: Callable[[Row], bool] = lambda row: True
) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        row = next(row for row in rows if where(row))
        row[name] = value(row) if callable(value) else value

    return change


def _twice(rows: list[Row]) -> None:
    rows.append(dict(rows[0]))


CORRUPTED: list[tuple[str, str, Callable[[list[Row]], None]]] = [
    ("prompt_tokens", "prompt token keys are unique", _twice),
    ("prompt_tokens", "prompt tokens are of the corpus' kinds", _set("is_function", lambda r: not r["is_function"])),
    ("prompt_tokens", "cases have one relation, prompts that differ in one place", _set("relation", "another")),
    (
        "prompt_tokens",
        "cases have one relation, prompts that differ in one place",
        _set("token_id", 20, lambda row: row["position"] == 7),
    ),
    ("reactivations", "reactivation keys are unique", _twice),
    ("reactivations", "reactivations are active", _set("activation", 0.0)),
    ("reactivations", "reactivations are at prompt tokens", _set("position", 77)),
    (
        "reactivations",
        "own features tell prompts apart",
        _set("is_own", False, lambda row: bool(row["is_own"])),
    ),
    ("reactivation_positions", "reactivation position keys are unique", _twice),
    (
        "reactivation_positions",
        "reactivation counts are possible",
        _set("unrelated", lambda row: row["n_unrelated"] + 1),
    ),
    (
        "reactivation_positions",
        "reactivation_positions = reactivations counted",
        _set("own", lambda row: row["own"] - 1, lambda row: bool(row["own"] > 0)),
    ),
    ("reactivation_scores", "reactivation score keys are unique", _twice),
    (
        "reactivation_scores",
        "reactivation_scores = reactivation_positions grouped",
        _set("unrelated", lambda row: row["unrelated"] / 2),
    ),
    ("reactivation_scores", "reactivation_scores = reactivation_positions grouped", lambda rows: rows.pop()),  # type: ignore[arg-type, return-value]
    ("reactivation_scores", "reactivation scores are shares with intervals", _set("excess", 0.99)),
    ("reactivation_scores", "reactivation scores are shares with intervals", _set("own_low", None)),
    ("reactivation_scores", "reactivation scores are shares with intervals", _set("excess_high", -0.9)),
    ("trait_layers", "trait layer keys are unique", _twice),
    ("trait_layers", "each trait has one most informative layer", _set("is_most_informative", True)),
    ("trait_layers", "trait layers are possible", _set("accuracy", 1.5)),
    ("trait_features", "trait feature keys are unique", _twice),
    ("trait_features", "trait features are ranked by contribution", _set("contribution", 0.0)),
    (
        "trait_features",
        "trait features are ranked by contribution",
        _set("feature_id", lambda row: row["feature_id"] + 7),
    ),
    ("steering", "steering keys are unique", _twice),
    ("steering", "strength 0 changes nothing", _set("kl", 1e-12, lambda row: row["strength"] == 0)),
    ("steering", "strength 0 changes nothing", _set("steered_text", "!", lambda row: row["strength"] == 0)),
    ("steering", "steering is measured", _set("kl", math.nan)),
    ("steering", "steering is measured", _set("draw", 7, lambda row: row["control"] == "trait")),
    ("steering", "an experiment has one baseline", _set("target_logprob", -8.0)),
    ("steering_effects", "steering effect keys are unique", _twice),
    ("steering_effects", "steering_effects = steering grouped", _set("kl", lambda row: row["kl"] + 0.01)),
    (
        "steering_effects",
        "steering effects have intervals",
        _set("advantage", 0.0, lambda row: row["control"] == "random"),
    ),
    ("steering_effects", "settings are of the same experiments", _set("n", 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "name", "change"),
    CORRUPTED,
    ids=[f"{table}-{place}" for place, (table, *_) in enumerate(CORRUPTED)],
)
def test_expectations_catch_what_is_wrong(
    made: Tables, connection: Any, table: str, name: str, change: Callable[[list[Row]], None]
) -> None:
    rows = [dict(row) for row in made.rows[table]]
    change(rows)
    with closing(connection.cursor()) as cursor:
        cursor.register("_rows", pa.Table.from_pylist(rows, schema=TABLES[table]))
        cursor.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM _rows")
        assert name in unmet(cursor, table)


def test_every_expectation_is_tested() -> None:
    assert {expectation.name for expectation in STEERING_TABLES} == {name for _, name, _ in CORRUPTED}


def test_a_table_that_is_missing_is_named(made: Tables, tmp_path: Path) -> None:
    for place, gone in enumerate(("steering_effects", "reactivations")):
        storage = Storage(str(tmp_path / str(place)))
        tables = {table: f"tables/{table}.parquet" for table in MADE if table != gone}
        for table, file in tables.items():
            storage.write_parquet(file, made.storage.read_parquet(made.catalog.tables[table]))
        with pytest.raises(ExpectationError, match=gone):
            check_tables(made.run.config, storage, Catalog(tables=tables, lineage={"steering": gone}))
