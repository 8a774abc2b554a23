"""Dictionaries trained here: SAELens' BatchTopK SAE and its `SAETrainer` on residuals of the graph's documents.

What decides quality is what the trainer is shown. Residual streams have a mean as long as their spread and,
in some models, a handful of tokens a hundred times longer than the rest. Shown as they are, they gave an
explained variance of -0.6 and 42 % of latents alive; centred, scaled to a mean norm of sqrt(d_model) and
without the outliers, about 0.8 and 99 %. Mean and scale are folded into the saved weights, so the saved
dictionary reads raw residuals.

The alternative, SAELens' `LanguageModelSAETrainingRunner`, reads activations by its own windows, starts over
silently when a corpus ends, and logs to a service.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Train
from schemas.errors import DictionaryError
from tasks.dictionaries.quality import DENSE_ENTRIES, measure
from tasks.dictionaries.residuals import ResidualShard
from tasks.dictionaries.sample import ResidualSample, left_out_documents
from tasks.dictionaries.start import Start, start_training_from

VERSION = 1
"""Part of the key of every dictionary trained here: raise it when the same inputs give other weights."""

_BUFFER_BYTES = 256 << 20
_STEPS_A_REPORT = 10
_WARM_UP_SHARE = 0.1
_DEAD_AFTER_SAMPLES = 10_000
"""A latent that has not fired on as many is helped by the auxiliary loss. Short trainings need it early: of 4,096
latents (block 7, 100,000 samples) 3.3 % stayed silent on held-out tokens, with 20,000 instead 7.8 %. SAELens'
default of 1,000 steps would never help them."""


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    """What is done to a residual before training: (x - mean) * scale, outliers left out.

    Attributes:
        mean: (d_model,) mean of the training residuals.
        scale: Brings the mean norm after centring to sqrt(d_model).
        longest: Norm above which a residual is an outlier.
        n_rows: Training residuals.
    """

    mean: torch.Tensor
    scale: float
    longest: float
    n_rows: int


def train_dictionary(
    config: Config,
    storage: Storage,
    shards: Sequence[ResidualShard],
    train: Train,
    folder: Path,
    device: torch.device,
    progress: Progress = silent,
    start: Start | None = None,
) -> dict[str, float]:
    """Train one layer's dictionary and save it in its inference form (JumpReLU) in `folder`.

    Deterministic on a device: initialization and order come from `train.seed`. The learning rate warms up
    over a tenth of the steps and falls by a cosine to a tenth. BatchTopK's own threshold is a moving average of
    each batch's smallest kept activation, which lags the weights; it is set again from the final weights
    so that a slice of *training* tokens has a mean L0 of k.

    Args:
        config: The run's configuration; its windows and model go into the SAE's metadata.
        storage: Where the residuals are.
        shards: One layer's residuals, in graph order.
        train: What to train.
        folder: A local folder for `cfg.json` and `sae_weights.safetensors`.
        device: Where to train.
        progress: Called every ten steps with residuals shown.
        start: Weights that training starts from, where `train.start_from` names some.

    Returns:
        Figures on held-out tokens (see `measure`), to be judged by `facts.check_gate`.

    Raises:
        DictionaryError: if there is nothing to train or judge on.
    """
    from sae_lens import SAE

    sample = ResidualSample(storage, shards, train, left_out_documents(config, storage, shards))
    scaling = _scaling(sample, train.outlier_multiple)
    layer = shards[0].layer
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(train.seed)
        sae = _fit(config, sample, scaling, train, layer, device, progress, start)
        sae.fold_activation_norm_scaling_factor(scaling.scale)
        with torch.no_grad():
            sae.b_dec += scaling.mean.to(sae.b_dec)
        _calibrate(sae, sample, scaling, train.k)
    sae.save_inference_model(folder)
    saved = SAE.load_from_disk(folder, device=str(device))
    return {
        **measure(saved, sample, scaling.longest),
        "k": float(train.k),
        "training_tokens": float(scaling.n_rows),
    }


def _scaling(sample: ResidualSample, outlier_multiple: float) -> _Scaling:
    norms = [piece.norm(dim=1) for piece in sample.pieces(heldout=False)]
    if not norms:
        raise DictionaryError("no tokens to train a dictionary on", hint="lower train.heldout_share")
    longest = float(outlier_multiple * torch.cat(norms).median())
    n_rows, total = 0, torch.zeros((), dtype=torch.float64)
    for kept in _without_outliers(sample, longest):
        n_rows, total = n_rows + len(kept), total + kept.double().sum(0)
    mean = total / n_rows
    distance = sum(
        float((kept.double() - mean).norm(dim=1).sum()) for kept in _without_outliers(sample, longest)
    )
    if distance == 0:
        raise DictionaryError(
            "all training residuals are equal", hint="give a corpus with more than one token"
        )
    scale = math.sqrt(len(mean)) / (distance / n_rows)
    return _Scaling(mean=mean.float(), scale=scale, longest=longest, n_rows=n_rows)


def _without_outliers(
    sample: ResidualSample, longest: float, order: Sequence[tuple[int, int]] | None = None
) -> Iterator[torch.Tensor]:
    for piece in sample.pieces(heldout=False, order=order):
        yield piece[piece.norm(dim=1) <= longest]


def _endless(sample: ResidualSample, scaling: _Scaling) -> Iterator[torch.Tensor]:
    """Scaled training residuals without end; every pass has its own order of pieces."""
    places = sample.places()
    while True:
        order = [places[index] for index in torch.randperm(len(places)).tolist()]
        for kept in _without_outliers(sample, scaling.longest, order):
            yield (kept - scaling.mean) * scaling.scale


def _fit(
    config: Config,
    sample: ResidualSample,
    scaling: _Scaling,
    train: Train,
    layer: int,
    device: torch.device,
    progress: Progress,
    start: Start | None,
) -> Any:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.mixing_buffer import mixing_buffer

    d_model = len(scaling.mean)
    steps = max(1, train.samples // train.batch_size)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_model,
            d_sae=train.d_sae,
            k=train.k,
            device=str(device),
            metadata=SAEMetadata(
                model_name=Path(config.model.name).name,
                hook_name=f"blocks.{layer}.hook_resid_post",
                hook_head_index=None,
                prepend_bos=config.windows.prepend_bos,
                context_size=config.windows.context_size,
            ),
        )
    )
    if start is not None:
        start_training_from(sae, start, scaling.mean, scaling.scale)
    buffer_rows = max(2 * train.batch_size, min(scaling.n_rows, _BUFFER_BYTES // (4 * d_model)))
    batches = mixing_buffer(buffer_rows, train.batch_size, _endless(sample, scaling))
    trainer: Any = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * train.batch_size,
            train_batch_size_samples=train.batch_size,
            lr=train.learning_rate,
            lr_end=train.learning_rate / 10,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=int(_WARM_UP_SHARE * steps),
            dead_feature_window=max(1, _DEAD_AFTER_SAMPLES // train.batch_size),
            device=str(device),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches,
    )
    # One fused pass over the weights: Adam is a fifth of a step on a CPU otherwise.
    trainer.optimizer.param_groups[0].update(fused=True, foreach=False)
    # `step` is the trainer's seam for coordinators: `fit` is this loop with a terminal bar of its own.
    while trainer.n_training_steps < steps:
        trainer.step(next(batches))
        trainer.n_training_steps += 1
        if trainer.n_training_steps % _STEPS_A_REPORT == 0 or trainer.n_training_steps == steps:
            progress(
                trainer.n_training_samples, steps * train.batch_size, f"samples, dictionary of layer {layer}"
            )
    trainer.set_final_sae_metadata()
    return sae


@torch.no_grad()
def _calibrate(sae: Any, sample: ResidualSample, scaling: _Scaling, k: int) -> None:
    """Set the one threshold so that training residuals have a mean L0 of k under the final weights."""
    wanted = max(1, DENSE_ENTRIES // sae.cfg.d_sae)
    places = sample.places()
    share = min(1.0, wanted / scaling.n_rows)
    active: list[torch.Tensor] = []
    shown = 0
    for kept in _without_outliers(sample, scaling.longest, places):
        rows = kept[torch.randperm(len(kept))[: max(1, round(share * len(kept)))]]
        before = sae.encode_with_hidden_pre(rows.to(sae.device))[1]
        active.append(before[before > 0])
        shown += len(rows)
    values = torch.cat(active)
    position = min(k * shown, len(values)) - 1
    if position < 0:
        raise DictionaryError("no latent fires on the training tokens", hint="lower train.learning_rate")
    threshold = torch.sort(values, descending=True).values[position]
    # JumpReLU keeps what is above its threshold: step below the last value that is to be kept.
    sae.topk_threshold.fill_(float(torch.nextafter(threshold, torch.zeros_like(threshold))))
