"""Which tables there would be, and under which names: known before any of them is made.

A group of tables has a key of everything that determines it, and every file lies in a folder named by such
a key, so two plans are equal exactly where their tables are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.addresses import without_credentials
from infra.duck import Catalog, ShardFile
from infra.manifest import content_key
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.tables import MEMBERS
from schemas.version import __version__
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.graph import power_law as powerlaw_fit

VERSION = 1
"""Raise when the SQL or what runs it changes what is in a table."""

CORPUS_TABLES = ("tokens", "run_info")
GRAPH_TABLES = ("dictionaries", "token_degree", "feature_degree", "coverage", "graph_summary")
"""In the order in which they are made."""

CONSOLIDATION_TABLES = ("checkpoints", "loss_buckets", "training_losses", "learned_features", "generations")
CHECKPOINT_TABLES = ("document_losses", "checkpoint_degree", "checkpoint_graph")
"""One file a checkpoint, so that one more leaves those of the others as they are."""

REACTIVATION_TABLES = ("prompt_tokens", "reactivations", "reactivation_positions", "reactivation_scores")
TRAIT_TABLES = ("trait_layers", "trait_features")
EXPERIMENT_TABLES = ("steering", "steering_effects")
"""In the order in which they are made."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of tables as it would be published.

    Attributes:
        name: `corpus`, `graph`, `consolidation` or `steering`.
        key: Content key of the whole group.
        key_parts: What the key is made of, readable.
        tables: Table to its file.
        sharded: Table to its shards' files.
        inputs: What its SQL reads that is not published.
        about: Of the group `corpus`: the run's model and dictionaries (`subject_of`).
    """

    name: str
    key: str
    key_parts: Mapping[str, Any]
    tables: dict[str, str]
    sharded: dict[str, list[ShardFile]]
    inputs: Catalog
    about: tuple[str, ...] = ()

    @property
    def made(self) -> list[str]:
        """The files that the table stage makes, the shards' own left out."""
        made = ("edges", *CHECKPOINT_TABLES)
        return [*self.tables.values(), *(file.name for table in made for file in self.sharded.get(table, []))]


def corpus_group(config: Config, shards: CorpusShards) -> Group:
    """The tables that counting gives."""
    parts: dict[str, Any] = {
        "group": "corpus",
        "version": VERSION,
        "shards": [
            [s.folder, without_credentials(s.source), s.doc_offset, s.n_documents] for s in shards.shards
        ],
        "tokenizer": shards.tokenizer_key,
        "vocabulary": shards.vocabulary,
        "share": config.function_tokens.share,
        "occurrences": config.corpus.keep_occurrences,
    }
    key = content_key(**parts)
    info = content_key(corpus=key, functok=__version__, shown=_shown(config))

    def files(name: str) -> list[ShardFile]:
        return [
            ShardFile(name=f"{shard.folder}/{name}.parquet", doc_offset=shard.doc_offset, source=shard.source)
            for shard in shards.shards
            # A shard without rejects has no file of them.
            if name != "rejects" or shard.n_rejects
        ]

    published = ["documents", "rejects"] + ["occurrences"] * config.corpus.keep_occurrences
    return Group(
        name="corpus",
        key=key,
        key_parts=parts,
        tables={
            "tokens": f"tables/corpus-{key}/tokens.parquet",
            "run_info": f"tables/run_info-{info}/run_info.parquet",
        },
        sharded={table: files(table) for table in published},
        inputs=Catalog(
            tables={"vocabulary": shards.vocabulary},
            sharded={"shard_token_counts": files("token_counts")},
        ),
        about=subject_of(config),
    )


def subject_of(config: Config) -> tuple[str, ...]:
    """What a run's tables are about: keys of its model, then of each of its dictionaries, as they are configured.

    The tokenizer is the corpus' own matter. What a dictionary must reach is no part of it; which residuals are read,
    and how, is where it is trained on them.
    """
    model = content_key(name=config.model.name, revision=config.model.revision)
    residuals = [
        config.windows.model_dump(),
        config.activations.model_dump(include={"max_documents", "max_tokens"}),
    ]
    return model, *sorted(
        content_key(
            sae=entry.model_dump(exclude={"train": {"gate"}, "allow_other_model": True}),
            residuals=residuals if entry.train is not None else [],
        )
        for entry in config.sae
    )


def graph_group(
    config: Config,
    shards: CorpusShards,
    features: Sequence[FeatureShard],
    dictionaries: Sequence[Dictionary],
    edges: Sequence[ShardFile],
) -> Group:
    """The tables of the token-feature graph, of which `edges` are there already."""
    ordered = sorted(features, key=lambda feature: (feature.layer, feature.part.shard.doc_offset))
    parts: dict[str, Any] = {
        "group": "graph",
        "version": [VERSION, powerlaw_fit.VERSION],
        "corpus": corpus_group(config, shards).key,
        "features": [[f.layer, f.folder, f.part.shard.doc_offset, f.part.n_documents] for f in ordered],
        "dictionaries": sorted([d.layer, d.key, d.d_sae, d.source, d.quality] for d in dictionaries),
        "m": config.graph.rarefaction_m,
    }
    key = content_key(**parts)

    inputs = graph_inputs(features)
    return Group(
        name="graph",
        key=key,
        key_parts=parts,
        tables={table: f"tables/graph-{key}/{table}.parquet" for table in GRAPH_TABLES},
        sharded={"activations": inputs["activations"], "edges": list(edges)},
        inputs=Catalog(sharded={"shard_graph_counts": inputs["shard_graph_counts"]}),
    )


def graph_inputs(features: Sequence[FeatureShard], layer: int | None = None) -> dict[str, list[ShardFile]]:
    """The shards' files that the graph is made of, in corpus order, of one layer or of all."""
    ordered = sorted(features, key=lambda feature: (feature.layer, feature.part.shard.doc_offset))
    wanted = [feature for feature in ordered if layer in (None, feature.layer)]

    def files(name: Callable[[FeatureShard], str]) -> list[ShardFile]:
        return [
            ShardFile(
                name=name(feature),
                doc_offset=feature.part.shard.doc_offset,
                source=feature.part.shard.source,
                layer=feature.layer,
            )
            for feature in wanted
        ]

    return {
        "activations": files(lambda feature: f"{feature.folder}/activations.parquet"),
        "shard_edges": files(lambda feature: f"{feature.folder}/edges.parquet"),
        "shard_graph_counts": files(lambda feature: feature.counts_file),
    }


def covers_corpus(features: Sequence[FeatureShard], shards: CorpusShards) -> bool:
    """Whether every layer's graph has all documents of the corpus, so that tokens are as often in it as there."""
    whole = {shard.doc_offset for shard in shards.shards if shard.n_documents}
    in_graph: dict[int, set[int]] = {}
    for feature in features:
        if feature.part.n_documents == feature.part.shard.n_documents:
            in_graph.setdefault(feature.layer, set()).add(feature.part.shard.doc_offset)
    layers = {feature.layer for feature in features}
    return all(in_graph.get(layer) == whole for layer in layers)


def checked_layers(features: Sequence[FeatureShard], dictionaries: Sequence[Dictionary]) -> list[int]:
    """The graph's layers, ascending.

    Raises:
        ConfigError: if there is none, or a layer has shards and no dictionary or the reverse.
    """
    layers = sorted({feature.layer for feature in features})
    known = sorted(dictionary.layer for dictionary in dictionaries)
    if not layers or layers != known:
        raise ConfigError(
            f"feature shards are of the layers {layers}, dictionaries of the layers {known}",
            hint="the graph needs both for each layer: run the stages before it",
        )
    return layers


def merged(published: Catalog, *groups: Group) -> Catalog:
    """A catalogue, published or itself a candidate, with `groups` in place of those of the same names.

    What was made from another corpus (a graph, a consolidation, …) goes with the old corpus, which is told by the
    group `corpus`. So does what is about another model than the run's, or about dictionaries of which the run has
    others: one report is about one model. What another configuration has made of the same stays. `expectations`
    goes always, as it is written again when the candidate is published.
    """
    replaced = {group.name for group in groups}
    corpus = next((group for group in groups if group.name == "corpus"), None)
    if corpus is not None:
        is_same = published.lineage.get("corpus") == corpus.key
        replaced |= {
            name for name in MEMBERS if not (is_same and _is_of(published.about.get(name, []), corpus.about))
        }
    gone = {"expectations", *(table for group in replaced for table in MEMBERS[group])}
    tables = {table: name for table, name in published.tables.items() if table not in gone}
    sharded = {table: files for table, files in published.sharded.items() if table not in gone}
    lineage = {group: key for group, key in published.lineage.items() if group not in replaced}
    about = {group: keys for group, keys in published.about.items() if group not in replaced}
    for group in groups:
        tables |= group.tables
        sharded |= group.sharded
        lineage[group.name] = group.key
        if corpus is not None:
            # Checkpoints have dictionaries of their own.
            about[group.name] = list(corpus.about[:1] if group.name == "consolidation" else corpus.about)
    return Catalog(tables=tables, sharded=sharded, lineage=lineage, about=about)


def _is_of(about: Sequence[str], run: Sequence[str]) -> bool:
    """Whether published tables are about a run's model, and about none but its dictionaries where it has any."""
    return about[:1] == list(run[:1]) and (len(run) == 1 or set(about) <= set(run))


def _shown(config: Config) -> list[Any]:
    return [
        config.model.model_dump(),
        config.corpus.model_dump(),
        config.windows.model_dump(),
        config.activations.model_dump(),
        config.graph.model_dump(),
        [entry.layer for entry in config.sae],
        *(section.model_dump() for section in config.experiments),
    ]
