"""Which residuals a dictionary is trained on, and which judge it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from infra.errors import DictionaryError
from infra.storage import Storage
from schemas.config import Train
from tasks.residuals import ResidualShard

_PIECE_ROWS = 16_384


class ResidualSample:
    """One layer's residuals of the first documents up to `train.max_tokens`, split by document.

    Documents are ranked by a hash of their place (token shard and number in it); the lowest
    `train.heldout_share` of them, at least one, are held out. They are in the graph, but no training step sees
    them. Shards are read piece by piece, never whole.

    Args:
        storage: Where the shards are.
        shards: One layer's residual shards, in graph order.
        train: The training section.

    Raises:
        DictionaryError: if there are fewer than two documents.
    """

    def __init__(self, storage: Storage, shards: Sequence[ResidualShard], train: Train) -> None:
        self.files = [storage.local_folder(shard.folder) / Path(shard.file).name for shard in shards]
        docs = [_read_docs(file) for file in self.files]
        budget = train.max_tokens
        self.rows: list[int] = []
        places: list[tuple[str, int, int]] = []
        for index, (shard, doc) in enumerate(zip(shards, docs, strict=True)):
            numbers, lengths = torch.unique_consecutive(doc, return_counts=True)
            ends = lengths.cumsum(0)
            fitting = int((ends <= budget).sum())
            if fitting == 0 and not places:
                fitting = min(1, len(ends))
            self.rows.append(int(ends[fitting - 1]) if fitting else 0)
            budget = budget - self.rows[-1] if fitting == len(ends) else 0
            places += [(shard.part.shard.folder, int(number), index) for number in numbers[:fitting]]
        if len(places) < 2:
            raise DictionaryError(
                f"only {len(places)} documents to train on: at least one must be held out and one shown",
                hint="raise train.max_tokens or activations.max_tokens, or give more documents",
            )
        ranked = sorted(places, key=lambda place: hashlib.sha256(f"{place[0]}/{place[1]}".encode()).digest())
        heldout = ranked[: min(len(places) - 1, math.ceil(train.heldout_share * len(places)))]
        self._is_heldout = [
            torch.isin(
                doc[:rows],
                torch.tensor([number for _, number, at in heldout if at == index], dtype=doc.dtype),
            )
            for index, (doc, rows) in enumerate(zip(docs, self.rows, strict=True))
        ]

    def n_rows(self, *, heldout: bool) -> int:
        """Residuals on one side of the split."""
        return sum(int((side == heldout).sum()) for side in self._is_heldout)

    def pieces(
        self, *, heldout: bool, order: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[torch.Tensor]:
        """(n, d_model) float32 residuals of one side of the split, at most 16,384 rows at a time.

        Args:
            heldout: Which side.
            order: (file, first row) of the pieces wanted; default: all, in graph order.
        """
        from safetensors import safe_open

        for index, first in self.places() if order is None else order:
            last = min(first + _PIECE_ROWS, self.rows[index])
            wanted = self._is_heldout[index][first:last] == heldout
            if bool(wanted.any()):
                with safe_open(self.files[index], framework="pt") as file:
                    yield file.get_slice("residuals")[first:last][wanted].to(torch.float32)

    def places(self) -> list[tuple[int, int]]:
        """(file, first row) of every piece, in graph order."""
        return [
            (index, first) for index, rows in enumerate(self.rows) for first in range(0, rows, _PIECE_ROWS)
        ]


def _read_docs(file: Path) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        docs: torch.Tensor = opened.get_tensor("doc")
    return docs
