"""A small finished consolidation made of plain values: two series of two checkpoints over three token shards.

The third shard stands for a corpus file equal to the first, so its folders stand twice. Tests of what reads such a
run change a frame (`run.token_losses["small", 1, 0]`) or a value (`run.checkpoints`) before `run.write(storage)`.
Only places 0 and 1 have frames of their own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from builders import (
    Cut,
    Document,
    commit_found,
    make_dictionary,
    random_documents,
    run_of,
    write_corpus,
    write_features,
)

from infra.catalog import Catalog
from infra.manifest import Manifest
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.pretraining.work import Checkpoint, GeneratedTexts, GrownSae, LossShard
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, FeatureShard, HeldoutPart
from tasks import pretraining
from tasks.corpus.heldout import heldout_parts
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Stage
from tasks.engine.tables import candidate
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.generations import GENERATIONS
from tasks.pretraining.growth import GROWTH
from tasks.pretraining.losses import LOSSES, file_of
from tasks.pretraining.tables import CONSOLIDATION, training_losses

SERIES, STEPS, LAYER, D_SAE, WINDOW = ("small", "large"), (1, 10), 1, 300, 7
PROMPTS = ("The", "In 1999,")
UNIT = 2**32

Key = tuple[str, int]
Place = tuple[str, int, int]


@dataclass
class ConsolidationRun:
    """What the checkpoint stages hand on, by (series, step) or (series, step, place), and the corpus under it."""

    config: Config
    documents: list[list[Document]]
    shards: CorpusShards
    parts: tuple[HeldoutPart, ...]
    checkpoints: list[Checkpoint] = field(default_factory=list)
    token_losses: dict[Place, pd.DataFrame] = field(default_factory=dict)
    document_losses: dict[Place, pd.DataFrame] = field(default_factory=dict)
    losses: list[LossShard] = field(default_factory=list)
    features: dict[Place, dict[str, pd.DataFrame]] = field(default_factory=dict)
    learned: dict[Key, pd.DataFrame] = field(default_factory=dict)
    grown: list[GrownSae] = field(default_factory=list)
    texts: dict[Key, pd.DataFrame] = field(default_factory=dict)
    generated: list[GeneratedTexts] = field(default_factory=list)
    training: pd.DataFrame = field(default_factory=pd.DataFrame)

    def write(self, storage: Storage) -> Run:
        """Write and commit every folder; the run of which they are."""
        for (model, step, place), frame in self.token_losses.items():
            frame = frame if self._keeps_tokens else self.document_losses[model, step, place]
            _write(storage, self._loss_folder(model, step, place), {file_of(self.config): frame})
        for (model, step, place), frames in self.features.items():
            _write(storage, feature_folder(model, step, place), frames)
        for (model, step), frame in self.learned.items():
            _write(storage, f"growth/{model}-{step}", {"learned": frame})
            storage.write_bytes(f"dictionaries/{model}-{step}/sae_weights.safetensors", b"weights")
            commit_found(storage, f"dictionaries/{model}-{step}", Manifest(stage="dictionaries", inputs={}))
        for (model, step), frame in self.texts.items():
            _write(storage, f"generations/{model}-{step}", {"generations": frame})
        for file in training_losses(self.on(storage)).values():
            storage.write_parquet(file, _table(self.training, "training_losses"))
            commit_found(storage, file.rpartition("/")[0], Manifest(stage="test", inputs={}))
        for checkpoint in self.checkpoints:
            folder = checkpoint.model.name.removeprefix("storage:")
            storage.write_bytes(f"{folder}/model.safetensors", b"weights")
            commit_found(storage, folder, Manifest(stage="checkpoints", inputs={}))
        return self.on(storage)

    def on(self, storage: Storage, first: int | None = None, **changed: Any) -> Run:
        """The run as it is now.

        Args:
            storage: Where it was written.
            first: Of the first checkpoints alone, so many.
            changed: What stages return, by their names, where it is something else.
        """
        kept = self.checkpoints[:first]
        results: dict[Stage[Any, Any], Any] = {
            CHECKPOINTS: kept,
            LOSSES: self.stored_losses,
            GROWTH: self.grown,
            GENERATIONS: self.generated,
        }
        of_kept = {
            stage: [one for one in result if first is None or getattr(one, "checkpoint", one) in kept]
            for stage, result in results.items()
        }
        given = {stage: changed.get(stage.name, result) for stage, result in of_kept.items()}
        return run_of(self.config, storage, {TOKENIZE: self.shards, **given})

    @property
    def stored_losses(self) -> list[LossShard]:
        """The loss shards with their folders."""
        return [
            replace(loss, folder=self._loss_folder(*key_of(loss.checkpoint), place_of(self, loss.part)))
            for loss in self.losses
        ]

    @property
    def _keeps_tokens(self) -> bool:
        return file_of(self.config) == "token_losses"

    def _loss_folder(self, model: str, step: int, place: int) -> str:
        return f"losses/{'tokens' if self._keeps_tokens else 'sums'}-{model}-{step}-{place}"


def corpus_tables() -> CorpusTables:
    """The corpus' group, as a run with checkpoint series has it."""
    return CorpusTables([pretraining.facts])


def built(run: Run) -> Catalog:
    """The candidate of a run's tables, but for a graph's."""
    return candidate(run.storage, [group.build(run) for group in (corpus_tables(), CONSOLIDATION)])


def key_of(checkpoint: Checkpoint) -> Key:
    return checkpoint.series, checkpoint.step


def place_of(run: ConsolidationRun, part: HeldoutPart) -> int:
    """0 or 1: which token shard's frames are a part's."""
    folders = list(dict.fromkeys(shard.folder for shard in run.shards.shards))
    return folders.index(part.shard.folder)


def feature_folder(model: str, step: int, place: int) -> str:
    return f"features/{model}-{step}-{place}"


PUBLIC: dict[str, Any] = {
    "series": [{"name": name, "folder": f"/{name}"} for name in SERIES],
    "heldout_share": 0.5,
}
"""Series that others have trained, and nothing asked of them but losses."""


def consolidation_config(storage: Storage, **sections: Any) -> Config:
    """A configuration of two series that are trained here, with everything that can be asked of them."""
    shape = {"hidden_size": 16, "layers": LAYER + 1, "heads": 2}
    return Config.model_validate(
        {
            "corpus": {"urls": ["a.jsonl", "b.jsonl", "c.jsonl"]},
            "model": {"name": "tiny"},
            "windows": {"context_size": WINDOW + 1},
            "graph": {"rarefaction_m": 5},
            "losses": {"resamples": 200},
            "consolidation": {
                "series": [
                    {"name": name, "shape": {**shape, "hidden_size": 16 * size}}
                    for size, name in enumerate(SERIES, start=1)
                ],
                "train": {"tokens": 192, "batch_tokens": 64},
                "heldout_share": 0.5,
                "growth": {"layer": LAYER, "train": {"d_sae": D_SAE, "k": 2}},
                "generations": {"prompts": list(PROMPTS), "seed": 3},
            },
            "storage": {"root": storage.root},
            **sections,
        }
    )


def consolidation_run(storage: Storage, seed: int = 0, **sections: Any) -> ConsolidationRun:
    """The run, valid; its token shards are written."""
    config = consolidation_config(storage, **sections)
    documents = random_documents(seed, 24, layers=())
    groups = [documents[:14], documents[14:]]
    cuts = [
        Cut(source=source, documents=groups[place], in_graph=9)
        for source, place in (("a.jsonl", 0), ("b.jsonl", 1), ("c.jsonl", 0))
    ]
    shards = write_corpus(storage, cuts)
    for folder in {shard.folder for shard in shards.shards}:
        stats = {"n_records": sum(s.n_documents + 1 for s in shards.shards if s.folder == folder)}
        commit_found(storage, folder, Manifest(stage="test", inputs={}, stats=stats))
    run = ConsolidationRun(
        config=config,
        documents=groups,
        shards=shards,
        parts=heldout_parts(config, storage, shards, None),
    )
    function = function_tokens(run)
    run.training = pd.DataFrame(
        {
            "step": [1, 2, 3],
            "tokens": [64, 128, 192],
            "loss": [6.0, 5.5, 5.25],
            "learning_rate": 1e-3,
            "gradient_norm": 1.0,
        }
    )
    for model in SERIES:
        for step in STEPS:
            _add_checkpoint(storage, run, model, step, function, cuts)
    return run


def function_tokens(run: ConsolidationRun) -> set[int]:
    """The shortest prefix of the ranking that has two fifths of all occurrences."""
    tokens = [token for place in (0, 1, 0) for document in run.documents[place] for token in document.tokens]
    counts = pd.Series(tokens).value_counts()
    ranked = sorted(counts.index, key=lambda token: (-counts[token], token))
    before, found = 0, set()
    for token in ranked:
        if 5 * before < 2 * len(tokens):
            found.add(int(token))
        before += int(counts[token])
    return found


def _add_checkpoint(
    storage: Storage, run: ConsolidationRun, model: str, step: int, function: set[int], cuts: list[Cut]
) -> None:
    number = SERIES.index(model) * len(STEPS) + STEPS.index(step)
    rng = np.random.default_rng(number)
    checkpoint = Checkpoint(
        series=model,
        step=step,
        model=Model(name=f"storage:checkpoints/{model}-{step}", tokenizer="tiny"),
        key=f"{model}-{step}",
        layer=LAYER,
        tokens=64 * step,
        parameters=1000 * (SERIES.index(model) + 1),
    )
    run.checkpoints.append(checkpoint)
    for part in run.parts:
        place = place_of(run, part)
        if (model, step, place) not in run.token_losses:
            tokens = _losses_of(run.documents[place], part.documents, rng)
            run.token_losses[model, step, place] = tokens
            run.document_losses[model, step, place] = _sums_of(tokens, function)
        run.losses.append(
            LossShard(
                checkpoint=checkpoint,
                part=part,
                folder="given by results",
                n_predictions=len(run.token_losses[model, step, place]),
            )
        )
    dictionary = replace(
        make_dictionary(LAYER, D_SAE, key=f"{model}{step}-"), folder=f"dictionaries/{model}-{step}"
    )
    active = random.Random(number)
    graph = [
        replace(cut, documents=[_activated(document, active) for document in cut.documents])
        for cut in cuts[:2]
    ]
    made = write_features(storage, [*graph, graph[0]], run.shards, [dictionary])
    features: list[FeatureShard] = []
    for feature in sorted(made, key=lambda feature: feature.part.shard.doc_offset):
        place = [shard.folder for shard in run.shards.shards].index(feature.part.shard.folder)
        run.features[model, step, place] = {
            name: storage.read_parquet(f"{feature.folder}/{name}.parquet").to_pandas()
            for name in ("activations", "edges", "counts")
        }
        features.append(replace(feature, folder=feature_folder(model, step, place)))
    run.learned[model, step] = pd.DataFrame(
        [
            {
                "layer": LAYER,
                "dictionary_size": D_SAE,
                "learned_features": 10 + number,
                "l0": 1.5,
                "explained_variance": 0.75,
                "ce_recovered": 0.5,
                "alive_features": 20 + number,
                "dense_features": 2,
                "ce": 4.0,
                "ce_sae": 5.0,
                "ce_zero": 6.0,
                "heldout_tokens": 500,
                "min_density": 1e-4,
                "max_density": 0.1,
            }
        ]
    )
    run.grown.append(
        GrownSae(
            checkpoint=checkpoint,
            dictionary=dictionary,
            folder=f"growth/{model}-{step}",
            features=tuple(features),
        )
    )
    run.texts[model, step] = pd.DataFrame(
        [
            {"prompt": prompt, "continuation": f" {mode} {step}", "mode": mode, "seed": seed}
            for prompt in PROMPTS
            for mode, seed in (("greedy", None), ("sampled", 3))
        ]
    ).astype({"seed": "Int64"})
    run.generated.append(GeneratedTexts(checkpoint=checkpoint, folder=f"generations/{model}-{step}"))


def _losses_of(documents: list[Document], heldout: tuple[int, ...], rng: np.random.Generator) -> pd.DataFrame:
    """A loss for each token that has one before it in its window; some so small that 2^-32 rounds them."""
    rows = [
        {
            "doc": doc,
            "position": position,
            "current_token_id": documents[doc].tokens[position - 1],
            "token_id": documents[doc].tokens[position],
        }
        for doc in heldout
        for position in range(1, len(documents[doc].tokens))
        if position % WINDOW
    ]
    frame = pd.DataFrame(rows)
    loss = rng.exponential(3, len(rows)) * np.where(rng.random(len(rows)) < 0.2, 1e-9, 1)
    halves = (rng.integers(0, 9, len(rows)) + 0.5) / UNIT
    return frame.assign(loss=np.where(rng.random(len(rows)) < 0.1, halves, loss).astype(np.float32))


def _sums_of(tokens: pd.DataFrame, function: set[int]) -> pd.DataFrame:
    """What the losses stage writes where single losses are not kept."""
    kinds = tokens.assign(
        current_is_function=tokens.current_token_id.isin(function),
        next_is_function=tokens.token_id.isin(function),
        loss_units=np.rint(tokens.loss.astype(np.float64) * UNIT).astype(np.int64),
    )
    return (
        kinds.groupby(["doc", "current_is_function", "next_is_function"])
        .agg(n=("loss", "size"), loss_units=("loss_units", "sum"))
        .reset_index()
    )


def _activated(document: Document, rng: random.Random) -> Document:
    active = [
        {
            rng.randrange(D_SAE) // 2 * (1 + token % 2): rng.randrange(1, 99) / 8
            for _ in range(rng.randrange(4))
        }
        for token in document.tokens
    ]
    return Document(tokens=document.tokens, active={LAYER: active})


def _write(storage: Storage, folder: str, frames: dict[str, pd.DataFrame]) -> None:
    for name, frame in frames.items():
        storage.write_parquet(f"{folder}/{name}.parquet", _table(frame, name))
    commit_found(storage, folder, Manifest(stage="test", inputs={}))


def _table(frame: pd.DataFrame, name: str) -> pa.Table:
    schema = SHARD_FILES[name]
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
