"""The stage `retention_gate`: a learned gate for STR (`tasks.retention.gate`), from documents nobody is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from infra import verified
from infra.manifest import Manifest
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import about
from schemas.retention import work
from schemas.retention.section import Retention, retention_of
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Stage, Unit
from tasks.models.devices import device_client, settle
from tasks.models.model import model_key
from tasks.retention.gate import train_gate
from tasks.retention.loaded import forget_loaded, loaded_model, sequence_tokens
from tasks.retention.policies import SIGNALS, Gate
from tasks.retention.sequences import training_sequences
from tasks.retention.setups import protection_of

VERSION = 1

_BIAS = "bias"
_COLUMNS = (*SIGNALS, _BIAS)


@dataclass(frozen=True, kw_only=True, eq=False)
class GateUnit(Unit):
    """The gate of a run.

    Attributes:
        sequences: What it is trained on.
        shards: The tokenized corpus.
        model_key: Key of the model that the work was planned for.
    """

    sequences: tuple[work.Sequence, ...]
    shards: CorpusShards
    model_key: str


class Gates(Stage[GateUnit, str | None]):
    """The learned gate; its result is its folder, or None where no policy has one."""

    name = "retention_gate"
    things = "gates"
    libraries = ("torch", "transformers")
    tops = ("retention_gate",)
    needs = (TOKENIZE,)

    def applies(self, config: Config) -> bool:
        """Where any policy has one."""
        section = config.section(Retention)
        return section is not None and section.trains_gate

    def units(self, run: Run) -> Sequence[GateUnit]:
        """One, or none.

        Raises:
            CorpusError: if the documents that are not held out do not fill a sequence.
        """
        if not self.applies(run.config):
            return []
        config, storage, shards = run.config, run.storage, run.result(TOKENIZE)
        section = retention_of(config)
        with about(stage=self.name):
            sequences = training_sequences(
                config, storage, shards, section.gate_length, section.gate_sequences
            )
        key = model_key(config.model, storage)
        return [
            GateUnit(
                top="retention_gate",
                inputs={
                    "version": VERSION,
                    "sequences": [sequence.key for sequence in sequences],
                    "model": key,
                    "tokenizer": shards.tokenizer_key,
                    "eos": shards.eos_id,
                    "bos": config.windows.prepend_bos,
                    "sinks": section.sinks,
                    "recent": section.recent,
                    "chunk": section.chunk,
                },
                about=f"a gate from {len(sequences)} sequences of {section.gate_length:,} tokens",
                size=len(sequences),
                sequences=tuple(sequences),
                shards=shards,
                model_key=key,
            )
        ]

    def prepare(self, run: Run, missing: Sequence[GateUnit]) -> Sequence[GateUnit]:
        """Decide the number format."""
        settle(run.config.model, run.storage)
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[GateUnit]]) -> AbstractContextManager[Any]:
        """Here, or on a cluster."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[GateUnit]) -> Iterator[Made]:
        """Train it."""
        config, storage, section = run.config, run.storage, retention_of(run.config)
        for unit in group:
            model = loaded_model(config.model, storage, unit.model_key)
            sequences = (
                torch.from_numpy(sequence_tokens(config, storage, unit.shards, sequence).ids)[None]
                for sequence in unit.sequences
            )
            with about(stage=self.name):
                gate, explained = train_gate(
                    model, sequences, protection=protection_of(section), chunk=section.chunk
                )
            yield Made.of(unit, partial(_write, storage, unit, gate, explained))

    def close(self) -> None:
        """Free the model."""
        forget_loaded()

    def result(self, run: Run, units: Sequence[GateUnit], done: Mapping[str, Manifest]) -> str | None:
        """Its folder."""
        return units[0].folder if units else None

    def question(self, run: Run, result: str | None) -> Question | None:
        """Its weights."""
        if result is None:
            return None
        name = file_of(result)
        return Question(
            of={"folder": result}, views=lambda: {"gate_weights": verified.read_table(run.storage, name)}
        )


GATES = Gates()


def file_of(folder: str) -> str:
    """The file of a gate's weights."""
    return f"{folder}/gate_weights.parquet"


def read_gate(storage: Storage, folder: str) -> Gate:
    """A gate as it was trained; rows of layers that have none are NaN."""
    table = verified.read_table(storage, file_of(folder)).to_pydict()
    layer, head = np.array(table["layer"]), np.array(table["head"])
    weights = np.full((layer.max() + 1, head.max() + 1, len(_COLUMNS)), np.nan, np.float32)
    place = [_COLUMNS.index(signal) for signal in table["signal"]]
    weights[layer, head, place] = np.array(table["weight"], dtype=np.float32)
    return Gate(weights=torch.from_numpy(weights))


def _write(storage: Storage, unit: GateUnit, gate: Gate, explained: torch.Tensor) -> list[StoredFile]:
    rows = [
        {
            "layer": layer,
            "head": head,
            "signal": signal,
            "weight": float(gate.weights[layer, head, place]),
            "explained": float(explained[layer, head]),
        }
        for layer in range(gate.weights.shape[0])
        for head in range(gate.weights.shape[1])
        if not bool(gate.weights[layer, head].isnan().any())
        for place, signal in enumerate(_COLUMNS)
    ]
    return [
        storage.write_parquet(
            file_of(unit.folder), pa.Table.from_pylist(rows, schema=SHARD_FILES["gate_weights"])
        )
    ]
