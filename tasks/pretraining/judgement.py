"""One SAE before held-out text: how often each feature is active, and what the model loses by the SAE (PAPER 1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError, ModelError
from schemas.pretraining.work import Checkpoint
from schemas.work import Dictionary, HeldoutPart
from tasks.corpus.windows import Batch, read_heldout_tokens
from tasks.dictionaries.dictionaries import load_dictionary
from tasks.dictionaries.encoding import Encoder, build_encoder
from tasks.dictionaries.quality import DENSE_ENTRIES, Variance
from tasks.dictionaries.residuals import shard_batches
from tasks.models.language_model import LanguageModel
from tasks.pretraining.checkpoint_jobs import open_checkpoint
from tasks.pretraining.predictions import loss_units


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Sums over held-out tokens.

    Attributes:
        counts: (d_sae,) tokens that activated each feature.
        n_tokens: Ordinary tokens judged.
        explained_variance: 1 - squared error / squared distance from the mean, outliers included.
        n_predictions: Predictions whose current and next token are ordinary tokens of one window.
        loss_units: Their summed loss in units of 2^-32 nats: of the model as it is, with the SAE's reconstruction
            and with zeros at ordinary tokens.
    """

    counts: npt.NDArray[np.int64]
    n_tokens: int
    explained_variance: float
    n_predictions: int
    loss_units: tuple[int, int, int]


def judge(
    config: Config,
    storage: Storage,
    checkpoint: Checkpoint,
    dictionary: Dictionary,
    parts: Sequence[HeldoutPart],
    progress: Progress = silent,
) -> Judgement:
    """Read held-out text three times: as it is, through the SAE, and with zeros in its place.

    BOS, padding and special tokens keep their residuals: nothing here is about them, but what follows reads them.

    Args:
        config: The run's configuration, its tokenizer resolved; says windows and batches.
        storage: Where everything is.
        checkpoint: The checkpoint.
        dictionary: Its SAE.
        parts: The documents that judge it.
        progress: Called after each part with tokens judged.

    Raises:
        ModelError: if tokens, windows or layer do not fit the model, or residuals or losses are not finite.
        CorpusError: if no held-out window has two tokens.
    """
    model, tokenizer = open_checkpoint(config, storage, checkpoint)
    sums = _Sums(model, load_dictionary(storage, dictionary, model.device), dictionary.layer)
    total = sum(part.n_tokens for part in parts)
    seen = 0
    for part in parts:
        for batch in shard_batches(config, read_heldout_tokens(storage, part), tokenizer):
            sums.add(batch)
        seen += part.n_tokens
        progress(seen, total, "tokens, held-out text")
    if sums.n_predictions == 0:
        raise CorpusError(
            f"no window of the {total:,} held-out tokens has two of them",
            hint="raise consolidation.growth.max_tokens or windows.context_size",
        )
    return Judgement(
        counts=sums.counts.cpu().numpy(),
        n_tokens=sums.variance.n,
        explained_variance=sums.variance.explained(),
        n_predictions=sums.n_predictions,
        loss_units=(sums.loss_units[0], sums.loss_units[1], sums.loss_units[2]),
    )


class _Sums:
    """What `judge` adds up, batch by batch."""

    def __init__(self, model: LanguageModel, sae: Any, layer: int) -> None:
        self.model, self.layer = model, layer
        self.encoder: Encoder = build_encoder(sae, model.device)
        self.counts = torch.zeros(self.encoder.d_sae, dtype=torch.int64, device=model.device)
        self.variance = Variance()
        self.n_predictions = 0
        self.loss_units = [0, 0, 0]

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """Read a batch as it is, through the SAE and with zeros, and add what is found of its ordinary tokens.

        Args:
            batch: Windows whose `input_ids` and `token` are (windows, padded length); ordinary tokens stand where
                `token` is not -1. One without any adds nothing.

        Raises:
            ModelError: if residuals or losses are not finite.
        """
        input_ids = torch.from_numpy(batch.input_ids)
        is_ordinary = torch.from_numpy(batch.token >= 0)
        wanted = is_ordinary[:, :-1] & is_ordinary[:, 1:]
        kept = is_ordinary.to(self.model.device)
        residuals = torch.empty(0)

        def read(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal residuals
            residuals = hidden[kept].float()
            return hidden

        with self.model.replaced(self.layer, read):
            if wanted.any():
                self._add_losses(0, input_ids, wanted)
            else:
                self.model.module(input_ids=input_ids.to(self.model.device), use_cache=False)
        if not bool(torch.isfinite(residuals).all()):
            raise ModelError(
                f"layer {self.layer} of {self.model.name}: the residual stream is not finite",
                hint="try model.dtype = 'float32'",
            )
        reconstructed = self._reconstruct(residuals)
        if not wanted.any():
            return
        self.n_predictions += int(wanted.sum())
        for index, instead in ((1, reconstructed), (2, torch.zeros_like(reconstructed))):

            def put(hidden: torch.Tensor, instead: torch.Tensor = instead) -> torch.Tensor:
                changed = hidden.clone()
                changed[kept] = instead.to(hidden.dtype)
                return changed

            with self.model.replaced(self.layer, put):
                self._add_losses(index, input_ids, wanted)

    def _add_losses(self, index: int, input_ids: torch.Tensor, wanted: torch.Tensor) -> None:
        losses = self.model.token_losses(input_ids, wanted)[wanted]
        if not bool(torch.isfinite(losses).all()):
            raise ModelError(
                f"losses of {self.model.name} are not finite", hint="try model.dtype = 'float32'"
            )
        self.loss_units[index] += int(loss_units(losses.numpy()).sum())

    def _reconstruct(self, residuals: torch.Tensor) -> torch.Tensor:
        """Encode and decode (n, d_model) residuals, counting features and errors on the way."""
        pieces = []
        for x in torch.split(residuals, max(1, DENSE_ENTRIES // self.encoder.d_sae)):
            sparse = self.encoder(x)
            self.counts += torch.bincount(sparse.feature, minlength=self.encoder.d_sae)
            dense = x.new_zeros((len(x), self.encoder.d_sae))
            dense[sparse.row, sparse.feature] = sparse.value
            pieces.append(self.encoder.sae.decode(dense))
            self.variance.add(x, (pieces[-1] - x).double().square().sum(1))
        return torch.cat(pieces)
