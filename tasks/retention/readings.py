"""The stage `retention`: held-out sequences read under every policy, budget and protocol (PAPER 2).

A unit is one sequence under one setup. What a sequence still lacks is made in one go, in lockstep with one full run:
a policy that is added reads alone beside it, and a sequence that is added is read under all. Sequences go to devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from infra.manifest import Manifest, content_key
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import FunctokError, about
from schemas.retention import work
from schemas.retention.section import Retention, retention_of
from schemas.retention.work import ReadSequence, Setup
from schemas.work import CorpusShards
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.offenders import Views
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Shown, Stage, Unit
from tasks.models.devices import device_client, settle
from tasks.models.model import model_key
from tasks.report.text import plural
from tasks.retention.gates import GATES, read_gate
from tasks.retention.loaded import forget_loaded, function_mask, loaded_model, sequence_tokens
from tasks.retention.measures import FILES, measure
from tasks.retention.retrieval import check_prompts
from tasks.retention.sequences import heldout_sequences
from tasks.retention.setups import has_gate, policy_key, settings_of, setups

VERSION = 2
"""Raise when the same inputs give other files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadingUnit(Unit):
    """One sequence under one setup.

    Attributes:
        setup: The setup.
        sequence: The sequence.
        shards: Those of the tokenized corpus that its pieces are of.
        model_key: Key of the model that the work was planned for.
        function_ids: (n,) function tokens.
        gate: Folder of the learned gate, where the policy has one.
    """

    setup: Setup
    sequence: work.Sequence
    shards: CorpusShards
    model_key: str
    function_ids: npt.NDArray[Any]
    gate: str | None


class Readings(Stage[ReadingUnit, list[ReadSequence]]):
    """What forgetting does to the reading of held-out text."""

    name = "retention"
    measure = "tokens, retention"
    things = "readings"
    changed = "sequences, policies or budgets are new, or how they are read changed"
    libraries = ("torch", "transformers")
    tops = ("retention",)
    needs = (TOKENIZE, GATES)

    def applies(self, config: Config) -> bool:
        """Where the section is there."""
        return config.section(Retention) is not None

    def refuse(self, config: Config) -> FunctokError:
        """There is no section."""
        return FunctokError(
            "this configuration has no retention section",
            stage=self.name,
            hint="add [retention]; configs/retention.toml shows one",
        )

    def subject(self, config: Config) -> str:
        """The policies."""
        section = config.section(Retention)
        return "" if section is None else ", ".join(section.policies)

    def units(self, run: Run) -> Sequence[ReadingUnit]:
        """A unit a sequence and setup: lengths as configured, sequences in corpus order.

        Raises:
            CorpusError: if no document is held out, or all do not fill a sequence.
        """
        config, storage, shards = run.config, run.storage, run.result(TOKENIZE)
        section, gate = retention_of(config), run.result(GATES)
        ids = function_token_ids(config, storage, shards)
        common = reading_key(config, storage, shards)
        function_key = content_key(ids=ids.tolist())
        by_folder = {shard.folder: shard for shard in shards.shards}
        units = []
        for entry in section.sequences:
            with about(stage=self.name):
                found = heldout_sequences(config, storage, shards, entry.length, entry.documents)
            for place, sequence in enumerate(found):
                folders = dict.fromkeys(piece.folder for piece in sequence.pieces)
                # A worker gets them with each unit: not all of a corpus.
                own_shards = replace(shards, shards=tuple(by_folder[folder] for folder in folders))
                for setup in setups(section):
                    if setup.length == entry.length:
                        own_gate = gate if has_gate(section, setup.policy) else None
                        units.append(
                            ReadingUnit(
                                top="retention",
                                inputs={
                                    "version": VERSION,
                                    "sequence": sequence.key,
                                    "function_tokens": function_key,
                                    **common,
                                    **setup_key(section, setup, own_gate),
                                    "layers_every": section.layers_every,
                                },
                                about=f"sequence {place + 1} of {sequence.length:,} tokens: {setup.policy}"
                                f" at {setup.budget:g}, {setup.protocol}",
                                size=sequence.length,
                                together=sequence,
                                setup=setup,
                                sequence=sequence,
                                shards=own_shards,
                                model_key=common["model"],
                                function_ids=ids,
                                gate=own_gate,
                            )
                        )
        return units

    def lines(self, missing: Sequence[ReadingUnit]) -> Sequence[str]:
        """A line a setup, with how many sequences it lacks."""
        counts: dict[Setup, int] = {}
        for unit in missing:
            counts[unit.setup] = counts.get(unit.setup, 0) + 1
        return [
            f"{setup.policy} at {setup.budget:g}, {setup.protocol}, {setup.length:,} tokens: {plural(n, 'sequence')}"
            for setup, n in counts.items()
        ]

    def prepare(self, run: Run, missing: Sequence[ReadingUnit]) -> Sequence[ReadingUnit]:
        """Decide the number format, and refuse now what would be refused once all is read: prompts that do not fit."""
        settle(run.config.model, run.storage)
        check_prompts(run.config, run.storage)
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[ReadingUnit]]) -> AbstractContextManager[Any]:
        """Several GPUs or a cluster: each worker reads whole sequences."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[ReadingUnit]) -> Iterator[Made]:
        """What one sequence lacks, in lockstep with one full run (or several: `retention.at_once`).

        Raises:
            ConfigError: if a budget has no room for what is protected.
            ModelError: if the model is not the one that was planned for or does not fit, or a loss is not finite.
        """
        config, storage, section = run.config, run.storage, retention_of(run.config)
        model = loaded_model(config.model, storage, group[0].model_key)
        first = group[0]
        tokens = sequence_tokens(config, storage, first.shards, first.sequence)
        mask = function_mask(first.function_ids, model.vocabulary)
        document = document_number(first.sequence)
        with about(stage=self.name):
            for start in range(0, len(group), section.at_once):
                some = group[start : start + section.at_once]
                settings = [
                    settings_of(
                        section, unit.setup, None if unit.gate is None else read_gate(storage, unit.gate)
                    )
                    for unit in some
                ]
                found = measure(
                    model, tokens, mask, settings, document=document, layers_every=section.layers_every
                )
                for unit, files in zip(some, found, strict=True):
                    yield Made.of(unit, partial(_write, storage, unit, files))

    def close(self) -> None:
        """Free the model."""
        forget_loaded()

    def result(
        self, run: Run, units: Sequence[ReadingUnit], done: Mapping[str, Manifest]
    ) -> list[ReadSequence]:
        """All readings, in the order of the units."""
        return [ReadSequence(setup=unit.setup, sequence=unit.sequence, folder=unit.folder) for unit in units]

    def question(self, run: Run, result: list[ReadSequence]) -> Question:
        """The readings, each of its folder and all together against the setups that are configured."""
        rows = reading_rows(result)
        wanted = [
            {
                "policy": setup.policy,
                "budget": setup.budget,
                "protocol": setup.protocol,
                "length": setup.length,
            }
            for setup in setups(retention_of(run.config))
        ]
        return Question(
            of={"readings": rows, "wanted": wanted},
            views=lambda: {"wanted": pa.Table.from_pylist(wanted, schema=_SETUP)},
            folders=lambda: {
                row["folder"]: Views(
                    folder=row["folder"],
                    files={name: f"{row['folder']}/{name}.parquet" for name in FILES},
                    columns={name: row[name] for name in ("folder", "policy", "protocol", "length")},
                )
                for row in rows
            },
            totals={"reading_sums": {"found_predictions": "coalesce(sum(n), 0)::BIGINT"}},
            rows=lambda: rows,
        )

    def shown(self, run: Run, result: list[ReadSequence]) -> Iterable[Shown]:
        """What was read."""
        counts: dict[Setup, int] = {}
        for reading in result:
            counts[reading.setup] = counts.get(reading.setup, 0) + 1
        yield Shown(
            name="retention",
            description="Sequences read under each policy",
            rows=[
                {
                    "policy": setup.policy,
                    "budget": setup.budget,
                    "protocol": setup.protocol,
                    "length": setup.length,
                    "sequences": n,
                }
                for setup, n in counts.items()
            ],
        )


READINGS = Readings()

_SETUP = pa.schema(
    [
        ("policy", pa.string()),
        ("budget", pa.float64()),
        ("protocol", pa.string()),
        ("length", pa.int64()),
    ]
)


def reading_key(config: Config, storage: Storage, shards: CorpusShards) -> dict[str, Any]:
    """What determines how any sequence is read: the model, the tokenizer, and the special tokens that are fed."""
    return {
        "model": model_key(config.model, storage),
        "tokenizer": shards.tokenizer_key,
        "eos": shards.eos_id,
        "bos": config.windows.prepend_bos,
    }


def setup_key(section: Retention, setup: Setup, gate: str | None) -> dict[str, Any]:
    """What determines a setup: not its name, but all that it means."""
    is_prefill = setup.protocol == "prefill"
    return {
        **policy_key(section, setup.policy, gate),
        "budget": setup.budget,
        "budget_of": section.budget_of,
        "prompt": section.prompt_of(setup.length) if is_prefill else None,
        "chunk": section.chunk,
        "sinks": section.sinks,
        "recent": section.recent,
        "seed": section.seed,
    }


def document_number(sequence: work.Sequence) -> int:
    """What random keys know a sequence by: its content, so that it has the same keys in any corpus."""
    return int(content_key(pieces=sequence.key)[:15], 16)


def reading_rows(readings: Sequence[ReadSequence]) -> list[dict[str, Any]]:
    """Readings as columns; `sequence` numbers the sequences of a length in their order."""
    numbers: dict[work.Sequence, int] = {}
    counts: dict[int, int] = {}
    for reading in readings:
        if reading.sequence not in numbers:
            length = reading.sequence.length
            numbers[reading.sequence] = counts.get(length, 0)
            counts[length] = numbers[reading.sequence] + 1
    return [
        {
            "folder": reading.folder,
            "sequence": numbers[reading.sequence],
            "policy": reading.setup.policy,
            "budget": reading.setup.budget,
            "protocol": reading.setup.protocol,
            "length": reading.setup.length,
        }
        for reading in readings
    ]


def _write(storage: Storage, unit: ReadingUnit, files: Mapping[str, pa.Table]) -> list[StoredFile]:
    return [storage.write_parquet(f"{unit.folder}/{name}.parquet", table) for name, table in files.items()]
