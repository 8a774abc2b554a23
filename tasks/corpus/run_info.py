"""What the report says of a run: the table `run_info`, keys and values. No secret is ever in it."""

from __future__ import annotations

from infra.addresses import without_credentials
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import Consolidation, Series, losses_of
from schemas.steering.section import Steering
from schemas.version import __version__
from schemas.work import CorpusShards
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.heldout import heldout_parts


def run_info_rows(
    config: Config, storage: Storage, shards: CorpusShards, *, distinct_tokens: int, function_tokens: int
) -> list[dict[str, str]]:
    """The rows (`key`, `value`) of `run_info`.

    Args:
        config: The configuration.
        storage: Where the shards are.
        shards: The tokenized corpus.
        distinct_tokens: Rows of the table `tokens`.
        function_tokens: How many of them are function tokens.
    """
    values: dict[str, object] = {
        "functok_version": __version__,
        "model": without_credentials(config.subject),
        "model_revision": config.model.revision,
        "tokenizer": without_credentials(config.model.tokenizer) if config.model.tokenizer else None,
        "corpus_urls": ", ".join(without_credentials(url) for url in config.corpus.urls),
        "documents": shards.n_documents,
        "rejects": shards.n_rejects,
        "tokens": shards.n_tokens,
        "distinct_tokens": distinct_tokens,
        "function_token_share": config.function_tokens.share,
        "function_tokens": function_tokens,
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
    consolidation, steering = config.section(Consolidation), config.section(Steering)
    if consolidation is not None:
        values |= _consolidation(config, consolidation, storage, shards)
    if steering is not None:
        values |= steering_values(steering)
    return [{"key": key, "value": str(value)} for key, value in values.items() if value is not None]


def _consolidation(
    config: Config, section: Consolidation, storage: Storage, shards: CorpusShards
) -> dict[str, object]:
    losses = losses_of(config)
    parts = heldout_parts(config, storage, shards, losses.max_tokens)
    values: dict[str, object] = {
        "series": "; ".join(_series(config, series) for series in section.series),
        "heldout_share": section.heldout_share,
        "heldout_documents": sum(len(part.documents) for part in parts),
        "heldout_tokens": sum(part.n_tokens for part in parts),
        "loss_resamples": losses.resamples,
    }
    if section.train is not None and section.trains_here:
        values["training_tokens"] = section.train.tokens
    if section.train is not None and section.trains_tokenizer:
        values["tokenizer"] = (
            f"byte-level BPE of {section.train.vocabulary_size} tokens, trained on the corpus"
        )
    return values


def steering_values(section: Steering) -> dict[str, object]:
    """What is said of reactivation and steering."""
    return {
        "steering_cases": without_credentials(section.cases),
        "steering_chat_template": str(section.chat_template).lower(),
        "steering_decomposition": section.decomposition,
        "steering_features": section.features,
        "steering_random_controls": section.random_controls,
        "steering_resamples": section.resamples,
        "steering_seed": section.seed,
    }


def _series(config: Config, series: Series) -> str:
    if series.shape is not None:
        return (
            f"{series.name}: {series.shape.layers} blocks of width {series.shape.hidden_size}, trained here"
        )
    if series.revisions is not None:
        name = without_credentials(series.model or config.model.name)
        return f"{series.name}: {len(series.revisions)} revisions of {name}"
    return f"{series.name}: {series.folder}"
