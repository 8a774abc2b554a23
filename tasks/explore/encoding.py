"""Pasted text through the run's own model and dictionaries: which features are active at each token of it.

What comes out is what a run gives that has the text as a document: it is cut into tokens and windows alike, encoded
with the dictionaries that the published activations were encoded with, and rounded alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.catalog import Catalog
from infra.manifest import manifests_of
from infra.storage import Storage
from schemas.config import Model
from schemas.errors import ConfigError, FunctokError
from schemas.work import Dictionary
from tasks.dictionaries.published import published_dictionaries

MOST_TOKENS = 2_048
"""Of a text that is encoded."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text, encoded.

    Attributes:
        tokens: (id, text) of each; special tokens in the text are left out, as in every table.
        active: Layer to (token's place in `tokens`, feature, activation) of all that is active, in this order.
        is_cut: Whether the text went on.
    """

    tokens: Sequence[tuple[int, str]]
    active: dict[int, list[tuple[int, int, float]]]
    is_cut: bool


class Encode:
    """Encodes texts with a published run's model and dictionaries, one at a time; each is loaded when first used.

    Args:
        storage: The run's.
        name: Where the model is, if no longer where the run read it: a folder, a hub id or a GGUF file.
    """

    def __init__(self, storage: Storage, name: str | None = None) -> None:
        self._storage, self._name = storage, name
        self._lock = threading.Lock()
        self._models: dict[str, _Loaded] = {}

    def __call__(self, catalog: Catalog, text: str, layers: Sequence[int]) -> Encoded:
        """The features of a text at some layers.

        Args:
            catalog: What is published now; another model than before is loaded in place of it.
            text: The text.
            layers: Layers of `published_dictionaries`.

        Raises:
            FunctokError: if model or dictionaries cannot be loaded, or are others than those of the run.
        """
        made = self._made(catalog)
        with self._lock:
            key = made["forward"]["model"]
            if key not in self._models:
                self._models.clear()
                self._models[key] = self._load(catalog, key)
            return self._models[key].encode(
                text, layers, published_dictionaries(self._storage, catalog), made
            )

    def _made(self, catalog: Catalog) -> Mapping[str, Any]:
        """How the published activations were made."""
        shards = [file.name.rpartition("/")[0] for file in catalog.sharded.get("activations", [])[:1]]
        found = list(manifests_of(self._storage, shards).values())
        if not found:
            raise ConfigError(
                f"{self._storage.root} has no features: there is no dictionary to encode text with",
                hint="add [[sae]] entries to its configuration, and run it",
            )
        return found[0].inputs

    def _load(self, catalog: Catalog, key: str) -> _Loaded:
        from infra import verified
        from tasks.models.model import load_model, require_key
        from tasks.models.tokenizers import load_tokenizer

        told: dict[str, str] = {}
        if "run_info" in catalog.tables:
            rows = verified.read_table(self._storage, catalog.tables["run_info"]).to_pylist()
            told = {row["key"]: row["value"] for row in rows}
        model = (
            Model(name=self._name)
            if self._name
            else Model(
                name=told.get("model", ""),
                revision=told.get("model_revision"),
                tokenizer=told.get("tokenizer"),
            )
        )
        try:
            tokenizer = load_tokenizer(model, self._storage)
            loaded = load_model(model, self._storage)
        except FunctokError as error:
            raise ConfigError(
                f"the model of this run does not load: {error.message}",
                hint="functok explore --model PATH says where it is now",
            ) from error
        require_key(model, loaded.key, key)
        return _Loaded(self._storage, tokenizer, loaded)


class _Loaded:
    """A model, its tokenizer, and the dictionaries that were asked for so far, by key."""

    def __init__(self, storage: Storage, tokenizer: Any, model: Any) -> None:
        self._storage, self._tokenizer, self._model = storage, tokenizer, model
        self._encoders: dict[str, Any] = {}

    def encode(
        self, text: str, layers: Sequence[int], dictionaries: Mapping[int, str], made: Mapping[str, Any]
    ) -> Encoded:
        import torch

        from tasks.corpus.windows import ShardTokens, batches
        from tasks.graph.features import round_mantissa

        ids = self._tokenizer.backend.encode(text, add_special_tokens=False).ids
        token_id = np.array(ids[:MOST_TOKENS], dtype=np.int32)
        special = np.isin(token_id, np.array(self._tokenizer.special_ids, dtype=np.int32))
        tokens = ShardTokens(
            doc=np.zeros(len(token_id), np.int32),
            position=np.arange(len(token_id), dtype=np.int32),
            token_id=token_id,
            is_special=special,
        )
        encoders = {layer: self._encoder(layer, dictionaries[layer]) for layer in layers}
        place = np.cumsum(~special) - 1
        active: dict[int, list[tuple[int, int, float]]] = {layer: [] for layer in layers}
        windows = made["forward"]["windows"]
        for batch in batches(
            tokens,
            context_size=windows["context_size"],
            bos_id=self._tokenizer.bos_id if windows["prepend_bos"] else None,
            pad_id=min(self._tokenizer.pad_id, self._model.vocabulary - 1),
            batch_tokens=made["forward"]["batch_tokens"],
        ):
            kept = batch.token[batch.token >= 0]
            mask = torch.from_numpy(batch.token >= 0).to(self._model.device)

            def receive(layer: int, hidden: Any, kept: Any = kept, mask: Any = mask) -> None:
                sparse = encoders[layer](hidden[mask])
                values = round_mantissa(sparse.value.cpu().numpy(), made["mantissa_bits"])
                rows = place[kept[sparse.row.cpu().numpy()]]
                active[layer] += zip(rows.tolist(), sparse.feature.tolist(), values.tolist(), strict=True)

            if layers:
                self._model.forward(torch.from_numpy(batch.input_ids), sorted(layers), receive)
        texts = self._tokenizer.texts
        return Encoded(
            tokens=[(int(one), texts.get(int(one), "")) for one in token_id[~special]],
            active={layer: sorted(found) for layer, found in active.items()},
            is_cut=len(ids) > MOST_TOKENS,
        )

    def _encoder(self, layer: int, key: str) -> Any:
        if key not in self._encoders:
            from tasks.dictionaries.dictionaries import load_dictionary
            from tasks.dictionaries.encoding import Encoder

            dictionary = Dictionary(layer=layer, folder=f"dictionaries/{key}", key=key, d_sae=0, source="")
            sae = load_dictionary(self._storage, dictionary, self._model.device)
            self._encoders[key] = Encoder(sae, self._model.device)
        return self._encoders[key]
