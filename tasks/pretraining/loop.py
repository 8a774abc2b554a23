"""A training from its newest state, or from the start, to its end (PAPER 1.4).

A training that was killed goes on from its last state; on one machine and CPU its loss curve and weights are bit
for bit those of one that was not. It may go on on another kind of device (a GPU's training on a CPU, say): losses
and weights then differ by rounding from those of either device alone. The log says so, and manifests say what was
computed where. Losses and norms are read in groups, so that no step waits for the device, and always before anything
is saved; weights are kept only if loss and gradient of the next row are finite under them.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from contextlib import nullcontext
from typing import Any

import torch

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError, ModelError, TrainingError
from schemas.work import CorpusShards
from tasks.models.devices import prepared_device
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.pretraining.model import build_model
from tasks.pretraining.packing import PackedRows, training_text
from tasks.pretraining.plan import TrainingPlan
from tasks.pretraining.state import (
    STAGE,
    Curve,
    finish,
    finished_checkpoints,
    load_curve,
    newest_state,
    save_checkpoint,
    save_state,
)
from tasks.pretraining.trainer import Trainer

_STEPS_A_REPORT = {"cpu": 1, "cuda": 10}


def run_training(
    config: Config, storage: Storage, shards: CorpusShards, plan: TrainingPlan, progress: Progress = silent
) -> None:
    """Train from the newest state, or from the start, to the end; every process of a launch calls it."""
    device = prepared_device(config.model)
    tokenizer = load_tokenizer(config.model, storage)
    rows = packed_rows(config, storage, shards, plan, tokenizer)
    place = torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()
    with place, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(plan.train.seed)
        trainer = Trainer(plan, rows, build_model(plan, tokenizer))
        try:
            _Run(storage, trainer, tokenizer, progress).to_the_end()
        finally:
            trainer.close()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def packed_rows(
    config: Config, storage: Storage, shards: CorpusShards, plan: TrainingPlan, tokenizer: LoadedTokenizer
) -> PackedRows:
    """The rows that a plan trains on, separated by BOS, or EOS where there is no BOS.

    Raises:
        CorpusError: if the training text is shorter than a row.
        ModelError: if the tokenizer has neither BOS nor EOS.
    """
    bos, eos = tokenizer.bos_id, tokenizer.tokenizer.eos_token_id
    separator = next((token for token in (bos, eos) if token is not None), None)
    if separator is None:
        raise ModelError(
            "the tokenizer has neither BOS nor EOS to put between training documents",
            hint="choose another with model.tokenizer, or train one: consolidation.train.vocabulary_size",
            stage=STAGE,
        )
    text = training_text(config, storage, shards)
    if len(text.tokens) < plan.context_size:
        raise CorpusError(
            f"series {plan.series}: {len(text.tokens):,} training tokens are fewer than one row of {plan.context_size}",
            hint="give more documents, or lower consolidation.heldout_share or the context size",
            stage=STAGE,
        )
    return PackedRows(
        text,
        context_size=plan.context_size,
        seed=plan.train.seed,
        separator=separator,
        end=separator if eos is None else eos,
        begins_rows=config.windows.prepend_bos and bos is not None,
    )


class _Run:
    """A training on its way to the last step."""

    def __init__(
        self, storage: Storage, trainer: Trainer, tokenizer: LoadedTokenizer, progress: Progress
    ) -> None:
        self._storage, self._trainer, self._tokenizer, self._progress = storage, trainer, tokenizer, progress
        self._plan = trainer.plan
        self._start, self._finished, self._elsewhere = self._found()
        self._curve = Curve()
        self._epochs = self._plan.epochs(trainer.rows.epoch_length)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_the_end(self) -> None:
        """Load what there is, train, save."""
        plan, trainer = self._plan, self._trainer
        start = self._start
        if start:
            trainer.load(self._storage, start)
            self._curve = load_curve(self._storage, plan, start)
        every = _STEPS_A_REPORT.get(plan.device.type, 1)
        self._report(start)
        self._clock = time.monotonic()
        if start in plan.checkpoint_steps:
            self._save(start, is_state_new=False)
        self._record_device(start)
        for step in range(start + 1, plan.steps + 1):
            self._pending.append(trainer.step(step))
            is_kept = step in plan.checkpoint_steps
            is_state = (is_kept or step % plan.train.state_every == 0) and step < plan.steps
            if is_kept or is_state or len(self._pending) >= every:
                self._read(step)
                self._report(step)
            if is_kept or is_state:
                self._save(step, is_state_new=is_state)
        if trainer.accelerator.is_main_process:
            finish(self._storage, plan, self._curve, self._stats())
        trainer.accelerator.wait_for_everyone()

    def _found(self) -> tuple[int, set[int], list[dict[str, Any]]]:
        """The step to go on from and the checkpoints that are there, as the first process sees them.

        The last is what the checkpoints that this process sees were made with.
        """
        from accelerate.utils import broadcast

        plan, accelerator = self._plan, self._trainer.accelerator
        finished = finished_checkpoints(self._storage, plan)
        start = newest_state(self._storage, plan, finished)
        seen = [start, *(int(step in finished) for step in plan.checkpoint_steps)]
        start, *is_finished = broadcast(torch.tensor(seen, device=accelerator.device)).tolist()
        kept = {step for step, is_there in zip(plan.checkpoint_steps, is_finished, strict=True) if is_there}
        return start, kept, [made for manifest in finished.values() for made in manifest.stats["made_with"]]

    def _record_device(self, start: int) -> None:
        """Note what the steps after `start` are computed with, and warn where others were on another device."""
        made, now = self._curve.made_with, self._trainer.computes_with
        before = [*self._elsewhere, *made]
        if not made or made[-1] != {**now, "after_step": made[-1]["after_step"]}:
            made.append({"after_step": start, **now})
        others = sorted({_place(entry) for entry in before} - {_place(now)})
        if others and self._trainer.accelerator.is_main_process:
            logging.getLogger(__name__).warning(
                "series %s: what there is was trained on %s, and the steps after %d are trained on %s: losses and "
                "weights differ by rounding from those of one device alone",
                *(self._plan.series, " and ".join(others), start, _place(now)),
            )

    def _read(self, step: int) -> None:
        """Read the losses and norms of the last steps, up to `step`, and stop at the first that is not finite."""
        accelerator = self._trainer.accelerator
        losses = accelerator.reduce(torch.stack([loss for loss, _ in self._pending]), reduction="sum")
        norms = torch.stack([norm for _, norm in self._pending]).double()
        first = step - len(self._pending) + 1
        self._pending = []
        for offset, (loss, norm) in enumerate(torch.stack([losses, norms]).T.tolist()):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", first + offset)
            if not math.isfinite(norm):
                raise self._diverged(f"the gradient's norm is {norm}", first + offset)
            self._curve.loss.append(loss)
            self._curve.gradient_norm.append(norm)
        self._curve.seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()

    def _save(self, step: int, *, is_state_new: bool) -> None:
        is_checkpoint = step in self._plan.checkpoint_steps and step not in self._finished
        if not (is_checkpoint or is_state_new):
            return
        trainer, plan = self._trainer, self._plan
        # The step's own loss is of the weights before it.
        if not trainer.is_sound(step + 1):
            raise self._diverged("loss or gradient is not finite after the update", step)
        model, optimizer = trainer.state()
        if not trainer.accelerator.is_main_process:
            return
        loss = self._curve.loss[step - 1]
        if is_checkpoint:
            stats = {
                "tokens": step * plan.step_tokens,
                "parameters": trainer.parameters,
                "loss": loss,
                "made_with": self._curve.made_with,
            }
            save_checkpoint(self._storage, plan, step, trainer.causal, model, self._tokenizer, stats)
            self._finished.add(step)
            logging.getLogger(__name__).info(
                "series %s: checkpoint of step %d of %d, loss %.3f", plan.series, step, plan.steps, loss
            )
        if is_state_new:
            save_state(self._storage, plan, step, model, optimizer, self._curve)

    def _report(self, step: int) -> None:
        plan = self._plan
        what = f"tokens, training {plan.series} ({self._epochs:.1f} epochs)"
        self._progress(step * plan.step_tokens, plan.steps * plan.step_tokens, what)

    def _stats(self) -> dict[str, Any]:
        return {
            "epochs": self._epochs,
            "tokens": self._plan.steps * self._plan.step_tokens,
            "training_tokens": self._trainer.rows.epoch_length,
            "parameters": self._trainer.parameters,
        }

    def _diverged(self, what: str, step: int) -> TrainingError:
        plan = self._plan
        good = [kept for kept in self._finished if kept < step]
        kept = (
            f"the last good checkpoint is that of step {max(good)}, in "
            f"{self._storage.url(plan.checkpoint_folder(max(good)))}"
            if good
            else "no checkpoint had been saved before"
        )
        return TrainingError(
            f"series {plan.series}: {what} at step {step} of {plan.steps}; {kept}",
            hint=f"lower consolidation.train.learning_rate (now {plan.train.learning_rate:g}) or raise warm_up_share",
            stage=STAGE,
        )


def _place(made: dict[str, Any]) -> str:
    return f"{made['device']} in {made['precision']}"
