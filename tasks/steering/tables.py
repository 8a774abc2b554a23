"""The tables of reactivation and steering (PAPER 1.3), from the folders of cases, traits and experiments.

All are small next to a corpus' graph and lie in one folder. Sums are sums of integers and rows are sorted, so
neither the order of the cases' file nor threads can change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from infra import verified
from infra.catalog import Catalog, ShardFile
from infra.progress import Progress, one_by_one, silent
from infra.storage import StoredFile
from schemas.config import Config
from schemas.steering import ROOM
from schemas.steering.section import steering_of
from schemas.steering.work import CaseFeatures, LayerFolder, SteeredPrompt, TraitFeatures
from schemas.tables import TABLES
from tasks.corpus.tables import build_tokens, corpus_group
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Image, Shown
from tasks.engine.tables import VERSION, TableGroup, Tables, ensure_folder, opened, selected, write_table
from tasks.report.queries import rows, tables_of
from tasks.steering.intervals import case_sums, effect_intervals, experiment_effects, score_intervals
from tasks.steering.loaded_traits import load_layers
from tasks.steering.reactivation import REACTIVATION
from tasks.steering.steering import STEERING

OF_CASES, OF_TRAITS, OF_EXPERIMENTS = ROOM.together
"""The tables in the order in which they are made."""

SORTED_BY = {
    "trait_layers": ("trait", "layer"),
    "trait_features": ("trait", "layer", "place"),
    "steering": ("case", "prompt", "target", "mode", "place", "control", "draw", "strength"),
}
"""Tables that gather the folders' rows, and the keys of these."""

UPSTREAM: dict[str, tuple[str, ...]] = {
    "prompt_tokens": ("tokens", "shard_prompt_tokens"),
    "reactivations": ("prompt_tokens", "shard_prompt_features"),
    "reactivation_positions": ("prompt_tokens", "reactivations"),
    "reactivation_scores": ("reactivation_positions",),
    "steering_effects": ("steering",),
}
"""What each other table's SQL reads, or what comes before it does."""

HEAT_MAPS = 6
"""Heat maps shown at most."""


class SteeringTables(TableGroup):
    """The tables of a run's cases, traits and experiments; those of what it has none of are left out."""

    name = section = "steering"
    needs = (TOKENIZE, REACTIVATION, STEERING)

    def planned(self, run: Run) -> Tables:
        """The group as it would be published.

        The order in which the cases' file has its entries changes neither a table nor the key.
        """
        cases, traits, experiments = _results(run)
        parts: dict[str, Any] = {
            "group": "steering",
            "version": VERSION,
            "corpus": corpus_group(run.config, run.result(TOKENIZE)).key,
            "cases": [[case.case, case.folder, _folders(case.layers)] for case in cases],
            "traits": [[trait.trait, _folders(trait.layers)] for trait in traits],
            "experiments": [[experiment.case, experiment.folder] for experiment in experiments],
            "resamples": steering_of(run.config).resamples,
        }
        inputs = {
            "shard_prompt_tokens": [ShardFile(name=f"{case.folder}/prompt_tokens.parquet") for case in cases],
            "shard_prompt_features": [
                ShardFile(name=f"{folder}/prompt_features.parquet", source=case.case)
                for case in cases
                for folder in _folders(case.layers)
            ],
        }
        wanted = [
            *(OF_CASES if cases else ()),
            *(OF_TRAITS if traits else ()),
            *(OF_EXPERIMENTS if experiments else ()),
        ]
        return Tables.of(self.name, parts, wanted, inputs=Catalog(sharded=inputs if cases else {}))

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing of its tables."""
        group, corpus = self.planned(run), corpus_group(run.config, run.result(TOKENIZE))
        total = len(group.tables)
        advance = one_by_one(progress, total)
        inputs = Catalog(tables=corpus.tables | group.tables, sharded=group.inputs.sharded)

        def make() -> Iterator[StoredFile]:
            for table, name in group.tables.items():
                if table in SORTED_BY:
                    yield run.storage.write_parquet(name, _gathered(run, table))
                else:
                    yield _written(run, table, name, selected(inputs, UPSTREAM[table]))
                advance(table.replace("_", " "))

        progress(0, total, "steering tables")
        build_tokens(run, corpus)
        if group.tables:
            ensure_folder(run.storage, list(group.tables.values()), group.key_parts, make)
        progress(total, total, "steering tables")
        return group

    def shown(self, connection: Any, config: Config) -> Iterable[Shown | Image]:
        """What steering does, by strength, and heat maps of reactivation."""
        from tasks.report.charts import png_uri
        from tasks.steering.heat_maps import RULE, heat_map_chart, heat_maps

        if "steering_effects" in tables_of(connection):
            yield Shown(
                name="steering-effects",
                description="What steering does to the answers, on average over the experiments, beside its controls",
                rows=rows(
                    connection,
                    "SELECT mode, place, control, strength, n, target_logprob_delta, advantage, kl, "
                    "log_perplexity_delta, changed FROM steering_effects ORDER BY ALL",
                ),
            )
        for place, chart in enumerate(map(heat_map_chart, heat_maps(connection, HEAT_MAPS)), 1):
            yield Image(name=f"heat-map-{place}", description=f"{chart.alt} {RULE}", url=png_uri(chart.spec))


STEERING_GROUP = SteeringTables()


def _results(run: Run) -> tuple[list[CaseFeatures], list[TraitFeatures], list[SteeredPrompt]]:
    """Cases, traits and experiments in an order that is not the file's."""
    cases, made = run.result(REACTIVATION), run.result(STEERING)
    return (
        sorted(cases, key=lambda case: (case.case, case.folder)),
        sorted(made.traits, key=lambda trait: (trait.trait, _folders(trait.layers))),
        sorted(made.experiments, key=lambda one: (one.case, one.prompt, one.folder)),
    )


def _folders(layers: Sequence[LayerFolder]) -> list[str]:
    return [entry.folder for entry in sorted(layers, key=lambda entry: entry.layer)]


def _written(run: Run, table: str, name: str, inputs: Catalog) -> StoredFile:
    """A table that SQL makes."""
    relations: dict[str, pa.Table] = {}
    if table in {"reactivation_scores", "steering_effects"}:
        relations, inputs = _measured(run, table, inputs), Catalog()
    return write_table(run.config.duckdb, run.storage, table, name, inputs, relations)


def _measured(run: Run, table: str, inputs: Catalog) -> dict[str, pa.Table]:
    """What the table's SQL sums, by case or by experiment, and the intervals."""
    config, resamples = run.config, steering_of(run.config).resamples
    with opened(f"the table {table}", config.duckdb, run.storage, inputs) as connection:
        if table == "reactivation_scores":
            sums = case_sums(connection)
            return {"case_sums": sums, "intervals": score_intervals(sums, resamples)}
        effects = experiment_effects(connection)
        return {"experiment_effects": effects, "intervals": effect_intervals(effects, resamples)}


def _gathered(run: Run, table: str) -> pa.Table:
    """The folders' rows under each other, sorted by the table's keys."""
    schema, storage = TABLES[table], run.storage
    _, traits, experiments = _results(run)
    if table == "trait_layers":
        layers = [
            {"trait": trait.trait, **asdict(layer)}
            for trait in traits
            for layer in load_layers(storage, trait)
        ]
        rows = pa.Table.from_pylist(layers, schema=schema)
    else:
        folders = (
            [made.folder for made in experiments]
            if table == "steering"
            else [entry.folder for trait in traits for entry in trait.layers]
        )
        read = (verified.read_table(storage, f"{folder}/{table}.parquet") for folder in folders)
        rows = pa.concat_tables([part.select(schema.names).cast(schema) for part in read])
    return rows.sort_by([(name, "ascending") for name in SORTED_BY[table]]).combine_chunks()
