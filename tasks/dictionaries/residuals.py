"""Residuals kept on disk, where asked (`activations.keep_dense`) or for training dictionaries.

One folder per shard part and layer, so that a layer whose dictionary changes costs only itself. A dense
bfloat16 residual of gemma-2-9b is 7 KB a token and layer, its features about 0.3 KB: this is the exception.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from infra.manifest import Manifest
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.work import GraphShard
from tasks.corpus.windows import Batch, ShardTokens, batches, read_shard_tokens
from tasks.engine.run import Run
from tasks.engine.stage import Made, Stage, Unit
from tasks.models.model import LoadedModel, load_model, model_key
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer

VERSION = 1


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


Place = tuple[str, int, int]
"""What tells residuals of one forward apart: folder of the token shard, documents of it that count, layer."""


def place_of(part: GraphShard, layer: int) -> Place:
    """Where a layer's residuals of a part stand in the result of `Residuals`."""
    return part.shard.folder, part.n_documents, layer


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualShard(Unit):
    """One layer's residual stream over one part.

    Its folder holds `layer-<L>.safetensors` with `residuals` (n_tokens, d_model; the model's dtype; rows in
    (doc, position) order, special tokens left out) and `doc` (n_tokens, int32; inside the shard).
    """

    part: GraphShard
    layer: int

    @classmethod
    def of(cls, part: GraphShard, layer: int, forward: dict[str, object]) -> ResidualShard:
        """Those of a forward (`forward_key`)."""
        return cls(
            top="residuals",
            inputs={"version": VERSION, "part": part_key(part), "layer": layer, "forward": forward},
            about=f"layer {layer}, {part.shard.folder}",
            size=part.n_tokens,
            together=(part.shard.folder, part.n_documents),
            part=part,
            layer=layer,
        )

    @property
    def file_name(self) -> str:
        """Name of its one file."""
        return f"layer-{self.layer}.safetensors"


class Residuals(Stage[ResidualShard, dict[Place, ResidualShard]]):
    """The residuals of some parts at some layers, one forward for all layers that a part lacks.

    No stage of its own: whoever needs residuals makes them by the way.
    """

    name = "residuals"
    measure = "tokens, residuals"
    things = "residuals"

    def __init__(self, parts: Sequence[GraphShard], layers: Sequence[int]) -> None:
        self.parts, self.layers = tuple(parts), sorted(set(layers))
        self._loaded: tuple[LoadedModel, LoadedTokenizer] | None = None

    def units(self, run: Run) -> Sequence[ResidualShard]:
        """A unit a part and layer."""
        forward = forward_key(run.config, model_key(run.config.model, run.storage))
        return [ResidualShard.of(part, layer, forward) for part in self.parts for layer in self.layers]

    def prepare(self, run: Run, missing: Sequence[ResidualShard]) -> Sequence[ResidualShard]:
        """One forward gives all layers that a part lacks."""
        return counted_once(missing)

    def make(self, run: Run, group: Sequence[ResidualShard]) -> Iterator[Made]:
        """The residuals of one part."""
        if self._loaded is None:
            model, tokenizer = (
                load_model(run.config.model, run.storage),
                load_tokenizer(run.config.model, run.storage),
            )
            self._loaded = model, with_padding_for(model.vocabulary, tokenizer)
        model, tokenizer = self._loaded
        tokens = read_shard_tokens(run.storage, group[0].part)
        layers = [unit.layer for unit in group]
        dense = _dense(run.config, tokens, layers, model, tokenizer)
        doc = torch.from_numpy(tokens.doc[tokens.rows].astype(np.int32))
        for unit in group:
            residuals = dense.pop(unit.layer)
            yield Made.of(
                unit, partial(_write, run.storage, unit, residuals, doc), {"n_tokens": len(residuals)}
            )

    def close(self) -> None:
        """Free the model."""
        self._loaded = None

    def result(
        self, run: Run, units: Sequence[ResidualShard], done: Mapping[str, Manifest]
    ) -> dict[Place, ResidualShard]:
        """All of them, by `place_of` their part and layer."""
        return self.there(run)

    def there(self, run: Run) -> dict[Place, ResidualShard]:
        """Those that are finished, by `place_of` their part and layer."""
        found = run.find(self)
        return {place_of(unit.part, unit.layer): unit for unit in found.units if unit.folder in found.done}


U = TypeVar("U", bound=Unit)


def counted_once(units: Sequence[U]) -> list[U]:
    """The same units; of those that are made together, the first has the whole size and the others none."""
    first = {unit.together: unit for unit in reversed(units)}
    return [unit if first[unit.together] is unit else replace(unit, size=0) for unit in units]


def _dense(
    config: Config, tokens: ShardTokens, layers: list[int], model: LoadedModel, tokenizer: LoadedTokenizer
) -> dict[int, torch.Tensor]:
    """By layer, (n_rows, d_model) residuals in the model's dtype, special tokens left out."""
    row_of_token, n_rows = rows_of_tokens(tokens), len(tokens.rows)
    dense = {layer: torch.empty((n_rows, model.d_model), dtype=model.dtype) for layer in layers}
    for batch in shard_batches(config, tokens, tokenizer):
        kept = torch.from_numpy(batch.token >= 0)
        rows = torch.from_numpy(row_of_token[batch.token[batch.token >= 0]])

        def receive(
            layer: int, hidden: torch.Tensor, kept: torch.Tensor = kept, rows: torch.Tensor = rows
        ) -> None:
            dense[layer][rows] = hidden[kept.to(hidden.device)].cpu()

        model.forward(torch.from_numpy(batch.input_ids), layers, receive)
    return dense


def _write(
    storage: Storage, unit: ResidualShard, residuals: torch.Tensor, doc: torch.Tensor
) -> list[StoredFile]:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as aside:
        save_file({"residuals": residuals, "doc": doc}, Path(aside) / unit.file_name)
        return storage.upload(Path(aside), unit.folder)


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
