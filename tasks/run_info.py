"""What the report says of a run: the table `run_info`, keys and values. No secret is ever in it."""

from __future__ import annotations

import re

from functok import __version__
from infra.storage import Storage
from schemas.config import Config
from schemas.work import CorpusShards
from tasks.graph import graph_shards


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
        "model": without_credentials(config.model.name),
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
    return [{"key": key, "value": str(value)} for key, value in values.items() if value is not None]


def without_credentials(url: str) -> str:
    """A URL, chained or not, without `user:password@` and, where HTTP would send one, without its query."""
    links = []
    for link in url.split("::"):
        bare = re.sub(r"^([A-Za-z][\w+.-]*://)[^/]*@", r"\1", link)
        # Elsewhere a question mark is part of a glob.
        links.append(re.sub(r"[?#].*$", "", bare) if re.match(r"https?://", bare) else bare)
    return "::".join(links)
