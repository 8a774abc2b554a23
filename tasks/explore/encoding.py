"""Pasted text through the run's own model and dictionaries: which features are active at each token of it.

What comes out is what a run gives that has the text as a document: it is cut into tokens and windows alike, encoded
with the dictionaries that the published activations were encoded with, and rounded alike.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from infra.duck import Catalog
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
    """Encodes texts with a published run's model and dictionaries, one at a time; loaded when first used.

    Args:
        storage: The run's.
        catalog: What is published.
        name: Where the model is, if no longer where the run read it: a folder, a hub id or a GGUF file.

    Raises:
        ConfigError: if nothing was encoded in this run, so that there is nothing to encode with.
    """

    def __init__(self, storage: Storage, catalog: Catalog, name: str | None = None) -> None:
        self._storage, self._name = storage, name
        self._dictionaries = published_dictionaries(storage, catalog)
        if not self._dictionaries:
            raise ConfigError(
                f"{storage.root} has no features: there is no dictionary to encode text with",
                hint="add [[sae]] entries to its configuration and run it, or leave --model out",
            )
        shards = [file.name.rpartition("/")[0] for file in catalog.sharded["activations"][:1]]
        self._made = next(iter(manifests_of(storage, shards).values())).inputs
        self._info = catalog.tables.get("run_info")
        self._lock = threading.Lock()

    @property
    def layers(self) -> list[int]:
        """The layers that there are dictionaries of, ascending."""
        return list(self._dictionaries)

    def __call__(self, text: str, layers: Sequence[int]) -> Encoded:
        """The features of a text at some layers.

        Raises:
            FunctokError: if model or dictionaries cannot be loaded, or are others than those of the run.
        """
        with self._lock:
            return self._loaded.encode(text, layers)

    @cached_property
    def _loaded(self) -> _Loaded:
        from infra import verified
        from tasks.models.model import load_model, require_key
        from tasks.models.tokenizers import load_tokenizer

        told: dict[str, str] = {}
        if self._info is not None:
            rows = verified.read_table(self._storage, self._info).to_pylist()
            told = {row["key"]: row["value"] for row in rows}
        name = self._name or told.get("model", "")
        model = Model(
            name=name,
            revision=None if self._name else told.get("model_revision"),
            tokenizer=None if self._name else told.get("tokenizer"),
        )
        try:
            tokenizer = load_tokenizer(model, self._storage)
            loaded = load_model(model, self._storage)
        except FunctokError as error:
            raise ConfigError(
                f"the model of this run does not load: {error.message}",
                hint="functok explore --model PATH says where it is now",
            ) from error
        require_key(model, loaded.key, self._made["forward"]["model"])
        return _Loaded(self._storage, self._dictionaries, self._made, tokenizer, loaded)


class _Loaded:
    """A model, its tokenizer, and the dictionaries that were asked for so far."""

    def __init__(
        self, storage: Storage, dictionaries: dict[int, str], made: dict[str, Any], tokenizer: Any, model: Any
    ) -> None:
        self._storage, self._dictionaries, self._made = storage, dictionaries, made
        self._tokenizer, self._model = tokenizer, model
        self._encoders: dict[int, Any] = {}

    def encode(self, text: str, layers: Sequence[int]) -> Encoded:
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
        place = np.cumsum(~special) - 1
        active: dict[int, list[tuple[int, int, float]]] = {layer: [] for layer in layers}
        windows, forward = self._made["forward"]["windows"], self._made["forward"]
        for batch in batches(
            tokens,
            context_size=windows["context_size"],
            bos_id=self._tokenizer.bos_id if windows["prepend_bos"] else None,
            pad_id=min(self._tokenizer.pad_id, self._model.vocabulary - 1),
            batch_tokens=forward["batch_tokens"],
        ):
            kept = batch.token[batch.token >= 0]
            mask = torch.from_numpy(batch.token >= 0).to(self._model.device)

            def receive(layer: int, hidden: Any, kept: Any = kept, mask: Any = mask) -> None:
                sparse = self._encoder(layer)(hidden[mask])
                values = round_mantissa(sparse.value.cpu().numpy(), self._made["mantissa_bits"])
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

    def _encoder(self, layer: int) -> Any:
        if layer not in self._encoders:
            from tasks.dictionaries.dictionaries import load_dictionary
            from tasks.dictionaries.encoding import Encoder

            key = self._dictionaries[layer]
            dictionary = Dictionary(layer=layer, folder=f"dictionaries/{key}", key=key, d_sae=0, source="")
            sae = load_dictionary(self._storage, dictionary, self._model.device)
            self._encoders[layer] = Encoder(sae, self._model.device)
        return self._encoders[layer]
