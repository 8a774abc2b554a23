"""What an SAE has learned, judged on held-out text (PAPER 1.4): how many features, and how good the SAE is.

A feature is learned if its density, the share of held-out tokens that activate it, lies between two named bounds:
below are features that are dead or fired by accident, above those that say nothing about a token. A worse SAE may
well have more of them, so the count never stands alone: beside it stand L0, explained variance, and the cross-entropy
that the model keeps when the SAE's reconstruction takes the place of its residual stream,

    ce_recovered = (ce_zero - ce_sae) / (ce_zero - ce),

with zeros in its place for ce_zero. How often each feature was active is kept apart from the bounds, so that other
bounds need no forward.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from infra import verified
from infra.manifest import Manifest
from schemas.errors import CorpusError, ModelError
from schemas.pretraining.section import Growth
from schemas.pretraining.work import Checkpoint
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary, HeldoutPart
from tasks.corpus.heldout import heldout_key
from tasks.corpus.windows import Batch, read_heldout_tokens
from tasks.dictionaries.dictionaries import load_dictionary
from tasks.dictionaries.encoding import Encoder
from tasks.dictionaries.quality import DENSE_ENTRIES, Variance
from tasks.dictionaries.residuals import forward_key, shard_batches
from tasks.engine.run import Run
from tasks.engine.stage import Made, Stage, Unit
from tasks.models.language_model import LanguageModel
from tasks.pretraining.loading import open_checkpoint
from tasks.pretraining.predictions import UNITS_PER_NAT, loss_units

VERSION = 2

_LEAST_TO_RECOVER = 1e-3
"""Nats by which zeros must be worse than the residual stream before a share of that says anything."""


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


class Judging(Stage[Unit, Judgement]):
    """One checkpoint's SAE before held-out text, the parts.

    No stage of its own: growth makes it by the way. Its folder holds `densities.parquet`, how many tokens activated
    each feature that any did.
    """

    name = "growth"
    measure = "tokens, held-out text"
    things = "densities"
    loads = True

    def __init__(self, checkpoint: Checkpoint, dictionary: Dictionary, parts: Sequence[HeldoutPart]) -> None:
        self.checkpoint, self.dictionary, self.parts = checkpoint, dictionary, tuple(parts)

    def units(self, run: Run) -> Sequence[Unit]:
        """The one."""
        inputs = {
            "version": VERSION,
            "dictionary": self.dictionary.key,
            "layer": self.dictionary.layer,
            "forward": forward_key(run.config, self.checkpoint.key),
            "parts": [heldout_key(part) for part in self.parts],
        }
        size = sum(part.n_tokens for part in self.parts)
        return [Unit(top="growth", inputs=inputs, about="how often each feature is active", size=size)]

    def make(self, run: Run, group: Sequence[Unit]) -> Iterator[Made | int]:
        """Read the held-out text."""
        (unit,) = group
        judged = yield from judge(run, self.checkpoint, self.dictionary, self.parts)
        active = np.flatnonzero(judged.counts)
        table = pa.table([active, judged.counts[active]], schema=SHARD_FILES["densities"])
        stats = {
            "n_tokens": judged.n_tokens,
            "explained_variance": judged.explained_variance,
            "n_predictions": judged.n_predictions,
            "loss_units": list(judged.loss_units),
        }
        file = f"{unit.folder}/densities.parquet"
        yield Made(write=lambda: [(unit, [run.storage.write_parquet(file, table)], stats)])

    def result(self, run: Run, units: Sequence[Unit], done: Mapping[str, Manifest]) -> Judgement:
        """What was found."""
        (unit,) = units
        table = verified.read_table(run.storage, f"{unit.folder}/densities.parquet")
        counts = np.zeros(self.dictionary.d_sae, dtype=np.int64)
        counts[table["feature_id"].to_numpy()] = table["n"].to_numpy()
        stats = done[unit.folder].stats
        clean, reconstructed, zero = stats["loss_units"]
        return Judgement(
            counts=counts,
            n_tokens=int(stats["n_tokens"]),
            explained_variance=float(stats["explained_variance"]),
            n_predictions=int(stats["n_predictions"]),
            loss_units=(clean, reconstructed, zero),
        )


def judge(
    run: Run, checkpoint: Checkpoint, dictionary: Dictionary, parts: Sequence[HeldoutPart]
) -> Generator[int, None, Judgement]:
    """Read held-out text three times: as it is, through the SAE, and with zeros in its place.

    BOS, padding and special tokens keep their residuals: nothing here is about them, but what follows reads them.

    Yields:
        Tokens judged, a part at a time.

    Raises:
        CorpusError: if no held-out window has two tokens.
    """
    config, storage = run.config, run.storage
    model, tokenizer = open_checkpoint(config, storage, checkpoint)
    sums = _Sums(model, load_dictionary(storage, dictionary, model.device), dictionary.layer)
    for part in parts:
        for batch in shard_batches(config, read_heldout_tokens(storage, part), tokenizer):
            sums.add(batch)
        yield part.n_tokens
    if sums.n_predictions == 0:
        raise CorpusError(
            f"no window of the {sum(part.n_tokens for part in parts):,} held-out tokens has two of them",
            hint="raise consolidation.growth.max_tokens or windows.context_size",
        )
    return Judgement(
        counts=sums.counts.cpu().numpy(),
        n_tokens=sums.variance.n,
        explained_variance=sums.variance.explained(),
        n_predictions=sums.n_predictions,
        loss_units=(sums.loss_units[0], sums.loss_units[1], sums.loss_units[2]),
    )


def learned_row(growth: Growth, dictionary: Dictionary, judged: Judgement) -> dict[str, Any]:
    """A row of `learned.parquet`: of the table `learned_features`, without model and step."""
    density = judged.counts / judged.n_tokens
    is_alive, is_dense = judged.counts > 0, density > growth.max_density
    ce, ce_sae, ce_zero = (units / UNITS_PER_NAT / judged.n_predictions for units in judged.loss_units)
    to_recover = ce_zero - ce
    return {
        "layer": dictionary.layer,
        "dictionary_size": dictionary.d_sae,
        "learned_features": int((is_alive & ~is_dense & (density >= growth.min_density)).sum()),
        "l0": int(judged.counts.sum()) / judged.n_tokens,
        "explained_variance": judged.explained_variance,
        "ce_recovered": (ce_zero - ce_sae) / to_recover if to_recover >= _LEAST_TO_RECOVER else None,
        "alive_features": int(is_alive.sum()),
        "dense_features": int(is_dense.sum()),
        "ce": ce,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "heldout_tokens": judged.n_tokens,
        "min_density": growth.min_density,
        "max_density": growth.max_density,
    }


class _Sums:
    """What `judge` adds up, batch by batch."""

    def __init__(self, model: LanguageModel, sae: Any, layer: int) -> None:
        self.model, self.layer = model, layer
        self.encoder: Encoder = Encoder(sae, model.device)
        self.counts = torch.zeros(self.encoder.d_sae, dtype=torch.int64, device=model.device)
        self.variance = Variance()
        self.n_predictions = 0
        self.loss_units = [0, 0, 0]

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """Read a batch as it is, through the SAE and with zeros, and add what is found of its ordinary tokens."""
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
