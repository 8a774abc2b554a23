"""What a training leaves in the storage: states to go on from, checkpoints, and its loss curve.

A state is everything that the next step depends on: weights, AdamW's moments and step counts, the random
generators (nothing in the loop draws from them; they are kept so that this stays true of a model that does), and
the loss curve so far. The schedule and the position in the data are functions of the step. It is one
safetensors file, whole, also of a sharded model: memory for a copy of weights and moments on the first process (12
bytes a parameter, twice that while one is read back). PyTorch's sharded checkpoints would need less, but pickle
their index.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from infra import verified
from infra.manifest import Manifest, commit, load_all
from infra.storage import Storage
from schemas.tables import SHARD_FILES
from tasks.models.tokenizers import LoadedTokenizer
from tasks.pretraining.plan import TrainingPlan

STAGE = "checkpoints"
LOSSES = "losses.parquet"
_HEAD, _EMBEDDING = "causal.lm_head.weight", "causal.model.embed_tokens.weight"

Tensors = dict[str, torch.Tensor]


@dataclass
class Curve:
    """The training so far, one entry a step.

    Attributes:
        loss: Mean loss in nats over the step's targets, before its update.
        gradient_norm: Norm of the step's gradient before clipping.
        seconds: Spent on all steps, on the clock.
        made_with: What the steps were computed with (`Trainer.computes_with`), one entry each time it changed, from the
            step behind `after_step` on.
    """

    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: float = 0.0
    made_with: list[dict[str, Any]] = field(default_factory=list)

    def table(self, plan: TrainingPlan) -> pa.Table:
        """The rows of `losses.parquet`."""
        steps = np.arange(1, len(self.loss) + 1)
        rates = [plan.learning_rate(int(step)) for step in steps]
        columns = [steps, steps * plan.step_tokens, self.loss, rates, self.gradient_norm]
        return pa.table(columns, schema=SHARD_FILES["training_losses"])


def finished_checkpoints(storage: Storage, plan: TrainingPlan) -> dict[int, Manifest]:
    """Those of the wanted checkpoints that are there, by step."""
    folders = {step: plan.checkpoint_folder(step) for step in plan.checkpoint_steps}
    done = load_all(storage, folders.values())
    return {step: done[folder] for step, folder in folders.items() if folder in done}


def is_trained(storage: Storage, plan: TrainingPlan) -> bool:
    """Whether a training is at its end and all of its wanted checkpoints are there."""
    folders = {plan.folder, *map(plan.checkpoint_folder, plan.checkpoint_steps)}
    return folders == set(load_all(storage, sorted(folders)))


def newest_state(storage: Storage, plan: TrainingPlan, finished: Collection[int]) -> int:
    """The step to go on from: that of the newest state before which no checkpoint is missing; 0 for none."""
    missing = [step for step in plan.checkpoint_steps if step not in finished]
    found = load_all(storage, [_state_folder(plan, step) for step in _state_steps(storage, plan)])
    steps = [int(manifest.stats["step"]) for manifest in found.values()]
    return max((step for step in steps if all(step <= other for other in missing)), default=0)


def save_state(
    storage: Storage, plan: TrainingPlan, step: int, model: Tensors, optimizer: dict[str, Any], curve: Curve
) -> None:
    """Save the state after a step, and then delete all others.

    Full weights by name, and the full optimizer state as `torch.distributed.checkpoint.state_dict` gives it.
    """
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in _without_tied_head(plan, model).items()}
    for name, moments in optimizer["state"].items():
        tensors |= {f"optimizer.{name}.{kind}": torch.as_tensor(value) for kind, value in moments.items()}
    small = {
        "random.cpu": torch.get_rng_state(),
        "curve.loss": torch.tensor(curve.loss, dtype=torch.float64),
        "curve.gradient_norm": torch.tensor(curve.gradient_norm, dtype=torch.float64),
    }
    if plan.device.type == "cuda":
        small["random.cuda"] = torch.cuda.get_rng_state()
    folder = _state_folder(plan, step)
    storage.delete(folder)
    with tempfile.TemporaryDirectory() as aside:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, Path(aside, "state.safetensors")
        )
        save_file(small, Path(aside, "curve.safetensors"))
        written = storage.upload(Path(aside), folder)
    stats = {"step": step, "seconds": curve.seconds, "made_with": curve.made_with}
    commit(storage, folder, Manifest(stage=STAGE, inputs={"training": plan.key}, stats=stats), written)
    delete_states(storage, plan, but=step)


def delete_states(storage: Storage, plan: TrainingPlan, but: int | None = None) -> None:
    """Delete the training's states, all or all but one."""
    for step in _state_steps(storage, plan):
        if step != but:
            storage.delete(_state_folder(plan, step))


def load_curve(storage: Storage, plan: TrainingPlan, step: int) -> Curve:
    """The loss curve of a state; also sets the random generators to where they were."""
    from safetensors.torch import load

    folder = _state_folder(plan, step)
    small = load(verified.read_bytes(storage, f"{folder}/curve.safetensors"))
    torch.set_rng_state(small["random.cpu"])
    if plan.device.type == "cuda" and "random.cuda" in small:
        torch.cuda.set_rng_state(small["random.cuda"])
    stats = load_all(storage, [folder])[folder].stats
    return Curve(
        loss=small["curve.loss"].tolist(),
        gradient_norm=small["curve.gradient_norm"].tolist(),
        seconds=float(stats["seconds"]),
        made_with=stats["made_with"],
    )


def load_tensors(storage: Storage, plan: TrainingPlan, step: int) -> tuple[Tensors, dict[str, Tensors]]:
    """Full weights by name, and the optimizer's moments by name of the parameter, of a state."""
    from safetensors.torch import load

    tensors = load(verified.read_bytes(storage, f"{_state_folder(plan, step)}/state.safetensors"))
    model: Tensors = {}
    moments: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        if part == "model":
            model[rest] = tensor
        else:
            parameter, kind = rest.rsplit(".", 1)
            moments.setdefault(parameter, {})[kind] = tensor
    if plan.shape.tie_embeddings:
        model[_HEAD] = model[_EMBEDDING]
    return model, moments


def save_checkpoint(
    storage: Storage,
    plan: TrainingPlan,
    step: int,
    causal: Any,
    model: Tensors,
    tokenizer: LoadedTokenizer,
    stats: dict[str, Any],
) -> None:
    """Save a checkpoint in Hugging Face format, with the corpus' tokenizer: the folder loads by itself.

    Full weights are given by name, as those of the transformers model, which gives its configurations, may be sharded.
    `stats` are `tokens`, `parameters`, the `loss` of the step, and what the weights were `made_with`.
    """
    weights = {
        name.removeprefix("causal."): tensor for name, tensor in _without_tied_head(plan, model).items()
    }
    folder = plan.checkpoint_folder(step)
    storage.delete(folder)
    with tempfile.TemporaryDirectory() as aside:
        causal.save_pretrained(aside, state_dict=weights)
        tokenizer.tokenizer.save_pretrained(aside)
        written = storage.upload(Path(aside), folder)
    inputs = {"training": plan.key, "step": step, "series": plan.series}
    commit(storage, folder, Manifest(stage=STAGE, inputs=inputs, stats={"step": step, **stats}), written)


def finish(storage: Storage, plan: TrainingPlan, curve: Curve, stats: dict[str, Any]) -> None:
    """Save the loss curve, commit the training, and delete its states."""
    written = storage.write_parquet(f"{plan.folder}/{LOSSES}", curve.table(plan))
    known = {"steps": plan.steps, "seconds": round(curve.seconds, 3), "made_with": curve.made_with}
    manifest = Manifest(stage=STAGE, inputs=plan.inputs, stats=known | stats)
    commit(storage, plan.folder, manifest, [written])
    delete_states(storage, plan)


def _without_tied_head(plan: TrainingPlan, model: Tensors) -> Tensors:
    """Safetensors keep no tensor twice."""
    return {
        name: tensor for name, tensor in model.items() if not (plan.shape.tie_embeddings and name == _HEAD)
    }


def _state_folder(plan: TrainingPlan, step: int) -> str:
    return f"{plan.folder}/state-{step:08d}"


def _state_steps(storage: Storage, plan: TrainingPlan) -> list[int]:
    """Steps of all state folders, finished or not."""
    pattern = re.compile(rf"{re.escape(plan.folder)}/state-(\d+)/")
    found = (pattern.match(name) for name in storage.sizes(plan.folder))
    return sorted({int(match[1]) for match in found if match})
