"""A series of SAEs along pre-training: one size, one a selected checkpoint, judged, and each one's graph (PAPER 1.4).

Nothing here trains or extracts: each checkpoint is a run of a configuration of its own, on which the spine's stages
make dictionary and features, so their keys, residuals and resumption are the spine's. All SAEs of a run see the same
documents, the same number of residuals and the same seed; they start fresh, or each from the one before (as SAE-Track
does).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infra import verified
from infra.manifest import Manifest, load, load_all
from infra.progress import Progress
from infra.storage import Storage, StoredFile
from schemas.arrow import declared
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, FunctokError, about
from schemas.pretraining.section import Growth as Section
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint, GrownSae
from schemas.sections import Sae
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary, HeldoutPart
from tasks.corpus.heldout import document_hashes, heldout_parts
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES, training_parts
from tasks.dictionaries.sample import leaves_out, n_documents_within
from tasks.engine.run import Run, make
from tasks.engine.stage import Made, Question, Shown, Stage, Unit
from tasks.graph.features import FEATURE_TOTALS, FEATURES, feature_row, stored_feature_views
from tasks.pretraining.checkpoints import CHECKPOINTS, key_columns, wanted_series
from tasks.pretraining.judgement import VERSION, Judging, learned_row
from tasks.pretraining.loading import config_of, named


@dataclass(frozen=True, kw_only=True, eq=False)
class GrowthUnit(Unit):
    """One checkpoint's SAE, what it has learned, and its graph; known by its key once the SAE is there.

    Attributes:
        checkpoint: The checkpoint.
        parts: The documents that judge the SAE.
        place: Which of how many it is.
        own: The run of its own configuration; None where that is not known before the SAE that it starts from.
        dictionary: Its SAE, where that is there.
    """

    checkpoint: Checkpoint
    parts: tuple[HeldoutPart, ...]
    place: str
    own: Run | None
    dictionary: Dictionary | None


class Growth(Stage[GrowthUnit, list[GrownSae]]):
    """The SAE series."""

    name = "growth"
    section = "consolidation.growth"
    needs = (TOKENIZE, CHECKPOINTS)
    measure = ""
    things = "SAEs"
    changed = "an SAE, its judgement or its graph is missing"
    libraries = ("torch", "sae_lens")
    tops = ("growth",)

    def units(self, run: Run) -> Sequence[GrowthUnit]:
        """One a selected checkpoint, series in order, steps ascending; none where no SAE series is asked for.

        The hashes that say which documents are held out are computed where nobody has yet, from all tokens, and kept
        (`tasks.corpus.heldout`).
        """
        if not self.applies(run.config):
            return []
        checkpoints = run.result(CHECKPOINTS)
        chosen = selected(run.config, checkpoints)
        with about(stage=self.name):
            parts = judging_parts(run.config, run.storage, run.result(TOKENIZE))
        units: list[GrowthUnit] = []
        for number, checkpoint in enumerate(chosen, start=1):
            before = units[-1] if units and units[-1].checkpoint.series == checkpoint.series else None
            own = dictionary = None
            if before is None or before.dictionary is not None or not _starts_from_previous(run.config):
                own = _own_run(run, checkpoint, None if before is None else before.dictionary)
                # A layer that the checkpoint does not have is told here, before any SAE is trained.
                with named(checkpoint, self.name, FunctokError):
                    dictionary = own.result(DICTIONARIES)[0] if own.is_finished(DICTIONARIES) else None
            units.append(
                GrowthUnit(
                    top="growth",
                    inputs=None if dictionary is None else _inputs(run, checkpoint, dictionary, parts),
                    about=f"SAE of {checkpoint.series} at step {checkpoint.step}",
                    together=checkpoint.series if _starts_from_previous(run.config) else None,
                    checkpoint=checkpoint,
                    parts=parts,
                    place=f"{number} of {len(chosen)}",
                    own=own,
                    dictionary=dictionary,
                )
            )
        return units

    def finished(self, run: Run, units: Sequence[GrowthUnit]) -> Mapping[str, Manifest]:
        """Those that are judged and have their graph."""
        known = {unit.folder: unit for unit in units if unit.inputs is not None}
        # What they are counted from is asked for too, so that nobody takes it for garbage.
        counted = [unit.inputs["densities"] for unit in known.values() if unit.inputs is not None]
        there = load_all(run.storage, [*known, *counted])
        return {
            folder: there[folder]
            for folder, unit in known.items()
            if folder in there and unit.own is not None and unit.own.is_finished(FEATURES)
        }

    def make(self, run: Run, group: Sequence[GrowthUnit]) -> Iterator[Made]:
        """SAE, graph and judgement of a checkpoint, or of several of which each SAE starts from the one before."""
        dictionary: Dictionary | None = None
        for unit in group:
            checkpoint, tell = unit.checkpoint, _within(run.tell, f"{unit.about} ({unit.place})")
            with named(checkpoint, self.name, FunctokError):
                own = unit.own or _own_run(run, checkpoint, dictionary)
                [dictionary] = make(own, DICTIONARIES, tell)
                make(own, FEATURES, tell)
                known = replace(unit, inputs=_inputs(run, checkpoint, dictionary, unit.parts))
                if load(run.storage, known.folder) is None:
                    judged = make(run, Judging(checkpoint, dictionary, unit.parts), tell)
                    row = learned_row(growth_of(run.config), dictionary, judged)
                    yield Made.of(known, partial(_write, run.storage, known.folder, row), row)
            # Modules know each other in circles; the next checkpoint needs their memory.
            gc.collect()

    def result(self, run: Run, units: Sequence[GrowthUnit], done: Mapping[str, Manifest]) -> list[GrownSae]:
        """One for each selected checkpoint, series in order, steps ascending."""
        grown = []
        for unit in units:
            assert unit.own is not None
            assert unit.dictionary is not None
            features = unit.own.result(FEATURES)
            grown.append(
                GrownSae(
                    checkpoint=unit.checkpoint,
                    dictionary=unit.dictionary,
                    folder=unit.folder,
                    features=tuple(features),
                )
            )
        return grown

    def question(self, run: Run, result: list[GrownSae]) -> Question:
        """What the SAEs of checkpoints have learned, and the feature shards of each."""
        storage, growth = run.storage, growth_of(run.config)
        committed = load_all(
            storage, [folder for entry in result for folder in (entry.dictionary.folder, entry.folder)]
        )
        saes = [
            {
                **key_columns(entry.checkpoint),
                "folder": entry.folder,
                "dictionary_layer": entry.dictionary.layer,
                "d_sae": entry.dictionary.d_sae,
                "committed": {entry.dictionary.folder, entry.folder} <= set(committed),
                "configured_size": growth.train.d_sae,
                "configured_min": growth.min_density,
                "configured_max": growth.max_density,
            }
            for entry in result
        ]
        shards = [
            {**feature_row(feature), **key_columns(entry.checkpoint)}
            for entry in result
            for feature in entry.features
        ]

        def views() -> dict[str, pa.Table]:
            learned: list[dict[str, Any]] = []
            for sae in saes:
                found = verified.read_table(storage, f"{sae['folder']}/learned.parquet").to_pylist()
                learned += [{**sae, **row, "n_rows": len(found)} for row in found or [{}]]
            return {"learned": pa.Table.from_pylist(learned, schema=_LEARNED)}

        return Question(
            small={"wanted": wanted_series(run.config)},
            of={"saes": saes, "shards": shards},
            views=views,
            folders=lambda: {
                feature.folder: stored_feature_views(feature, entry.dictionary.d_sae)
                for entry in result
                for feature in entry.features
            },
            totals=FEATURE_TOTALS,
            rows=lambda: shards,
            manifests=lambda: load_all(storage, [shard["folder"] for shard in shards]),
        )

    def shown(self, run: Run, result: list[GrownSae]) -> Iterable[Shown]:
        """What each checkpoint's SAE has learned, with its quality beside the count."""
        rows = [
            {
                **key_columns(entry.checkpoint),
                **verified.read_table(run.storage, f"{entry.folder}/learned.parquet").to_pylist()[0],
            }
            for entry in result
        ]
        yield Shown(name="learned-features", description="Learned features by checkpoint", rows=rows)


GROWTH = Growth()

_LEARNED = pa.schema(
    [
        *declared(
            "model VARCHAR, step BIGINT, folder VARCHAR, dictionary_layer INTEGER, d_sae BIGINT, committed BOOLEAN, "
            "configured_size BIGINT, configured_min DOUBLE, configured_max DOUBLE, n_rows BIGINT"
        ),
        *SHARD_FILES["learned"],
    ]
)


def selected(config: Config, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints that get an SAE, series in order, steps ascending.

    Of each series `growth.checkpoints`, spread evenly over those it has from the first to the last (one alone is the
    last; a series with fewer gives all), or those at exactly `growth.steps`.

    Raises:
        ConfigError: if a series has no checkpoint at a step that is asked for.
    """
    growth = growth_of(config)
    by_series: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        by_series.setdefault(checkpoint.series, []).append(checkpoint)
    chosen: list[Checkpoint] = []
    for series, found in by_series.items():
        own = sorted(found, key=lambda checkpoint: checkpoint.step)
        if growth.steps is None:
            chosen += [own[index] for index in _spread(len(own), growth.checkpoints)]
            continue
        at = {checkpoint.step: checkpoint for checkpoint in own}
        lacking = [step for step in growth.steps if step not in at]
        if lacking:
            raise ConfigError(
                f"consolidation.growth.steps: series {series} has no checkpoint at step "
                f"{', '.join(map(str, lacking))}; it has them at {', '.join(map(str, at))}",
                hint="choose among those, or give growth.checkpoints, a number, instead",
                stage="growth",
            )
        chosen += [at[step] for step in sorted(set(growth.steps))]
    return chosen


def judging_parts(config: Config, storage: Storage, shards: CorpusShards) -> tuple[HeldoutPart, ...]:
    """The documents that judge the SAEs: held out, in file order, up to `growth.max_tokens` tokens.

    No SAE is trained on documents that consolidation holds out, unless it holds out all of them, as for public
    series. Then those that the SAEs are trained on, and copies of them, are left out here.

    Raises:
        CorpusError: if no document is left.
    """
    growth = growth_of(config)
    if leaves_out(config):
        return heldout_parts(config, storage, shards, growth.max_tokens)
    trained_on = training_parts(config, storage, shards, growth.train)
    known = document_hashes(storage, [part.shard for part in trained_on])
    lengths = [of[: part.n_documents] for part, (_, of) in zip(trained_on, known, strict=True)]
    taken = n_documents_within([of[of > 0].tolist() for of in lengths], growth.train.max_tokens)
    seen = np.concatenate(
        [hashes[: len(of)][of > 0][:n] for (hashes, _), of, n in zip(known, lengths, taken, strict=True)]
    )
    if all(np.isin(hashes[of > 0], seen).all() for hashes, of in document_hashes(storage, shards.shards)):
        raise CorpusError(
            f"the SAEs of consolidation.growth are trained on all {shards.n_documents:,} documents: none is left "
            "to judge them",
            hint="lower consolidation.growth.train.max_tokens or consolidation.heldout_share",
        )
    return heldout_parts(config, storage, shards, growth.max_tokens, seen)


def growth_of(config: Config) -> Section:
    """The section `consolidation.growth`."""
    growth = consolidation_of(config).growth
    assert growth is not None
    return growth


def _starts_from_previous(config: Config) -> bool:
    return growth_of(config).start == "previous"


def _own_run(run: Run, checkpoint: Checkpoint, previous: Dictionary | None) -> Run:
    """The run on which the spine makes a checkpoint's SAE and graph, of the same corpus."""
    entry = _entry(run, checkpoint, previous)
    return run.under(config_of(run.config, checkpoint).model_copy(update={"sae": [entry]}), TOKENIZE)


def _entry(run: Run, checkpoint: Checkpoint, previous: Dictionary | None) -> Sae:
    growth = growth_of(run.config)
    train = growth.train
    if growth.start == "previous" and previous is not None:
        train = train.model_copy(update={"start_from": run.storage.url(previous.folder)})
    return Sae(layer=growth.layer if checkpoint.layer is None else checkpoint.layer, train=train)


def _inputs(
    run: Run, checkpoint: Checkpoint, dictionary: Dictionary, parts: Sequence[HeldoutPart]
) -> dict[str, Any]:
    growth = growth_of(run.config)
    [counted] = Judging(checkpoint, dictionary, parts).units(run)
    return {
        "version": VERSION,
        "densities": counted.folder,
        "min_density": growth.min_density,
        "max_density": growth.max_density,
    }


def _write(storage: Storage, folder: str, row: Mapping[str, Any]) -> list[StoredFile]:
    table = pa.Table.from_pylist([dict(row)], schema=SHARD_FILES["learned"])
    return [storage.write_parquet(f"{folder}/learned.parquet", table)]


def _spread(n: int, wanted: int) -> list[int]:
    """Indices of `wanted` of n things in equal distances, first and last among them; one alone is the last."""
    if wanted == 1:
        return [n - 1]
    if wanted >= n:
        return list(range(n))
    return [(2 * i * (n - 1) + wanted - 1) // (2 * (wanted - 1)) for i in range(wanted)]


def _within(progress: Progress, where: str) -> Progress:
    return lambda done, total, what: progress(done, total, f"{where}: {what}")
