"""A small finished run, made of plain data frames: two token shards, two layers, and the tables over them.

Tests of what reads a finished run change a frame (`run.documents[0]`, `run.tables["coverage"]`) before
`run.write(storage)`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from builders import GivenRun, commit_found, edges_of, run_of

from infra.catalog import Catalog, ShardFile
from infra.manifest import Manifest
from infra.storage import Storage
from schemas.config import Config
from schemas.corpus.tables import VOCABULARY
from schemas.tables import SHARD_FILES, TABLES
from schemas.work import CorpusShards, Dictionary, FeatureShard, GraphShard, TokenShard
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.graph.features import FEATURES

VOCABULARY_SIZE, D_SAE, M = 12, {0: 16, 1: 8}, 3
QUALITY = {
    "explained_variance": 0.8,
    "explained_variance_all": 0.7,
    "l0": 2.0,
    "k": 2.0,
    "alive_share": 0.95,
    "heldout_tokens": 100.0,
}


@dataclass
class SmallRun:
    """Frames by shard (`documents`, …), by (layer, shard) (`activations`, …), and `tables`."""

    documents: list[pd.DataFrame] = field(default_factory=list)
    rejects: list[pd.DataFrame] = field(default_factory=list)
    token_counts: list[pd.DataFrame] = field(default_factory=list)
    occurrences: list[pd.DataFrame] = field(default_factory=list)
    activations: dict[tuple[int, int], pd.DataFrame] = field(default_factory=dict)
    edges: dict[tuple[int, int], pd.DataFrame] = field(default_factory=dict)
    counts: dict[tuple[int, int], pd.DataFrame] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    vocabulary: pd.DataFrame = field(default_factory=pd.DataFrame)
    config: Config = field(default_factory=lambda: small_config())
    shards: CorpusShards = field(
        default_factory=lambda: CorpusShards(shards=(), tokenizer_key="t", vocabulary="v")
    )
    dictionaries: list[Dictionary] = field(default_factory=list)
    features: list[FeatureShard] = field(default_factory=list)
    stats: list[dict[str, int]] = field(default_factory=list)

    def given(self, storage: Storage) -> GivenRun:
        """The run of which these are the results."""
        made = {TOKENIZE: self.shards, DICTIONARIES: self.dictionaries, FEATURES: self.features}
        return run_of(self.config, storage, made)

    def write(self, storage: Storage) -> Catalog:
        """Write everything, commit the folders, and return the catalogue of it."""
        storage.write_parquet(self.shards.vocabulary, _arrow(self.vocabulary, VOCABULARY))
        for place, shard in enumerate(self.shards.shards):
            for file in ("documents", "rejects", "token_counts", "occurrences"):
                table = _arrow(getattr(self, file)[place], SHARD_FILES[file])
                storage.write_parquet(f"{shard.folder}/{file}.parquet", table)
            commit_found(
                storage, shard.folder, Manifest(stage="tokenize", inputs={}, stats=self.stats[place])
            )
        for dictionary in self.dictionaries:
            storage.write_bytes(f"{dictionary.folder}/sae_weights.safetensors", b"weights")
            commit_found(storage, dictionary.folder, Manifest(stage="dictionaries", inputs={}))
        for feature, where in zip(self.features, self.activations, strict=True):
            for file in ("activations", "edges", "counts"):
                table = _arrow(getattr(self, file)[where], SHARD_FILES[file])
                storage.write_parquet(f"{feature.folder}/{file}.parquet", table)
        for name, frame in self.tables.items():
            storage.write_parquet(f"tables/{name}.parquet", _arrow(frame, TABLES[name]))
        sharded = {
            file: [
                ShardFile(name=f"{s.folder}/{file}.parquet", doc_offset=s.doc_offset, source=s.source)
                for s in self.shards.shards
            ]
            for file in ("documents", "rejects", "occurrences")
        }
        sharded["activations"] = [
            ShardFile(
                name=f"{f.folder}/activations.parquet",
                doc_offset=f.part.shard.doc_offset,
                source=f.part.shard.source,
                layer=f.layer,
            )
            for f in self.features
        ]
        return Catalog(
            tables={name: f"tables/{name}.parquet" for name in self.tables},
            sharded=sharded,
            lineage={"corpus": "c", "graph": "g", "features": "f"},
        )


def small_config(**sections: object) -> Config:
    """A configuration with one dictionary trained here (layer 0) and one from disk (layer 1)."""
    return Config.model_validate(
        {
            "corpus": {"urls": ["a.txt", "b.txt"]},
            "model": {"name": "m"},
            "sae": [{"layer": 0, "train": {"d_sae": D_SAE[0], "k": 2}}, {"layer": 1, "path": "d"}],
            "graph": {"rarefaction_m": M},
            **sections,
        }
    )


def small_run(seed: int = 0) -> SmallRun:
    """The run, valid, for a test to change."""
    return deepcopy(_small_run(seed))


@cache
def _small_run(seed: int) -> SmallRun:
    run, rng = SmallRun(), np.random.default_rng(seed)
    run.vocabulary = pd.DataFrame(
        {"token_id": range(VOCABULARY_SIZE), "token": [f"t{i}" for i in range(VOCABULARY_SIZE)]}
    )
    shards: list[TokenShard] = []
    for place, lengths in enumerate([[5, 0, 9], [12, 7]]):
        doc = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        token = np.minimum(rng.geometric(0.35, len(doc)) - 1, VOCABULARY_SIZE - 1)
        occurrences = pd.DataFrame({"doc": doc, "position": position, "token_id": token})
        run.occurrences.append(occurrences)
        run.token_counts.append(
            occurrences.groupby("token_id")
            .agg(count=("doc", "size"), doc_count=("doc", "nunique"))
            .reset_index()
        )
        run.documents.append(
            pd.DataFrame(
                {"doc": range(len(lengths)), "line": range(len(lengths)), "n_chars": 10, "n_tokens": lengths}
            )
        )
        run.rejects.append(
            pd.DataFrame({"line": [99], "reason": ["empty"], "lost_bytes": [0], "lost_lines": [1]}).iloc[
                : 1 - place
            ]
        )
        n_rejects = len(run.rejects[-1])
        shards.append(
            TokenShard(
                folder=f"tokens/{place}",
                source=f"{'ab'[place]}.txt",
                doc_offset=sum(shard.n_documents for shard in shards),
                n_documents=len(lengths),
                n_tokens=len(doc),
                n_rejects=n_rejects,
            )
        )
        run.stats.append({"n_records": len(lengths) + n_rejects})
    run.shards = CorpusShards(shards=tuple(shards), tokenizer_key="t", vocabulary="vocabulary.parquet")
    for layer, d_sae in D_SAE.items():
        quality = QUALITY if layer == 0 else None
        run.dictionaries.append(
            Dictionary(
                layer=layer,
                folder=f"dictionaries/{layer}",
                key=f"d{layer}",
                d_sae=d_sae,
                source="s",
                quality=quality,
            )
        )
        for place, shard in enumerate(shards):
            occurrences = run.occurrences[place]
            row, feature = np.nonzero(rng.random((len(occurrences), d_sae)) < 0.3)
            active = occurrences.iloc[row].reset_index(drop=True)
            active["feature_id"] = feature
            active["activation"] = rng.integers(1, 100, len(active)) / 8
            run.activations[layer, place] = active
            edges, _ = edges_of(active.to_dict("records"))
            run.edges[layer, place] = edges.to_pandas(integer_object_nulls=True)
            run.counts[layer, place] = run.token_counts[place][["token_id", "count"]]
            run.features.append(
                FeatureShard(
                    layer=layer,
                    folder=f"features/{layer}-{place}",
                    part=GraphShard(shard=shard, n_documents=shard.n_documents, n_tokens=shard.n_tokens),
                    n_activations=len(active),
                    n_edges=edges.num_rows,
                )
            )
    run.tables = _tables(run)
    return run


def _tables(run: SmallRun) -> dict[str, pd.DataFrame]:
    counted = pd.concat(run.token_counts).groupby("token_id").sum().reset_index()
    tokens = counted.sort_values(["count", "token_id"], ascending=[False, True]).reset_index(drop=True)
    tokens["token"] = tokens.token_id.map("t{}".format)
    tokens["rank"] = tokens.index + 1
    tokens["doc_share"] = tokens.doc_count / run.shards.n_documents
    tokens["share"] = tokens["count"] / tokens["count"].sum()
    tokens["cumulative_share"] = tokens["count"].cumsum() / tokens["count"].sum()
    tokens["is_function"] = (tokens["count"].cumsum() - tokens["count"]) / tokens["count"].sum() < 0.4
    active = pd.concat(
        [
            frame.assign(layer=layer, doc_id=frame.doc + run.shards.shards[place].doc_offset)
            for (layer, place), frame in run.activations.items()
        ]
    ).reset_index(drop=True)
    edges = (
        active.groupby(["layer", "token_id", "feature_id"])
        .agg(
            n=("activation", "size"),
            max_activation=("activation", "max"),
            sum_activation=("activation", "sum"),
        )
        .reset_index()
    )
    features = edges.groupby(["layer", "feature_id"]).agg(degree=("n", "size"), n=("n", "sum")).reset_index()
    features["density"] = features.n / run.shards.n_tokens
    degrees, coverages, summaries = [], [], []
    for layer, d_sae in D_SAE.items():
        own = edges[edges.layer == layer]
        degree = tokens[["token_id", "token", "rank", "count", "is_function"]].assign(layer=layer, m=M)
        degree["degree"] = degree.token_id.map(own.groupby("token_id").size()).fillna(0).astype(int)
        degree["rarefied_degree"] = np.where(degree["count"] >= M, degree.degree / 2, np.nan)
        degrees.append(degree)
        rank_of = own.token_id.map(tokens.set_index("token_id")["rank"])
        first = rank_of.groupby(own.feature_id).min()
        cover = tokens[["rank", "token_id", "token"]].assign(layer=layer)
        cover["new_features"] = cover["rank"].map(first.value_counts()).fillna(0).astype(int)
        cover["cumulative_features"] = cover.new_features.cumsum()
        cover["coverage"] = cover.cumulative_features / len(first)
        cover["dictionary_coverage"] = cover.cumulative_features / d_sae
        coverages.append(cover)
        summaries.append(
            {
                "layer": layer,
                "dictionary_size": d_sae,
                "activated_features": len(first),
                "n_tokens": run.shards.n_tokens,
                "n_edges": len(own),
                "mean_l0": own.n.sum() / run.shards.n_tokens,
                "alpha": 2.5,
                "xmin": 3.0,
                "ks": 0.1,
            }
        )
    strongest = active.sort_values("activation", ascending=False, kind="stable")
    examples = strongest.groupby(["layer", "feature_id"]).head(2).assign(kind="top")
    examples["place"] = examples.groupby(["layer", "feature_id"]).cumcount() + 1
    histogram = edges.groupby(["layer", "feature_id"]).agg(n=("n", "sum"), high=("max_activation", "max"))
    by_feature = edges.groupby(["layer", "feature_id"]).n.transform("sum")
    share = edges.n / by_feature
    entropy = (-share * np.log2(share)).groupby([edges.layer, edges.feature_id]).transform("sum")
    lift = share / edges.token_id.map(tokens.set_index("token_id").share)
    feature_tokens = edges.assign(lift=lift, token_entropy=entropy)
    logits = [
        {
            "layer": layer,
            "feature_id": feature,
            "sign": sign,
            "place": 1,
            "token_id": 0,
            "token": "t0",
            "logit": 0.5,
        }
        for layer, d_sae in D_SAE.items()
        for feature in range(d_sae)
        for sign in ("promoted", "suppressed")
    ]
    dictionaries = pd.DataFrame(
        [{"layer": d.layer, "dictionary_size": d.d_sae, "source": d.source} for d in run.dictionaries]
    )
    return {
        "tokens": tokens,
        "edges": edges,
        "feature_degree": features,
        "token_degree": pd.concat(degrees),
        "coverage": pd.concat(coverages),
        "graph_summary": pd.DataFrame(summaries),
        "feature_examples": examples,
        "feature_histogram": histogram.reset_index().assign(bin=1, low=0.0),
        "feature_tokens": feature_tokens,
        "feature_summary": summary_of(feature_tokens),
        "feature_logits": pd.DataFrame(logits),
        "dictionaries": dictionaries.reindex(columns=TABLES["dictionaries"].names),
    }


def summary_of(feature_tokens: pd.DataFrame) -> pd.DataFrame:
    """The table `feature_summary` of rows of `feature_tokens` in any order."""
    ranked = feature_tokens.sort_values(["n", "token_id"], ascending=[False, True])
    return ranked.groupby(["layer", "feature_id"], as_index=False).agg(
        n=("n", "sum"),
        max_activation=("max_activation", "max"),
        token_id=("token_id", "first"),
        top_n=("n", "first"),
        token_entropy=("token_entropy", "first"),
    )


def resize(run: SmallRun, place: int, **changes: Any) -> None:
    """Change what the work values say of a token shard."""
    shards = list(run.shards.shards)
    shards[place] = replace(shards[place], **changes)
    run.shards = replace(run.shards, shards=tuple(shards))


def _arrow(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
