"""The checks at the boundaries of reactivation and steering (PAPER 1.3), as those of `tasks.engine.validation`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pyarrow as pa

from infra import verified
from infra.duck import open_duckdb
from infra.manifest import load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ExpectationError, StorageError
from schemas.expectations import SUITES
from schemas.steering.section import Cases, Trait, steering_of
from schemas.steering.work import CaseFeatures, SteeredPrompt, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary
from tasks.engine.offenders import find_in_views
from tasks.engine.shard_checks import put, rows_table
from tasks.engine.verdicts import check_key, conclude, passed
from tasks.steering.cases import read_cases

Rows = list[dict[str, Any]]


def check_reactivation(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    dictionaries: Sequence[Dictionary],
    read: Sequence[CaseFeatures],
) -> None:
    """Check the cases that were read against their file, the dictionaries and the vocabulary.

    Raises:
        ConfigError: if the cases' file cannot be read.
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    wanted = [
        {"case": case.name, "relation": case.relation, "prompt": prompt}
        for case in read_cases(config, storage).case
        for prompt in case.prompts
    ]
    named = [(case.folder, {"case": case.case, "n_tokens": case.n_tokens}) for case in read]
    tables: dict[str, tuple[Rows, pa.Schema]] = {
        "shards": (_folders(storage, named), _CASES),
        "layer_shards": (_folders(storage, _of_layers("case", read)), _CASE_LAYERS),
        "wanted": (wanted, _PROMPTS),
        "dictionaries": (_sizes(dictionaries), _SIZES),
    }
    rows = {name: rows for name, (rows, _) in tables.items()}
    key = check_key("reactivation", **rows, of=shards.vocabulary)
    if passed(storage, "reactivation", key):
        return
    with open_duckdb(storage, config.duckdb) as connection:
        for name, (entries, schema) in tables.items():
            put(connection, name, rows_table(entries, schema))
        put(connection, "vocabulary", verified.read_table(storage, shards.vocabulary))
        for name, view in (("prompt_tokens", "shards"), ("prompt_features", "layer_shards")):
            _put_files(connection, storage, name, [row["folder"] for row in rows[view]])
        views = {*tables, "vocabulary", "prompt_tokens", "prompt_features"}
        findings = find_in_views(connection, SUITES["reactivation"], views, storage.url("reactivation"))
    conclude(storage, "reactivation", key, findings)


def check_steering(
    config: Config,
    storage: Storage,
    dictionaries: Sequence[Dictionary],
    traits: Sequence[TraitFeatures],
    steered: Sequence[SteeredPrompt],
) -> None:
    """Check traits and experiments against the cases' file, the configuration and the dictionaries.

    Raises:
        ConfigError: if the cases' file cannot be read.
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    tables = {
        **_wanted(read_cases(config, storage), [dictionary.layer for dictionary in dictionaries]),
        **_settings(config),
        "dictionaries": (_sizes(dictionaries), _SIZES),
        "traits": (_folders(storage, _of_layers("trait", traits)), _TRAITS),
        "experiments": (
            _folders(
                storage, [(made.folder, {"case": made.case, "prompt": made.prompt}) for made in steered]
            ),
            _EXPERIMENTS,
        ),
    }
    key = check_key("steering", **{name: rows for name, (rows, _) in tables.items()})
    if passed(storage, "steering", key):
        return
    with open_duckdb(storage, config.duckdb) as connection:
        for name, (rows, schema) in tables.items():
            put(connection, name, rows_table(rows, schema))
        for name in ("trait_layers", "trait_features"):
            _put_files(connection, storage, name, [row["folder"] for row in tables["traits"][0]])
        _put_files(connection, storage, "steering", [made.folder for made in steered])
        views = {*tables, "trait_layers", "trait_features", "steering"}
        findings = find_in_views(connection, SUITES["steering"], views, storage.url("steering"))
    conclude(storage, "steering", key, findings)


def _wanted(cases: Cases, layers: Sequence[int]) -> dict[str, tuple[Rows, pa.Schema]]:
    """What the cases' file asks the stage steering for."""
    return {
        "wanted_traits": (
            [{"trait": trait.name, "n_pairs": len(trait.positive or ())} for trait in cases.trait],
            _WANTED_TRAITS,
        ),
        "wanted_layers": (
            [
                {"trait": trait.name, "layer": layer}
                for trait in cases.trait
                for layer in (layers if trait.layer is None else [trait.layer])
            ],
            _WANTED_LAYERS,
        ),
        "wanted_features": ([row for trait in cases.trait for row in _given(trait)], _WANTED_FEATURES),
        "wanted_experiments": (
            [
                {
                    "case": steer.title,
                    "prompt": steer.prompt,
                    "target": steer.target,
                    "traits": " + ".join(steer.traits),
                }
                for steer in cases.steer
            ],
            _WANTED_EXPERIMENTS,
        ),
        "wanted_members": (
            [
                {"case": steer.title, "prompt": steer.prompt, "target": steer.target, "trait": trait}
                for steer in cases.steer
                for trait in steer.traits
            ],
            _WANTED_MEMBERS,
        ),
    }


def _given(trait: Trait) -> Rows:
    """The features that the cases' file gives of a trait."""
    if trait.layer is None or trait.features is None or trait.values is None:
        return []
    return [
        {"trait": trait.name, "layer": trait.layer, "place": place, "feature_id": feature, "value": value}
        for place, (feature, value) in enumerate(zip(trait.features, trait.values, strict=True), 1)
    ]


def _settings(config: Config) -> dict[str, tuple[Rows, pa.Schema]]:
    """The configuration's numbers that the stage depends on, and the conditions that follow from them."""
    section = steering_of(config)
    variants: list[tuple[str, str, int]] = [(place, "trait", 0) for place in section.places]
    variants.append(("content token", "trait", 0))
    variants += [
        (place, "random", draw) for place in section.places for draw in range(1, section.random_controls + 1)
    ]
    conditions = [
        {"mode": mode, "place": place, "control": control, "draw": draw, "strength": strength}
        for mode in section.modes
        for place, control, draw in variants
        for strength in section.strengths
    ]
    settings = {
        "configured_layer": section.layer,
        "configured_features": section.features,
        "decomposition": section.decomposition,
    }
    return {"conditions": (conditions, _CONDITIONS), "settings": ([settings], _SETTINGS)}


def _sizes(dictionaries: Sequence[Dictionary]) -> Rows:
    return [{"layer": entry.layer, "key": entry.key, "d_sae": entry.d_sae} for entry in dictionaries]


def _folders(storage: Storage, named: Sequence[tuple[str, dict[str, Any]]]) -> Rows:
    """Folders with what they are of, and whether each is finished."""
    committed = load_all(storage, [folder for folder, _ in named])
    return [{**of, "folder": folder, "committed": folder in committed} for folder, of in named]


def _of_layers(
    kind: Literal["case", "trait"], found: Sequence[CaseFeatures | TraitFeatures]
) -> list[tuple[str, dict[str, Any]]]:
    return [
        (entry.folder, {kind: getattr(one, kind), "layer": entry.layer})
        for one in found
        for entry in one.layers
    ]


def _put_files(connection: Any, storage: Storage, name: str, folders: Iterable[str]) -> None:
    """The table `name`: that file of all folders, with the folder and the number of each row in its file.

    Raises:
        ExpectationError: if a file has not the columns that it should have.
        StorageError: if a file cannot be read.
    """
    schema = SHARD_FILES[name]
    place = [("folder", pa.string()), ("file_row", pa.int64())]
    put(connection, name, pa.schema([*schema, *place]).empty_table())
    for folder in dict.fromkeys(folders):
        try:
            found = verified.read_table(storage, f"{folder}/{name}.parquet")
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise StorageError(
                f"{storage.url(folder)}: {name}.parquet cannot be read: {error}",
                hint="delete the folder and run again",
            ) from error
        try:
            rows = found.select(schema.names).cast(schema)
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ExpectationError(
                f"{storage.url(folder)}: {name}.parquet has not the columns that it should have: {error}",
                hint="delete the folder and run again",
            ) from error
        rows = rows.append_column("folder", pa.repeat(folder, len(rows)))
        rows = rows.append_column("file_row", pa.array(range(len(rows)), pa.int64()))
        connection.register("_part", rows)
        connection.execute(f"INSERT INTO {name} SELECT * FROM _part")
        connection.unregister("_part")


_TEXT, _WHOLE = pa.string(), pa.int64()
_SIZES = pa.schema([("layer", pa.int32()), ("key", _TEXT), ("d_sae", _WHOLE)])
_CASES = pa.schema([("case", _TEXT), ("folder", _TEXT), ("n_tokens", _WHOLE), ("committed", pa.bool_())])
_CASE_LAYERS = pa.schema(
    [("case", _TEXT), ("layer", pa.int32()), ("folder", _TEXT), ("committed", pa.bool_())]
)
_PROMPTS = pa.schema([("case", _TEXT), ("relation", _TEXT), ("prompt", _TEXT)])
_TRAITS = pa.schema([("trait", _TEXT), ("layer", pa.int32()), ("folder", _TEXT), ("committed", pa.bool_())])
_EXPERIMENTS = pa.schema([("case", _TEXT), ("prompt", _TEXT), ("folder", _TEXT), ("committed", pa.bool_())])
_WANTED_TRAITS = pa.schema([("trait", _TEXT), ("n_pairs", _WHOLE)])
_WANTED_LAYERS = pa.schema([("trait", _TEXT), ("layer", pa.int32())])
_WANTED_FEATURES = pa.schema(
    [
        *[("trait", _TEXT), ("layer", pa.int32()), ("place", pa.int32()), ("feature_id", pa.int32())],
        ("value", pa.float64()),
    ]
)
_WANTED_EXPERIMENTS = pa.schema([("case", _TEXT), ("prompt", _TEXT), ("target", _TEXT), ("traits", _TEXT)])
_WANTED_MEMBERS = pa.schema([("case", _TEXT), ("prompt", _TEXT), ("target", _TEXT), ("trait", _TEXT)])
_CONDITIONS = pa.schema(
    [
        *[("mode", _TEXT), ("place", _TEXT), ("control", _TEXT), ("draw", pa.int32())],
        ("strength", pa.float64()),
    ]
)
_SETTINGS = pa.schema(
    [("configured_layer", pa.int32()), ("configured_features", _WHOLE), ("decomposition", _TEXT)]
)
