"""What the expectations of reactivation and steering are asked of (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from infra import verified
from infra.manifest import load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ExpectationError, StorageError
from schemas.steering.section import Cases, Trait, steering_of
from schemas.steering.work import CaseFeatures, Steered, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.checks import put
from tasks.engine.run import Run
from tasks.engine.stage import Question
from tasks.steering.cases import read_cases

Rows = list[dict[str, Any]]
Small = dict[str, tuple[Rows, pa.Schema]]
"""Small tables, by their names."""


def of_reactivation(run: Run, read: Sequence[CaseFeatures]) -> Question:
    """The cases that were read, against their file, the dictionaries and the vocabulary.

    Raises:
        ConfigError: if the cases' file cannot be read.
    """
    storage, dictionaries, vocabulary = run.storage, run.result(DICTIONARIES), run.result(TOKENIZE).vocabulary
    wanted = [
        {"case": case.name, "relation": case.relation, "prompt": prompt}
        for case in read_cases(run.config, storage).case
        for prompt in case.prompts
    ]
    named = [(case.folder, {"case": case.case, "n_tokens": case.n_tokens}) for case in read]
    small: Small = {
        "shards": (_folders(storage, named), _CASES),
        "layer_shards": (_folders(storage, _of_layers("case", read)), _CASE_LAYERS),
        "wanted": (wanted, _PROMPTS),
        "dictionaries": (_sizes(dictionaries), _SIZES),
    }
    files = {
        "prompt_tokens": [case.folder for case in read],
        "prompt_features": [entry.folder for case in read for entry in case.layers],
    }
    return Question(
        of={**_rows(small), "of": vocabulary},
        views=lambda: {**_tables(small), "vocabulary": verified.read_table(storage, vocabulary)},
        put=lambda connection: _put_files(connection, storage, files),
    )


def of_steering(run: Run, steered: Steered) -> Question:
    """Traits and experiments, against the cases' file, the configuration and the dictionaries.

    Raises:
        ConfigError: if the cases' file cannot be read.
    """
    storage, dictionaries = run.storage, run.result(DICTIONARIES)
    named = [(made.folder, {"case": made.case, "prompt": made.prompt}) for made in steered.experiments]
    small: Small = {
        **_wanted(read_cases(run.config, storage), [dictionary.layer for dictionary in dictionaries]),
        **_settings(run.config),
        "dictionaries": (_sizes(dictionaries), _SIZES),
        "traits": (_folders(storage, _of_layers("trait", steered.traits)), _TRAITS),
        "experiments": (_folders(storage, named), _EXPERIMENTS),
    }
    of_traits = [entry.folder for trait in steered.traits for entry in trait.layers]
    files = {
        "trait_layers": of_traits,
        "trait_features": of_traits,
        "steering": [made.folder for made in steered.experiments],
    }
    return Question(
        of=_rows(small),
        views=lambda: _tables(small),
        put=lambda connection: _put_files(connection, storage, files),
    )


def _rows(small: Small) -> dict[str, Rows]:
    return {name: rows for name, (rows, _) in small.items()}


def _tables(small: Small) -> dict[str, pa.Table]:
    return {name: pa.Table.from_pylist(rows, schema=schema) for name, (rows, schema) in small.items()}


def _wanted(cases: Cases, layers: Sequence[int]) -> Small:
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


def _settings(config: Config) -> Small:
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


def _put_files(connection: Any, storage: Storage, files: Mapping[str, Iterable[str]]) -> Collection[str]:
    """Make a table of each file of all folders that have it, with the folder and the number of each row in its file.

    Raises:
        ExpectationError: if a file has not the columns that it should have.
        StorageError: if a file cannot be read.
    """
    for name, folders in files.items():
        place = pa.schema([("folder", pa.string()), ("file_row", pa.int64())])
        put(connection, name, pa.schema([*SHARD_FILES[name], *place]).empty_table())
        for folder in dict.fromkeys(folders):
            rows = _file(storage, folder, name)
            rows = rows.append_column("folder", pa.repeat(folder, len(rows)))
            rows = rows.append_column("file_row", pa.array(range(len(rows)), pa.int64()))
            connection.register("_part", rows)
            connection.execute(f"INSERT INTO {name} SELECT * FROM _part")
            connection.unregister("_part")
    return files.keys()


def _file(storage: Storage, folder: str, name: str) -> pa.Table:
    schema = SHARD_FILES[name]
    try:
        found = verified.read_table(storage, f"{folder}/{name}.parquet")
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise StorageError(
            f"{storage.url(folder)}: {name}.parquet cannot be read: {error}",
            hint="delete the folder and run again",
        ) from error
    try:
        return found.select(schema.names).cast(schema)
    except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ExpectationError(
            f"{storage.url(folder)}: {name}.parquet has not the columns that it should have: {error}",
            hint="delete the folder and run again",
        ) from error


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
