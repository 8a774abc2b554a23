"""All stages and tables of a configuration, small: each notes that it was made, for tests of what makes them.

The stand-ins are stages of the engine, so units, manifests and what is found again are real; what they are about, what
they need and what they show is asked of the stages that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import plain
import pyarrow as pa
import pytest

from infra.catalog import Catalog
from infra.progress import Progress, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import FunctokError
from schemas.experiments import EXPERIMENTS
from schemas.tables import SHARD_FILES, TABLES
from schemas.work import CorpusShards, Dictionary, FeatureShard, GraphShard, TokenShard
from tasks import stages
from tasks.engine import checks, tables
from tasks.engine.run import Run
from tasks.engine.stage import Image, Made, Question, Shown, Stage, Unit
from tasks.engine.tables import TableGroup, Tables
from tasks.experiment import Experiment

SHARD = TokenShard(folder="tokens/k/0", source="a.txt", doc_offset=0, n_documents=3, n_tokens=40, n_rejects=1)
SHARDS = CorpusShards(shards=(SHARD,), tokenizer_key="t", vocabulary="tokenizers/t/vocabulary.parquet")
TRAINED_TOKENIZER = "storage:tokenizers-trained/k"


class StandInStage(Stage[Unit, Any]):
    """One unit, or as many as are asked for."""

    def __init__(self, of: Stage[Any, Any], all_of_them: StandIns) -> None:
        self._of, self._all = of, all_of_them
        self.name, self.things, self.measure = of.name, of.things, f"{of.name} parts"  # type: ignore[misc]

    @property
    def needs(self) -> tuple[Stage[Any, Any], ...]:
        return tuple(self._all.stages[needed.name] for needed in self._of.needs)

    def applies(self, config: Config) -> bool:
        return self._of.applies(config)

    def subject(self, config: Config) -> str:
        return self._of.subject(config)

    def refuse(self, config: Config) -> FunctokError:
        return self._of.refuse(config)

    def units(self, run: Run) -> Sequence[Unit]:
        names = self._all.units.get(self.name, (self.name,))
        return [Unit(top="stand-ins", inputs={"unit": name}, about=name, size=4) for name in names]

    def prepare(self, run: Run, missing: Sequence[Unit]) -> Sequence[Unit]:
        if f"prepare {self.name}" in self._all.fail:
            raise self._all.fail[f"prepare {self.name}"]
        return missing

    def make(self, run: Run, group: Sequence[Unit]) -> Iterator[Made | int]:
        self._all.configs[self.name] = run.config
        (unit,) = group
        self._all.note(unit.about)

        def write() -> list[StoredFile]:
            for name, schema, rows in self._all.files.get(self.name, ()):
                write_rows(run.storage, name, schema, rows)
            return [run.storage.write_json(f"{unit.folder}/made.json", self.name)]

        yield Made.of(unit, write)

    def result(self, run: Run, units: Sequence[Unit], done: Mapping[str, Any]) -> Any:
        return self._all.results.get(self.name, lambda config: [])(run.config)

    def question(self, run: Run, result: Any) -> Question | None:
        self._all.note(f"check {self.name}")
        return None

    def shown(self, run: Run, result: Any) -> Iterable[Shown]:
        return self._of.shown(run, result)


class StandInTables(TableGroup):
    """Tables of a few given rows."""

    def __init__(self, of: TableGroup, all_of_them: StandIns) -> None:
        self._of, self._all = of, all_of_them
        self.name = of.name  # type: ignore[misc]

    @property
    def needs(self) -> tuple[Stage[Any, Any], ...]:
        return tuple(self._all.stages[needed.name] for needed in self._of.needs)

    def applies(self, config: Config) -> bool:
        return self._of.applies(config)

    def subject(self, config: Config) -> str:
        return self._of.subject(config)

    def planned(self, run: Run) -> Tables:
        files = {
            table: f"tables/{self.name}/{table}.parquet" for table in self._all.tables.get(self.name, ())
        }
        return Tables(name=self.name, key_parts={"group": self.name}, tables=files)

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        self._all.note(f"{self.name} tables", progress)
        made = self.planned(run)
        for table, name in made.tables.items():
            write_rows(run.storage, name, TABLES[table], self._all.tables[self.name][table])
        return made

    def shown(self, connection: Any, config: Config) -> Iterable[Shown | Image]:
        return self._of.shown(connection, config)


class StandIns:
    """The stand-ins, in the places of the stages, tables and checks that they stand for.

    Attributes:
        journal: What was made, checked and published, in order.
        fail: What to raise, by what is noted; `prepare <stage>` is raised before a stage makes anything.
        fail_once: The same, the first time alone.
        stages: By name.
        units: What a stage's units are called, by its name; one, of its name, where they are not here.
        configs: The configuration that each stage was made with.
        results: What a stage gives to those after it, by its name; an empty list where it is not here.
        files: What a stage writes besides, by its name: file, schema, rows.
        tables: Rows, by group and table.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.journal: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.fail_once: dict[str, Exception] = {}
        self.units: dict[str, tuple[str, ...]] = {}
        self.configs: dict[str, Config] = {}
        self.files: dict[str, list[tuple[str, pa.Schema, list[dict[str, Any]]]]] = {}
        self.results: dict[str, Callable[[Config], Any]] = {
            "tokenize": lambda config: SHARDS,
            "dictionaries": dictionaries_of,
            "features": features_of,
        }
        self.tables: dict[str, dict[str, list[dict[str, Any]]]] = {
            "corpus": {"tokens": TOKENS},
            "graph": {"coverage": COVERAGE},
        }
        real, groups, publish = stages.experiment, stages.table_groups, tables.publish
        experiments = {name: real(name) for name in EXPERIMENTS}
        spine = stages.spine()
        every = (*spine, *(stage for one in experiments.values() for stage in one.stages))
        self.stages = {stage.name: StandInStage(stage, self) for stage in every}

        def experiment(name: str) -> Experiment:
            of = experiments[name]
            own = tuple(self.stages[stage.name] for stage in of.stages)
            return replace(of, stages=own, tables=StandInTables(of.tables, self), check_fit=lambda *_: None)

        def published(storage: Storage, catalog: Catalog) -> None:
            self.note("publish")
            publish(storage, catalog)

        def reported(storage: Storage, config: Config, progress: Progress) -> str:
            self.note("report", progress)
            return storage.url("report.html")

        patch.setattr(stages, "spine", lambda: tuple(self.stages[stage.name] for stage in spine))
        patch.setattr(stages, "experiment", experiment)
        patch.setattr(
            stages, "table_groups", lambda config: [StandInTables(group, self) for group in groups(config)]
        )
        patch.setattr(stages, "write_report", reported)
        patch.setattr(tables, "publish", published)
        patch.setattr(checks, "check_tables", lambda *_: self.note("check tables"))
        patch.setattr("tasks.graph.preflight.check_dictionaries", lambda *_: {})
        patch.setattr("tasks.graph.preflight.check_model", lambda *_: None)
        patch.setattr("tasks.corpus.tokenizer_training.with_tokenizer", self._with_tokenizer)

    def note(self, what: str, progress: Progress | None = None) -> None:
        """Note it, fail where that is asked for, and tell progress."""
        self.journal.append(what)
        if what in self.fail_once:
            raise self.fail_once.pop(what)
        if what in self.fail:
            raise self.fail[what]
        if progress is not None:
            progress(0, 4, f"{what} parts")
            progress(4, 4, f"{what} parts")

    def finish(self, config: Config, *names: str) -> None:
        """Finish some stages and those that they need, unnoted."""
        plain.finished(config, None, *(self.stages[name] for name in names))
        self.journal.clear()

    def _with_tokenizer(self, config: Config, storage: Storage) -> Config | None:
        """The tokenizer is there as soon as the corpus is tokenized."""
        if config.vocabulary_size is None or config.model.tokenizer:
            return config
        if not Run(config, storage).is_finished(self.stages["tokenize"]):
            return None
        return config.model_copy(
            update={"model": config.model.model_copy(update={"tokenizer": TRAINED_TOKENIZER})}
        )


def dictionaries_of(config: Config) -> list[Dictionary]:
    return [
        Dictionary(layer=entry.layer, folder=f"dictionaries/{entry.layer}", key="k", d_sae=8, source="s")
        for entry in config.sae
    ]


def features_of(config: Config) -> list[FeatureShard]:
    part = GraphShard(shard=SHARD, n_documents=3, n_tokens=40)
    return [
        FeatureShard(
            layer=entry.layer, folder=f"features/{entry.layer}", part=part, n_activations=9, n_edges=5
        )
        for entry in config.sae
    ]


TOKENS = [
    {"token_id": 1, "token": "\n", "count": 30, "doc_count": 3, "doc_share": 1.0, "rank": 1}
    | {"share": 0.75, "cumulative_share": 0.75, "is_function": True},
    {"token_id": 2, "token": " rare", "count": 10, "doc_count": 1, "doc_share": 0.3, "rank": 2}
    | {"share": 0.25, "cumulative_share": 1.0, "is_function": False},
]
COVERAGE = [
    {"layer": layer, "rank": 1, "token_id": 1, "token": "\n", "new_features": 2}
    | {"cumulative_features": 2, "coverage": 0.2319, "dictionary_coverage": 0.2}
    for layer in (7, 15)
]


def write_rows(storage: Storage, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """Rows of a table or of a stage's file (`SHARD_FILES`)."""
    storage.write_parquet(name, pa.Table.from_pylist(rows, schema=schema))


def shard_file(
    folder: str, file: str, rows: list[dict[str, Any]]
) -> tuple[str, pa.Schema, list[dict[str, Any]]]:
    """An entry of `StandIns.files`."""
    return f"{folder}/{file}.parquet", SHARD_FILES[file], rows
