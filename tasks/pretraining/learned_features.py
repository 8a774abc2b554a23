"""What an SAE has learned, judged on held-out text (PAPER 1.4): how many features, and how good the SAE is.

A feature is learned if its density, the share of held-out tokens that activate it, lies between two named bounds:
below are features that are dead or fired by accident, above those that say nothing about a token. A worse SAE may
well have more of them, so the count never stands alone: beside it stand L0, explained variance, and the cross-entropy
that the model keeps when the SAE's reconstruction takes the place of its residual stream,

    ce_recovered = (ce_zero - ce_sae) / (ce_zero - ce),

with zeros in its place for ce_zero. How often each feature was active is kept apart from the bounds, so that other
bounds need no forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infra import verified
from infra.manifest import Manifest, commit, content_key, load
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError
from schemas.pretraining.section import Growth, consolidation_of
from schemas.pretraining.work import Checkpoint
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary, HeldoutPart
from tasks.corpus.heldout import document_hashes, heldout_key, heldout_parts
from tasks.dictionaries.dictionaries import training_parts
from tasks.dictionaries.residuals import forward_key
from tasks.dictionaries.sample import leaves_out, n_documents_within
from tasks.pretraining.judgement import Judgement, judge
from tasks.pretraining.predictions import UNITS_PER_NAT

VERSION = 1

_LEAST_TO_RECOVER = 1e-3
"""Nats by which zeros must be worse than the residual stream before a share of that says anything."""


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


def growth_of(config: Config) -> Growth:
    """The section `consolidation.growth`."""
    growth = consolidation_of(config).growth
    assert growth is not None
    return growth


def find_learned(
    config: Config,
    storage: Storage,
    checkpoint: Checkpoint,
    dictionary: Dictionary,
    parts: Sequence[HeldoutPart],
) -> str | None:
    """The finished folder of `learned.parquet`, or None."""
    counts = _counts_inputs(config, checkpoint, dictionary, parts)
    folder = _folder(_learned_inputs(config, counts))
    return folder if load(storage, folder) is not None else None


def write_learned(
    config: Config,
    storage: Storage,
    checkpoint: Checkpoint,
    dictionary: Dictionary,
    parts: Sequence[HeldoutPart],
    progress: Progress = silent,
) -> str:
    """Judge one checkpoint's SAE, as far as that is not done.

    Args:
        config: The run's configuration, its tokenizer resolved.
        storage: Where everything is.
        checkpoint: The checkpoint.
        dictionary: Its SAE.
        parts: The documents that judge it.
        progress: Called after each part with tokens judged.

    Returns:
        The folder of `learned.parquet`: one row of the table `learned_features` without model and step. The folder
        that its manifest names has `densities.parquet`, how many tokens activated each feature that any did.

    Raises:
        ModelError: if tokens, windows or layer do not fit the model, or residuals or losses are not finite.
        CorpusError: if no held-out window has two tokens.
    """
    counts_inputs = _counts_inputs(config, checkpoint, dictionary, parts)
    learned_inputs = _learned_inputs(config, counts_inputs)
    counts, learned = _folder(counts_inputs), _folder(learned_inputs)
    if load(storage, learned) is not None:
        return learned
    manifest = load(storage, counts)
    if manifest is None:
        judged = judge(config, storage, checkpoint, dictionary, parts, progress)
        active = np.flatnonzero(judged.counts)
        table = pa.table([active, judged.counts[active]], schema=SHARD_FILES["densities"])
        written = storage.write_parquet(f"{counts}/densities.parquet", table)
        stats = {
            "n_tokens": judged.n_tokens,
            "explained_variance": judged.explained_variance,
            "n_predictions": judged.n_predictions,
            "loss_units": list(judged.loss_units),
        }
        manifest = commit(
            storage, counts, Manifest(stage="growth", inputs=counts_inputs, stats=stats), [written]
        )
    row = _row(growth_of(config), dictionary, _restored(storage, counts, manifest, dictionary.d_sae))
    written = storage.write_parquet(
        f"{learned}/learned.parquet", pa.Table.from_pylist([row], schema=SHARD_FILES["learned"])
    )
    commit(storage, learned, Manifest(stage="growth", inputs=learned_inputs, stats=row), [written])
    return learned


def _counts_inputs(
    config: Config, checkpoint: Checkpoint, dictionary: Dictionary, parts: Sequence[HeldoutPart]
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "dictionary": dictionary.key,
        "layer": dictionary.layer,
        "forward": forward_key(config, checkpoint.key),
        "parts": [heldout_key(part) for part in parts],
    }


def _learned_inputs(config: Config, counts_inputs: dict[str, Any]) -> dict[str, Any]:
    growth = growth_of(config)
    return {
        "version": VERSION,
        "densities": _folder(counts_inputs),
        "min_density": growth.min_density,
        "max_density": growth.max_density,
    }


def _folder(inputs: dict[str, Any]) -> str:
    return f"growth/{content_key(**inputs)}"


def _restored(storage: Storage, folder: str, manifest: Manifest, d_sae: int) -> Judgement:
    table = verified.read_table(storage, f"{folder}/densities.parquet")
    counts = np.zeros(d_sae, dtype=np.int64)
    counts[table["feature_id"].to_numpy()] = table["n"].to_numpy()
    clean, reconstructed, zero = manifest.stats["loss_units"]
    return Judgement(
        counts=counts,
        n_tokens=int(manifest.stats["n_tokens"]),
        explained_variance=float(manifest.stats["explained_variance"]),
        n_predictions=int(manifest.stats["n_predictions"]),
        loss_units=(clean, reconstructed, zero),
    )


def _row(growth: Growth, dictionary: Dictionary, judged: Judgement) -> dict[str, Any]:
    density = judged.counts / judged.n_tokens
    is_alive, is_dense = judged.counts > 0, density > growth.max_density
    ce, ce_sae, ce_zero = (units / UNITS_PER_NAT / judged.n_predictions for units in judged.loss_units)
    to_recover = ce_zero - ce
    return {
        "layer": dictionary.layer,
        "dictionary_size": dictionary.d_sae,
        "learned_features": int((is_alive & ~is_dense & (density >= growth.min_density)).sum()),
        "l0": int(judged.counts.sum()) / judged.n_tokens,
        "explained_variance": judged.explained_variance,
        "ce_recovered": (ce_zero - ce_sae) / to_recover if to_recover >= _LEAST_TO_RECOVER else None,
        "alive_features": int(is_alive.sum()),
        "dense_features": int(is_dense.sum()),
        "ce": ce,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "heldout_tokens": judged.n_tokens,
        "min_density": growth.min_density,
        "max_density": growth.max_density,
    }
