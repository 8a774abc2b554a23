"""Residuals kept on disk, where asked (`activations.keep_dense`) or for training dictionaries.

One folder per shard part and layer, so that a layer whose dictionary changes costs only itself. A dense
bfloat16 residual of gemma-2-9b is 7 KB a token and layer, its features about 0.3 KB: this is the exception.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from infra.manifest import Manifest, commit, content_key, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.work import GraphShard
from tasks.corpus.windows import Batch, ShardTokens, batches, read_shard_tokens
from tasks.models.model import LoadedModel, load_model, model_key
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ResidualShard:
    """One layer's residual stream over one part.

    Its folder holds `layer-<L>.safetensors` with `residuals` (n_tokens, d_model; the model's dtype; rows in
    (doc, position) order, special tokens left out) and `doc` (n_tokens, int32; inside the shard).
    """

    layer: int
    folder: str
    part: GraphShard

    @property
    def n_tokens(self) -> int:
        """Rows."""
        return self.part.n_tokens

    @property
    def file(self) -> str:
        """File name in the storage."""
        return f"{self.folder}/layer-{self.layer}.safetensors"


def forward_key(config: Config, key_of_model: str) -> dict[str, object]:
    """What determines a residual beside its shard: model, windows and batches."""
    return {
        "model": key_of_model,
        "windows": config.windows.model_dump(),
        "batch_tokens": config.activations.batch_tokens,
    }


def part_key(part: GraphShard) -> dict[str, object]:
    """What determines a part: its shard's content and how many documents of it count."""
    return {"shard": part.shard.folder, "documents": part.n_documents}


def residual_folder(part: GraphShard, layer: int, forward: dict[str, object]) -> str:
    """The folder of one layer's residuals of one part."""
    return f"residuals/{content_key(version=VERSION, part=part_key(part), layer=layer, forward=forward)}"


Place = tuple[str, int, int]
"""What tells residuals of one forward apart: folder of the token shard, documents of it that count, layer."""


def place_of(part: GraphShard, layer: int) -> Place:
    """Where a layer's residuals of a part stand in the answer of `find_residuals`."""
    return part.shard.folder, part.n_documents, layer


def find_residuals(
    config: Config, storage: Storage, parts: Sequence[GraphShard], layers: Sequence[int]
) -> dict[Place, ResidualShard]:
    """Finished residuals by `place_of` their part and layer."""
    forward = forward_key(config, model_key(config.model, storage))
    wanted = {residual_folder(part, layer, forward): (part, layer) for part in parts for layer in layers}
    done = load_all(storage, wanted)
    return {
        place_of(part, layer): ResidualShard(layer=layer, folder=folder, part=part)
        for folder, (part, layer) in wanted.items()
        if folder in done
    }


def write_residuals(
    config: Config,
    storage: Storage,
    parts: Sequence[GraphShard],
    layers: Sequence[int],
    progress: Progress = silent,
) -> list[ResidualShard]:
    """Make what is missing of the residuals of `parts` at `layers`, one forward for all missing layers.

    Returns:
        All of them, parts in order, layers ascending within a part.
    """
    wanted = sorted(set(layers))
    done = find_residuals(config, storage, parts, wanted)
    # Files of equal content share parts: each is made once, however often it stands in the corpus.
    missing: dict[tuple[str, int], tuple[GraphShard, list[int]]] = {}
    for part in parts:
        absent = [layer for layer in wanted if place_of(part, layer) not in done]
        if absent:
            missing[part.shard.folder, part.n_documents] = part, absent
    total = sum(part.n_tokens for part, _ in missing.values())
    seen = 0
    if missing:
        model, tokenizer = load_model(config.model, storage), load_tokenizer(config.model, storage)
        forward = forward_key(config, model.key)
        tokenizer = with_padding_for(model.vocabulary, tokenizer)
        for part, absent in missing.values():
            _write_part(config, storage, part, absent, model, tokenizer, forward)
            seen += part.n_tokens
            progress(seen, total, "tokens, residuals")
        done = find_residuals(config, storage, parts, wanted)
    return [replace(done[place_of(part, layer)], part=part) for part in parts for layer in wanted]


def _write_part(
    config: Config,
    storage: Storage,
    part: GraphShard,
    layers: list[int],
    model: LoadedModel,
    tokenizer: LoadedTokenizer,
    forward: dict[str, object],
) -> None:
    from safetensors.torch import save_file

    tokens = read_shard_tokens(storage, part)
    row_of_token = rows_of_tokens(tokens)
    n_rows = len(tokens.rows)
    dense = {layer: torch.empty((n_rows, model.d_model), dtype=model.dtype) for layer in layers}
    for batch in shard_batches(config, tokens, tokenizer):
        kept = torch.from_numpy(batch.token >= 0)
        rows = torch.from_numpy(row_of_token[batch.token[batch.token >= 0]])

        def receive(
            layer: int, hidden: torch.Tensor, kept: torch.Tensor = kept, rows: torch.Tensor = rows
        ) -> None:
            dense[layer][rows] = hidden[kept.to(hidden.device)].cpu()

        model.forward(torch.from_numpy(batch.input_ids), layers, receive)
    doc = torch.from_numpy(tokens.doc[tokens.rows].astype(np.int32))
    for layer in layers:
        folder = residual_folder(part, layer, forward)
        with tempfile.TemporaryDirectory() as aside:
            local = Path(aside) / f"layer-{layer}.safetensors"
            save_file({"residuals": dense.pop(layer), "doc": doc}, local)
            written = storage.upload(local.parent, folder)
        inputs = {"part": part_key(part), "layer": layer, "forward": forward, "version": VERSION}
        manifest = Manifest(stage="residuals", inputs=inputs, stats={"n_tokens": n_rows})
        commit(storage, folder, manifest, written)


def rows_of_tokens(tokens: ShardTokens) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(n,) table row of each token; meaningless for special ones."""
    return np.cumsum(~tokens.is_special, dtype=np.int64) - 1


def with_padding_for(vocabulary: int, tokenizer: LoadedTokenizer) -> LoadedTokenizer:
    """The tokenizer, with a padding id below a model's `vocabulary`: an added `[PAD]` may lie beyond its embedding."""
    return replace(tokenizer, pad_id=min(tokenizer.pad_id, vocabulary - 1))


def shard_batches(config: Config, tokens: ShardTokens, tokenizer: LoadedTokenizer) -> list[Batch]:
    """The batches of a shard, a function of the shard and the configuration alone."""
    return list(
        batches(
            tokens,
            context_size=config.windows.context_size,
            bos_id=tokenizer.bos_id if config.windows.prepend_bos else None,
            pad_id=tokenizer.pad_id,
            batch_tokens=config.activations.batch_tokens,
        )
    )
