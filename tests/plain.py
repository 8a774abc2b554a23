"""The pipeline without Prefect: the stages' functions, one after another, as the flows call them.

As a program, `python tests/plain.py CONFIG PREFIX NTH` runs it and kills itself with SIGKILL in the middle of the
NTH write of a file whose name begins with PREFIX.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from infra.config_file import load_config
from infra.duck import Catalog
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import consolidation_of
from schemas.work import CorpusShards, Dictionary


class InThisProcess:
    """Stands in for the tokenization's Dask client: runs file jobs here."""

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def run(self, jobs: Any) -> Any:
        from tasks.corpus.token_shards import tokenize_file

        return [tokenize_file(job) for job in jobs]


def run_plain(config: Config, storage: Storage | None = None, *, checked: bool = True) -> Storage:
    """Every stage of a configuration; returns the storage.

    Args:
        config: The configuration.
        storage: Where; default: its own root.
        checked: Also validate at the stage boundaries.
    """
    from tasks.corpus import tokenization
    from tasks.corpus import tokenizer_training as corpus_tokenizer
    from tasks.dictionaries import dictionaries
    from tasks.engine import validation
    from tasks.graph import features, tables
    from tasks.report import report

    storage = storage or Storage(config.storage.root, config.storage.endpoint_url)
    if config.consolidation is not None and config.consolidation.trains_tokenizer:
        corpus_tokenizer.train_tokenizer(config, storage)
    resolved = corpus_tokenizer.with_tokenizer(config, storage)
    assert resolved is not None
    config = resolved
    shards = tokenization.tokenize_corpus(config, storage)
    if checked:
        validation.check_tokenize(config, storage, shards)
    catalog = tables.build_corpus_tables(config, storage, shards)
    if config.sae:
        made = dictionaries.prepare_dictionaries(config, storage, shards)
        if checked:
            validation.check_dictionaries(config, storage, made)
        activated = features.extract_features(config, storage, shards, made)
        if checked:
            validation.check_features(config, storage, activated, made)
        catalog = tables.build_graph_tables(config, storage, shards, activated, made)
        if config.steering is not None:
            catalog = _steer(config, storage, shards, made, catalog, checked=checked)
    if config.consolidation is not None:
        catalog = _consolidate(config, storage, shards, catalog, checked=checked)
    if checked:
        validation.check_tables(config, storage, catalog)
    tables.publish(storage, catalog)
    report.write_report(storage, config.duckdb)
    return storage


def _steer(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    made: list[Dictionary],
    catalog: Catalog,
    *,
    checked: bool,
) -> Catalog:
    """The stages reactivation and steering, and their tables."""
    from tasks.steering import checks as steering_validation
    from tasks.steering import reactivation, steering
    from tasks.steering import results as steering_stages
    from tasks.steering import tables as steering_tables

    cases = reactivation.compute_reactivations(config, storage, made)
    traits, steered = steering.run_steering(config, storage, shards, made)
    if checked:
        steering_validation.check_reactivation(config, storage, shards, made, cases)
        steering_validation.check_steering(config, storage, made, traits, steered)
    results = steering_stages.find_steering_results(config, storage, shards, made)
    assert results is not None
    return steering_tables.build_steering_tables(config, storage, shards, results, onto=catalog)


def _consolidate(
    config: Config, storage: Storage, shards: CorpusShards, catalog: Catalog, *, checked: bool
) -> Catalog:
    """The checkpoint stages and their tables."""
    from tasks.pretraining import checkpoints, generations, growth, losses
    from tasks.pretraining import checks as consolidation_validation
    from tasks.pretraining import results as consolidation
    from tasks.pretraining import tables as consolidation_tables

    found = checkpoints.prepare_checkpoints(config, storage, shards)
    measured = losses.compute_losses(config, storage, shards, found)
    section = consolidation_of(config)
    grown = growth.grow(config, storage, shards, found) if section.growth else []
    texts = generations.generate_texts(config, storage, found) if section.generations else []
    if checked:
        consolidation_validation.check_checkpoints(config, storage, found)
        consolidation_validation.check_losses(config, storage, measured)
        if grown:
            consolidation_validation.check_growth(config, storage, grown)
        if texts:
            consolidation_validation.check_generations(config, storage, texts)
    results = consolidation.find_results(config, storage, shards)
    assert results is not None
    return consolidation_tables.build_consolidation_tables(config, storage, shards, results, onto=catalog)


def _killing(prefix: str, nth: int) -> None:
    write, count = Storage.write, [0]

    @contextmanager
    def deadly(self: Storage, name: str) -> Iterator[IO[bytes]]:
        with write(self, name) as file:
            if name.startswith(prefix):
                count[0] += 1
                if count[0] == nth:
                    file.write(b"half a file")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield file

    Storage.write = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    from tasks.corpus import tokenization

    tokenization._Watched = InThisProcess  # type: ignore[misc, assignment]
    _killing(sys.argv[2], int(sys.argv[3]))
    run_plain(load_config(sys.argv[1]), checked=False)
