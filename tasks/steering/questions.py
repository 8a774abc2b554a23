"""What the expectations of reactivation and steering are asked of (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from infra import verified
from infra.manifest import load_all
from infra.storage import Storage
from schemas.errors import ExpectationError, StorageError
from schemas.steering.section import steering_of
from schemas.steering.work import CaseFeatures, Steered
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.checks import put
from tasks.engine.run import Run
from tasks.engine.stage import Question, table_of
from tasks.steering.cases import read_cases
from tasks.steering.conditions import conditions_of


def of_reactivation(run: Run, read: Sequence[CaseFeatures]) -> Question:
    """The cases that were read, against their file, the dictionaries and the vocabulary."""
    storage, dictionaries, vocabulary = run.storage, run.result(DICTIONARIES), run.result(TOKENIZE).vocabulary
    cases = [(case.folder, case.case, case.n_tokens) for case in read]
    layers = [(entry.folder, case.case, entry.layer) for case in read for entry in case.layers]
    wanted = [
        (case.name, case.relation, prompt)
        for case in read_cases(run.config, storage).case
        for prompt in case.prompts
    ]
    files = {
        "prompt_tokens": [folder for folder, *_ in cases],
        "prompt_features": [folder for folder, *_ in layers],
    }
    return Question(
        small={
            "shards": _folders(storage, "case VARCHAR, n_tokens BIGINT", cases),
            "layer_shards": _folders(storage, "case VARCHAR, layer INTEGER", layers),
            "wanted": table_of("case VARCHAR, relation VARCHAR, prompt VARCHAR", wanted),
            "dictionaries": _sizes(dictionaries),
        },
        of={"of": vocabulary},
        views=lambda: {"vocabulary": verified.read_table(storage, vocabulary)},
        put=partial(_put_files, storage, files),
    )


def of_steering(run: Run, steered: Steered) -> Question:
    """Traits and experiments, against the cases' file, the configuration and the dictionaries."""
    storage, dictionaries, section = run.storage, run.result(DICTIONARIES), steering_of(run.config)
    cases = read_cases(run.config, storage)
    traits = [(entry.folder, trait.trait, entry.layer) for trait in steered.traits for entry in trait.layers]
    experiments = [(made.folder, made.case, made.prompt) for made in steered.experiments]
    # Every prompt has the control at a content token here; where it has no such token, its rows are left out.
    conditions = conditions_of(section, last=0, content=0)
    files = {
        "trait_layers": [folder for folder, *_ in traits],
        "trait_features": [folder for folder, *_ in traits],
        "steering": [folder for folder, *_ in experiments],
    }
    return Question(
        small={
            "wanted_traits": table_of(
                "trait VARCHAR, n_pairs BIGINT",
                [(trait.name, len(trait.positive or ())) for trait in cases.trait],
            ),
            "wanted_layers": table_of(
                "trait VARCHAR, layer INTEGER",
                [
                    (trait.name, layer)
                    for trait in cases.trait
                    for layer in (
                        [entry.layer for entry in dictionaries] if trait.layer is None else [trait.layer]
                    )
                ],
            ),
            "wanted_features": table_of(
                "trait VARCHAR, layer INTEGER, place INTEGER, feature_id INTEGER, value DOUBLE",
                [
                    (trait.name, trait.layer, place, feature, value)
                    for trait in cases.trait
                    for place, (feature, value) in enumerate(
                        zip(trait.features or (), trait.values or (), strict=True), 1
                    )
                ],
            ),
            "wanted_experiments": table_of(
                "case VARCHAR, prompt VARCHAR, target VARCHAR, traits VARCHAR",
                [(one.title, one.prompt, one.target, " + ".join(one.traits)) for one in cases.steer],
            ),
            "wanted_members": table_of(
                "case VARCHAR, prompt VARCHAR, target VARCHAR, trait VARCHAR",
                [(one.title, one.prompt, one.target, trait) for one in cases.steer for trait in one.traits],
            ),
            "conditions": table_of(
                "mode VARCHAR, place VARCHAR, control VARCHAR, draw INTEGER, strength DOUBLE",
                [(one.mode, one.place, one.control, one.draw, one.strength) for one in conditions],
            ),
            "settings": table_of(
                "configured_layer INTEGER, configured_features BIGINT, decomposition VARCHAR",
                [(section.layer, section.features, section.decomposition)],
            ),
            "dictionaries": _sizes(dictionaries),
            "traits": _folders(storage, "trait VARCHAR, layer INTEGER", traits),
            "experiments": _folders(storage, "case VARCHAR, prompt VARCHAR", experiments),
        },
        put=partial(_put_files, storage, files),
    )


def _sizes(dictionaries: Sequence[Dictionary]) -> pa.Table:
    rows = [(entry.layer, entry.key, entry.d_sae) for entry in dictionaries]
    return table_of("layer INTEGER, key VARCHAR, d_sae BIGINT", rows)


def _folders(storage: Storage, columns: str, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Folders, what they are of, and whether each is finished."""
    committed = load_all(storage, [folder for folder, *_ in rows])
    told = [(*row, row[0] in committed) for row in rows]
    return table_of(f"folder VARCHAR, {columns}, committed BOOLEAN", told)


def _put_files(storage: Storage, files: Mapping[str, Iterable[str]], connection: Any) -> Collection[str]:
    """Make a table of each file of all folders that have it, with the folder and the number of each row in its file.

    Raises:
        ExpectationError: if a file has not the columns that it should have.
    """
    place = pa.schema([("folder", pa.string()), ("file_row", pa.int64())])
    for name, folders in files.items():
        parts = [pa.schema([*SHARD_FILES[name], *place]).empty_table()]
        for folder in dict.fromkeys(folders):
            rows = _file(storage, folder, name)
            numbers = pa.array(range(len(rows)), pa.int64())
            parts.append(
                rows.append_column("folder", pa.repeat(folder, len(rows))).append_column("file_row", numbers)
            )
        put(connection, name, pa.concat_tables(parts))
    return files.keys()


def _file(storage: Storage, folder: str, name: str) -> pa.Table:
    schema, way_out = SHARD_FILES[name], "delete the folder and run again"
    try:
        found = verified.read_table(storage, f"{folder}/{name}.parquet")
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise StorageError(
            f"{storage.url(folder)}: {name}.parquet cannot be read: {error}", hint=way_out
        ) from error
    try:
        return found.select(schema.names).cast(schema)
    except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ExpectationError(
            f"{storage.url(folder)}: {name}.parquet has not the columns that it should have: {error}",
            hint=way_out,
        ) from error
