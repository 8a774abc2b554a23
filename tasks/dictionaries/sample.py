"""Which residuals a dictionary is trained on, and which judge it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from infra import verified
from infra.storage import Storage
from schemas.config import Config, Train
from schemas.errors import DictionaryError
from tasks.corpus.heldout import heldout_documents
from tasks.dictionaries.residuals import ResidualShard

_PIECE_ROWS = 16_384


class ResidualSample:
    """One layer's residuals of the first documents up to `train.max_tokens`, split by document.

    Documents are ranked by a hash of their place (token shard and number in it); the lowest
    `train.heldout_share` of them, at least one, are held out. They are in the graph, but no training step sees
    them. Documents that an experiment holds out are on neither side. Shards are read piece by piece, never whole.

    Args:
        storage: Where the shards are.
        shards: One layer's residual shards, in graph order.
        train: The training section.
        left_out: For each shard, (documents,) whether an experiment holds a document out; none: it holds out none.

    Raises:
        DictionaryError: if there are fewer than two documents.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Sequence[ResidualShard],
        train: Train,
        left_out: Sequence[npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        self.files = [verified.local_folder(storage, shard.folder) / shard.file_name for shard in shards]
        docs = [_read_docs(file) for file in self.files]
        counted = [torch.unique_consecutive(doc, return_counts=True) for doc in docs]
        taken = n_documents_within([lengths.tolist() for _, lengths in counted], train.max_tokens)
        self.rows = [int(lengths[:n].sum()) for (_, lengths), n in zip(counted, taken, strict=True)]
        places = [
            (shard.part.shard.folder, number, index)
            for index, (shard, (numbers, _), n) in enumerate(zip(shards, counted, taken, strict=True))
            for number in numbers[:n].tolist()
            if left_out is None or not left_out[index][number]
        ]
        if len(places) < 2:
            raise DictionaryError(
                f"only {len(places)} documents to train on: at least one must be held out and one shown",
                hint="raise train.max_tokens or activations.max_tokens, or give more documents",
            )
        ranked = sorted(places, key=lambda place: hashlib.sha256(f"{place[0]}/{place[1]}".encode()).digest())
        n_heldout = min(len(places) - 1, math.ceil(train.heldout_share * len(places)))
        split: list[dict[bool, list[int]]] = [{True: [], False: []} for _ in shards]
        for rank, (_, number, index) in enumerate(ranked):
            split[index][rank < n_heldout].append(number)
        self._sides = [
            {
                heldout: torch.isin(doc[:rows], torch.tensor(numbers, dtype=doc.dtype))
                for heldout, numbers in sides.items()
            }
            for doc, rows, sides in zip(docs, self.rows, split, strict=True)
        ]

    def n_rows(self, *, heldout: bool) -> int:
        """Residuals on one side of the split."""
        return sum(int(sides[heldout].sum()) for sides in self._sides)

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
            wanted = self._sides[index][heldout][first:last]
            if bool(wanted.any()):
                with safe_open(self.files[index], framework="pt") as file:
                    yield file.get_slice("residuals")[first:last][wanted].to(torch.float32)

    def places(self) -> list[tuple[int, int]]:
        """(file, first row) of every piece, in graph order."""
        return [
            (index, first) for index, rows in enumerate(self.rows) for first in range(0, rows, _PIECE_ROWS)
        ]


def leaves_out(config: Config) -> bool:
    """Whether an experiment holds documents out that no dictionary may see.

    Where it holds out all of them (a public series, whose own corpus is another one), none is left out here.
    """
    return config.heldout_share is not None and config.heldout_share < 1


def left_out_documents(
    config: Config, storage: Storage, shards: Sequence[ResidualShard]
) -> list[npt.NDArray[np.bool_]] | None:
    """For each shard, (documents,) whether an experiment holds a document out; None where it leaves none out."""
    if not leaves_out(config):
        return None
    return [heldout_documents(config, storage, shard.part.shard) for shard in shards]


def n_documents_within(lengths: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """How many leading documents of each part make up the first `max_tokens` tokens.

    A document is in whole or not at all: the first one that would bring the total above `max_tokens` ends them,
    except that the very first is always in.

    Args:
        lengths: For each part, tokens of its documents, those without a token left out.
        max_tokens: The limit.
    """
    taken: list[int] = []
    left, any_taken, has_ended = max_tokens, False, False
    for part in lengths:
        n = 0
        for length in part:
            has_ended = has_ended or (any_taken and length > left)
            if has_ended:
                break
            n, left, any_taken = n + 1, left - length, True
        taken.append(n)
    return taken


def _read_docs(file: Path) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        docs: torch.Tensor = opened.get_tensor("doc")
    return docs
