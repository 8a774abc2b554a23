"""Forward and encode, fused: the features of one part of the corpus for some layers (PAPER 1.2).

A residual is encoded on its device as soon as its hook sees it, and only the non-zeros leave the device: a
dense bfloat16 residual of three layers of gemma-2-9b is 21.5 KB a token, its features about 1 KB. Where
residuals are on disk already (kept, or sampled for training), they are encoded from there in the same
batches, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from infra import verified
from infra.addresses import without_credentials
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError
from schemas.work import Dictionary, GraphShard
from tasks.corpus.windows import Batch, ShardTokens, read_shard_tokens
from tasks.dictionaries.dictionaries import load_dictionary
from tasks.dictionaries.encoding import Encoder, Way
from tasks.dictionaries.residuals import ResidualShard, rows_of_tokens, shard_batches, with_padding_for
from tasks.models.devices import choose_device
from tasks.models.model import LoadedModel, check_windows, load_model, require_key
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class LayerFeatures:
    """The non-zero features of one layer over one part, in (token, feature) order.

    Attributes:
        token: (n,) index into the part's tokens.
        feature: (n,) latent.
        value: (n,) activation, above 0.
        way: How they were found (`Encoder.way`), which changes none of them.
    """

    token: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]
    way: Way


def compute_features(
    config: Config,
    storage: Storage,
    part: GraphShard,
    dictionaries: Sequence[Dictionary],
    key_of_model: str,
    on_disk: Mapping[int, ResidualShard],
) -> tuple[ShardTokens, dict[int, LayerFeatures]]:
    """The features of one part for the layers of `dictionaries`, with one forward for all of them.

    What is loaded is kept for the next part.

    Args:
        config: The configuration.
        storage: Where everything is.
        part: Which tokens.
        dictionaries: Of the layers that are wanted.
        key_of_model: `model_key` where the work was planned.
        on_disk: The part's finished residuals, by layer.

    Raises:
        ModelError: if the model here is another one, a layer, window or token id does not fit it, or a residual is
            not finite.
    """
    keep_for(key_of_model)
    tokenizer = loaded_tokenizer(config.model, storage)
    if config.windows.prepend_bos and tokenizer.bos_id is None:
        raise ModelError(
            f"the tokenizer of {config.model.name} has no BOS token", hint="set windows.prepend_bos = false"
        )
    tokens = read_shard_tokens(storage, part)
    plan = shard_batches(config, tokens, tokenizer)
    device = choose_device(config.model.device)
    layers = [dictionary.layer for dictionary in dictionaries]
    encoders = {
        entry.layer: _encoder(replace(entry, quality=None), storage, device) for entry in dictionaries
    }
    gathered: dict[int, list[LayerFeatures]] = {layer: [] for layer in layers}

    def encode(layer: int, residuals: torch.Tensor, kept: npt.NDArray[np.int64]) -> None:
        if not bool(torch.isfinite(residuals).all()):
            raise ModelError(
                f"layer {layer}: the residual stream is not finite in {without_credentials(part.shard.source)}",
                hint="try model.dtype = 'float32'",
                stage="features",
            )
        sparse = encoders[layer](residuals)
        gathered[layer].append(
            LayerFeatures(
                token=kept[sparse.row.cpu().numpy()],
                feature=sparse.feature.to(torch.int32).cpu().numpy(),
                value=sparse.value.cpu().numpy(),
                way=encoders[layer].way,
            )
        )

    for layer, shard in on_disk.items():
        for residuals, kept in _from_disk(storage, shard, tokens, plan):
            encode(layer, residuals.to(device), kept)
    to_run = [layer for layer in layers if layer not in on_disk]
    if to_run:
        model = loaded_model(config.model, storage)
        require_key(config.model, model.key, key_of_model)
        check_windows(config, model.context_length)
        if tokenizer.pad_id >= model.vocabulary:
            plan = shard_batches(config, tokens, with_padding_for(model.vocabulary, tokenizer))
        for batch in plan:
            kept = batch.token[batch.token >= 0]
            mask = torch.from_numpy(batch.token >= 0).to(device)

            def receive(
                layer: int,
                hidden: torch.Tensor,
                mask: torch.Tensor = mask,
                kept: npt.NDArray[np.int64] = kept,
            ) -> None:
                encode(layer, hidden[mask], kept)

            model.forward(torch.from_numpy(batch.input_ids), to_run, receive)
    return tokens, {layer: _in_order(gathered.pop(layer), encoders[layer].way) for layer in layers}


def _from_disk(
    storage: Storage, shard: ResidualShard, tokens: ShardTokens, plan: Sequence[Batch]
) -> Iterator[tuple[torch.Tensor, npt.NDArray[np.int64]]]:
    from safetensors import safe_open

    row_of_token = rows_of_tokens(tokens)
    path = verified.local_folder(storage, shard.folder) / shard.file_name
    with safe_open(path, framework="pt") as file:
        residuals = file.get_tensor("residuals")
    for batch in plan:
        kept = batch.token[batch.token >= 0]
        yield residuals[torch.from_numpy(row_of_token[kept])], kept


def _in_order(pieces: Sequence[LayerFeatures], way: Way) -> LayerFeatures:
    if not pieces:
        return LayerFeatures(
            token=np.empty(0, np.int64), feature=np.empty(0, np.int32), value=np.empty(0, np.float32), way=way
        )
    token = np.concatenate([piece.token for piece in pieces])
    # Stable: a token's features already ascend.
    order = np.argsort(token, kind="stable")
    return LayerFeatures(
        token=token[order],
        feature=np.concatenate([piece.feature for piece in pieces])[order],
        value=np.concatenate([piece.value for piece in pieces])[order],
        way=way,
    )


_serving: list[str] = []
"""Key of the model that what is loaded belongs to; none or one."""


@lru_cache(maxsize=1)
def loaded_model(model: Model, storage: Storage) -> LoadedModel:
    """The model, loaded once a process."""
    return load_model(model, storage)


@lru_cache(maxsize=1)
def loaded_tokenizer(model: Model, storage: Storage) -> LoadedTokenizer:
    """The tokenizer, loaded once a process."""
    return load_tokenizer(model, storage)


@lru_cache(maxsize=8)
def _encoder(dictionary: Dictionary, storage: Storage, device: torch.device) -> Encoder:
    return Encoder(load_dictionary(storage, dictionary, device), device)


def keep_for(key_of_model: str) -> None:
    """Forget what was loaded beside another model: a worker may outlive a run, and the files of its model change."""
    if _serving != [key_of_model]:
        forget_loaded()
        _serving.append(key_of_model)


def forget_loaded() -> None:
    """Free what this process keeps between shards: the model, its tokenizer, and the dictionaries."""
    _serving.clear()
    for cache in (loaded_model, loaded_tokenizer, _encoder):
        cache.cache_clear()
