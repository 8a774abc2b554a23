"""What a training is, before anything is loaded: its numbers, its key and its folders (PAPER 1.4).

The key is made of what decides the weights, as it was asked for: a machine without a GPU finds what one with a GPU
has trained, so `precision = "auto"` is kept as that, and the device is not in the key. What changes weights by
rounding only (the device, how many processes, sharded or not, compiled or not, in how many micro-batches) and what
only says which of them are kept stay out of it, so that a training goes on where it was after such a change. What it
was computed with stands in the manifests. A finished training that is asked for a step it has not kept is trained
again; steps that it has kept are not written twice.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from infra.manifest import content_key
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.pretraining.section import Pretraining, Series, Shape, consolidation_of
from schemas.sections import Model
from schemas.work import CorpusShards
from tasks.corpus import heldout
from tasks.models.devices import choose_device, usable_devices
from tasks.pretraining import packing
from tasks.pretraining.packing import training_shards

VERSION = 1
"""Part of the key of every training: raise it when the same inputs give other weights."""

_NOT_OF_THE_WEIGHTS = {
    "vocabulary_size",
    "checkpoints",
    "first_checkpoint",
    "state_every",
    "processes",
    "fsdp",
    "compile",
    "micro_batch_tokens",
    "context_size",
}
_MANY_EPOCHS = 4.0
"""Up to about four epochs a repeated token is worth nearly as much as a new one (arXiv 2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One series' training.

    Attributes:
        series: Its name.
        shape: The model's shape.
        train: How it is trained.
        model: Its `device` is where the series is trained.
        key: Content key of what decides the weights.
        inputs: What the key was made of.
        context_size: Tokens of a packed row, and positions that the model is built for.
        rows_per_step: Rows of an optimizer step, over all processes.
        steps: Optimizer steps.
        checkpoint_steps: Steps whose weights are kept, ascending; the last step among them.
    """

    series: str
    shape: Shape
    train: Pretraining
    model: Model
    key: str
    inputs: dict[str, Any]
    context_size: int
    rows_per_step: int
    steps: int
    checkpoint_steps: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where this machine trains; raises ModelError if it has no such device."""
        return choose_device(self.model.device)

    @property
    def is_bfloat16(self) -> bool:
        """Whether forward and backward run in bfloat16 here (the weights stay float32)."""
        precision = self.train.precision
        return precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")

    @property
    def processes(self) -> int:
        """Processes that share each step's rows."""
        return self.train.processes or usable_devices(self.model)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step; each is a target."""
        return self.rows_per_step * self.context_size

    @property
    def folder(self) -> str:
        """Folder of the training itself: its loss curve, and states while it runs."""
        return f"training/{self.key}"

    def checkpoint_folder(self, step: int) -> str:
        """Folder of one checkpoint, in Hugging Face format."""
        return f"checkpoints/{content_key(**self.checkpoint_inputs(step))}"

    def checkpoint_inputs(self, step: int) -> dict[str, Any]:
        """What the key of a checkpoint's folder is made of."""
        return {"version": VERSION, "training": self.key, "step": step}

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 1: a linear rise, then a cosine down to its final share."""
        peak, final = self.train.learning_rate, self.train.final_rate_share
        rising = round(self.train.warm_up_share * self.steps)
        if step <= rising:
            return peak * step / rising
        done = (step - rising) / (self.steps - rising)
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    def epochs(self, epoch_length: int) -> float:
        """How often a text of that many positions is shown."""
        return self.steps * self.step_tokens / epoch_length

    def warn_of_repeats(self, epoch_length: int) -> None:
        """Say in the log how many epochs a small corpus makes."""
        epochs = self.epochs(epoch_length)
        if epochs > 1:
            known = "; beyond about four, repeats teach little" if epochs > _MANY_EPOCHS else ""
            logging.getLogger(__name__).warning(
                "series %s: %s tokens are asked for and the training text has %s: it is shown %.1f times (epochs)%s",
                self.series,
                f"{self.steps * self.step_tokens:,}",
                f"{epoch_length:,}",
                epochs,
                known,
            )


def plan_training(config: Config, shards: CorpusShards, series: Series) -> TrainingPlan:
    """The plan of a series with a shape; reads no file, and is the same on every machine.

    Raises:
        ConfigError: if rows are shorter than the windows that the model is judged on, or a step shorter than a row.
    """
    section, windows = consolidation_of(config), config.windows
    assert series.shape is not None
    assert section.train is not None
    train = section.train
    context_size = train.context_size or windows.context_size
    if context_size < windows.context_size:
        raise ConfigError(
            f"consolidation.train.context_size = {context_size} is less than windows.context_size = "
            f"{windows.context_size}: losses would be taken at positions that were never trained",
            hint="make it as large, or leave it out",
        )
    rows_per_step = train.batch_tokens // context_size
    if not rows_per_step:
        raise ConfigError(
            f"consolidation.train.batch_tokens = {train.batch_tokens} is less than one row of {context_size} tokens",
            hint=f"make it a multiple of {context_size}",
        )
    inputs = {
        "version": [VERSION, packing.VERSION, heldout.VERSION],
        "shape": series.shape.model_dump(),
        "train": train.model_dump(exclude=_NOT_OF_THE_WEIGHTS),
        "context_size": context_size,
        "prepend_bos": windows.prepend_bos,
        "shards": [[shard.folder, shard.n_documents] for shard in training_shards(shards)],
        "tokenizer": [shards.tokenizer_key, shards.eos_id],
        "heldout_share": section.heldout_share,
    }
    steps = math.ceil(train.tokens / (rows_per_step * context_size))
    return TrainingPlan(
        series=series.name,
        shape=series.shape,
        train=train,
        model=config.model,
        key=content_key(**inputs),
        inputs=inputs,
        context_size=context_size,
        rows_per_step=rows_per_step,
        steps=steps,
        checkpoint_steps=log_spaced(train.first_checkpoint, steps, train.checkpoints),
    )


def log_spaced(first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` different steps from `first` to `last`, both among them, as evenly spaced in log as integers allow.

    Fewer where there are not as many; `last` alone where `first` is beyond it.
    """
    if first >= last:
        return (last,)
    count = min(count, last - first + 1)
    wanted = np.rint(np.geomspace(first, last, count)).astype(np.int64)
    offsets = np.arange(count)
    # Each at least one above the one before, and low enough to leave room for those after it.
    rising = np.maximum.accumulate(wanted - offsets) + offsets
    return tuple(np.minimum(rising, last - offsets[::-1]).tolist())
