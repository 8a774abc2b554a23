"""Which tables a consolidation has (PAPER 1.4), and under which names: known before any of them is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.addresses import without_credentials
from infra.duck import Catalog, ShardFile
from infra.manifest import content_key
from schemas.config import Config
from schemas.pretraining.section import losses_of
from schemas.pretraining.work import Checkpoint, GeneratedTexts, GrownSae, LossShard
from schemas.work import CorpusShards
from tasks.engine.table_plan import CONSOLIDATION_TABLES, VERSION, Group, corpus_group
from tasks.graph.edges import edge_folder


@dataclass(frozen=True, kw_only=True)
class ConsolidationResults:
    """What the checkpoint stages have made.

    Attributes:
        checkpoints: All of them, series in the configuration's order, steps ascending.
        losses: The loss shards of each.
        growth: The SAEs of the selected ones; none where no SAE series is asked for.
        generations: The continuations of each; none where none are asked for.
        training_losses: Series that were trained here, to the file of their training's losses.
    """

    checkpoints: Sequence[Checkpoint]
    losses: Sequence[LossShard]
    growth: Sequence[GrownSae] = ()
    generations: Sequence[GeneratedTexts] = ()
    training_losses: dict[str, str] = field(default_factory=dict)


def consolidation_group(config: Config, shards: CorpusShards, results: ConsolidationResults) -> Group:
    """The tables of a consolidation."""
    corpus = corpus_group(config, shards).key
    by_checkpoint = loss_files(config, results)
    losses = [file for files in by_checkpoint.values() for file in files]
    sharded = {
        "document_losses": [
            ShardFile(
                name=f"{document_losses_folder(corpus, files)[0]}/document_losses.parquet",
                model=model,
                step=step,
            )
            for (model, step), files in by_checkpoint.items()
        ]
    }
    inputs: dict[str, list[ShardFile]] = {}
    if losses_of(config).keep_tokens:
        sharded["token_losses"] = losses
    else:
        inputs["shard_document_losses"] = losses
    if results.growth:
        for table in ("checkpoint_degree", "checkpoint_graph"):
            sharded[table] = [
                _file_of(grown.checkpoint, f"{graph_folder(config, corpus, grown)[0]}/{table}.parquet")
                for grown in results.growth
            ]
        inputs["learned_features"] = [
            _file_of(grown.checkpoint, f"{grown.folder}/learned.parquet") for grown in results.growth
        ]
    if results.generations:
        inputs["generations"] = [
            _file_of(made.checkpoint, f"{made.folder}/generations.parquet") for made in results.generations
        ]
    if results.training_losses:
        inputs["training_losses"] = [
            ShardFile(name=name, model=series) for series, name in results.training_losses.items()
        ]
    parts: dict[str, Any] = {
        "group": "consolidation",
        "version": VERSION,
        "corpus": corpus,
        "checkpoints": checkpoint_rows(results.checkpoints),
        "resamples": losses_of(config).resamples,
        "window": window_of(config),
        "m": config.graph.rarefaction_m,
        "files": {
            table: [[file.model, file.step, file.name, file.doc_offset] for file in files]
            for table, files in (inputs | sharded).items()
        },
    }
    key = content_key(**parts)
    gathered = [table for table in CONSOLIDATION_TABLES if table in inputs]
    return Group(
        name="consolidation",
        key=key,
        key_parts=parts,
        tables={
            table: f"tables/consolidation-{key}/{table}.parquet"
            for table in ("checkpoints", "loss_buckets", *gathered)
        },
        sharded=sharded,
        inputs=Catalog(sharded=inputs),
    )


def loss_files(config: Config, results: ConsolidationResults) -> dict[tuple[str, int], list[ShardFile]]:
    """Each checkpoint's files of losses, in corpus order: of single ones where these are kept, else of sums."""
    name = "token_losses" if losses_of(config).keep_tokens else "document_losses"
    files: dict[tuple[str, int], list[ShardFile]] = {}
    for loss in sorted(results.losses, key=lambda loss: loss.part.shard.doc_offset):
        model, step = loss.checkpoint.series, loss.checkpoint.step
        files.setdefault((model, step), []).append(
            ShardFile(
                name=f"{loss.folder}/{name}.parquet",
                doc_offset=loss.part.shard.doc_offset,
                model=model,
                step=step,
            )
        )
    order = [(checkpoint.series, checkpoint.step) for checkpoint in results.checkpoints]
    return {checkpoint: files[checkpoint] for checkpoint in order if checkpoint in files}


def document_losses_folder(corpus: str, files: Sequence[ShardFile]) -> tuple[str, dict[str, Any]]:
    """The folder of one checkpoint's losses by document, and what its key is made of."""
    parts: dict[str, Any] = {
        "group": "document_losses",
        "version": VERSION,
        "corpus": corpus,
        "losses": [[file.name, file.doc_offset] for file in files],
    }
    return f"tables/document_losses-{content_key(**parts)}", parts


def graph_folder(config: Config, corpus: str, grown: GrownSae) -> tuple[str, dict[str, Any]]:
    """The folder of one checkpoint's degrees and graph, and what its key is made of."""
    parts: dict[str, Any] = {
        "group": "checkpoint_graph",
        "version": VERSION,
        "corpus": corpus,
        "edges": edge_folder(grown.dictionary.layer, grown.features)[0],
        "dictionary_size": grown.dictionary.d_sae,
        "m": config.graph.rarefaction_m,
    }
    return f"tables/checkpoint_graph-{content_key(**parts)}", parts


def checkpoint_rows(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """The rows of the table `checkpoints`."""
    return [
        {
            "model": checkpoint.series,
            "step": checkpoint.step,
            "source": " ".join(
                part
                for part in (without_credentials(checkpoint.model.name), checkpoint.model.revision)
                if part is not None
            ),
            "tokens": checkpoint.tokens,
            "parameters": checkpoint.parameters,
        }
        for checkpoint in checkpoints
    ]


def window_of(config: Config) -> int:
    """Tokens of a document that a window holds: at multiples of it, another window begins."""
    return config.windows.context_size - int(config.windows.prepend_bos)


def _file_of(checkpoint: Checkpoint, name: str) -> ShardFile:
    return ShardFile(name=name, model=checkpoint.series, step=checkpoint.step)
