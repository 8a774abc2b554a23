"""The tables that counting gives (PAPER 1.1): documents, rejects, occurrences, tokens with ranks, `run_info`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from infra.addresses import without_credentials
from infra.catalog import Catalog, ShardFile
from infra.manifest import content_key
from infra.progress import Progress, silent
from infra.storage import StoredFile
from schemas.config import Config
from schemas.tables import TABLES
from schemas.version import __version__
from schemas.work import CorpusShards
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Shown
from tasks.engine.tables import VERSION, TableGroup, Tables, ensure_folder, opened, write_table
from tasks.models.token_texts import label, shared_texts

FUNCTION_TOKENS_SHOWN = 200
"""Rows of Prefect's table at most; the paper's corpus has 122 function tokens."""

Facts = Callable[[Run], Mapping[str, object]]
"""What an experiment says of a run in `run_info`: no secret."""


class CorpusTables(TableGroup):
    """The tables of the corpus.

    Args:
        facts: What the run's experiments say of themselves.
    """

    name = "corpus"
    needs = (TOKENIZE,)

    def __init__(self, facts: Sequence[Facts] = ()) -> None:
        self._facts = facts

    def planned(self, run: Run) -> Tables:
        """The group as it would be published."""
        return corpus_group(run.config, run.result(TOKENIZE))

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make `tokens` and `run_info`, where they are missing; the others are the shards' own."""
        group = self.planned(run)
        info = group.tables["run_info"]
        progress(0, 2, "corpus tables")
        build_tokens(run, group)
        progress(1, 2, "corpus tables")
        ensure_folder(
            run.storage,
            [info],
            {"run_info": info, "corpus": group.key},
            lambda: [self._write_info(run, group)],
        )
        progress(2, 2, "corpus tables")
        return group

    def shown(self, connection: Any, config: Config) -> Iterable[Shown]:
        """The function tokens."""
        shared = shared_texts(connection)
        rows = connection.execute(
            "SELECT rank, token, token_id, count, share, doc_share FROM tokens WHERE is_function ORDER BY rank LIMIT ?",
            [FUNCTION_TOKENS_SHOWN],
        ).fetchall()
        yield Shown(
            name="function-tokens",
            description=f"Function tokens: the most frequent, up to {config.function_tokens.share:.0%} of all",
            rows=[
                {
                    "rank": rank,
                    "token": label(token, token_id, shared),
                    "count": count,
                    "share": f"{share:.2%}",
                    "documents": f"{documents:.1%}",
                }
                for rank, token, token_id, count, share, documents in rows
            ],
        )

    def _write_info(self, run: Run, group: Tables) -> StoredFile:
        values = {**_run_info(run, group), **{k: v for facts in self._facts for k, v in facts(run).items()}}
        rows = [{"key": key, "value": str(value)} for key, value in values.items() if value is not None]
        table = pa.Table.from_pylist(rows, schema=TABLES["run_info"])
        return run.storage.write_parquet(group.tables["run_info"], table)


def build_tokens(run: Run, group: Tables) -> None:
    """Make the table `tokens`, where it is missing: other groups' SQL reads it."""
    name = group.tables["tokens"]

    def make() -> Iterator[StoredFile]:
        config = run.config
        yield write_table(
            config.duckdb,
            run.storage,
            "tokens",
            name,
            group.inputs,
            share=config.function_tokens.share,
            n_documents=run.result(TOKENIZE).n_documents,
        )

    ensure_folder(run.storage, [name], group.key_parts, make)


def corpus_group(config: Config, shards: CorpusShards) -> Tables:
    """The group as it would be published."""
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
    return Tables(
        name="corpus",
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


def _shown(config: Config) -> list[Any]:
    """What `run_info` depends on."""
    return [
        config.model.model_dump(),
        config.corpus.model_dump(),
        config.windows.model_dump(),
        config.activations.model_dump(),
        config.graph.model_dump(),
        [entry.layer for entry in config.sae],
        *(section.model_dump() for section in config.experiments),
    ]


def _run_info(run: Run, group: Tables) -> dict[str, object]:
    config, storage, shards = run.config, run.storage, run.result(TOKENIZE)
    tokens = Catalog(tables={"tokens": group.tables["tokens"]})
    with opened("the table run_info", config.duckdb, storage, tokens) as connection:
        counted = "SELECT count(*), count(*) FILTER (is_function) FROM tokens"
        distinct, function = connection.execute(counted).fetchone()
    values: dict[str, object] = {
        "functok_version": __version__,
        "model": without_credentials(config.subject),
        "model_revision": config.model.revision,
        "tokenizer": without_credentials(config.model.tokenizer) if config.model.tokenizer else None,
        "corpus_urls": ", ".join(without_credentials(url) for url in config.corpus.urls),
        "documents": shards.n_documents,
        "rejects": shards.n_rejects,
        "tokens": shards.n_tokens,
        "distinct_tokens": distinct,
        "function_token_share": config.function_tokens.share,
        "function_tokens": function,
        "context_size": config.windows.context_size,
        "prepend_bos": str(config.windows.prepend_bos).lower(),
        "rarefaction_m": config.graph.rarefaction_m,
    }
    if config.sae:
        parts = graph_shards(config, shards, storage)
        values |= {
            "layers": ", ".join(str(layer) for layer in sorted(entry.layer for entry in config.sae)),
            "graph_documents": sum(part.n_documents for part in parts),
            "graph_tokens": sum(part.n_tokens for part in parts),
            "activation_mantissa_bits": config.activations.mantissa_bits,
        }
    return values
