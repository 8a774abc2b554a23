"""One optimizer step of a training, in one process or many: the same code (PAPER 1.4).

`accelerate` decides what the model is wrapped in by how the process was started: nothing in one process,
DistributedDataParallel under `accelerate launch`, and FSDP2 there where `train.fsdp` asks for it. Each process takes
its share of a step's rows and the loss is divided by the targets of all, so that the number of processes and of
micro-batches changes a training by rounding only. On one machine and CPU a step is bit-exact.

Nothing in a step waits for the device. Every process builds the whole model before it is sharded: an 8B model in
float32 takes 32 GB of main memory a process for that while.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, cast

import torch

from infra.storage import Storage
from schemas.errors import ConfigError
from tasks.pretraining.model import PackedLanguageModel, count_parameters, make_optimizer
from tasks.pretraining.packing import PackedRows, Rows
from tasks.pretraining.plan import TrainingPlan
from tasks.pretraining.state import STAGE, load_tensors

_logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=2)
"""How long processes wait for the first one, which writes what all have computed."""


def launched_processes() -> int:
    """Processes of the launch that this one is part of; 1 outside of any."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shares(n_rows: int, processes: int, index: int, at_once: int) -> list[range]:
    """The rows of a step that one process takes, in micro-batches of `at_once` rows at most.

    Every process has as many micro-batches, so that all meet in each; some may be empty.
    """
    first, last = (n_rows * place // processes for place in (index, index + 1))
    n_parts = math.ceil(math.ceil(n_rows / processes) / at_once)
    bounds = [first + (last - first) * part // n_parts for part in range(n_parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


class Trainer:
    """A model, its optimizer and its rows, one optimizer step at a time.

    Args:
        plan: What is trained.
        rows: The packed training text.
        causal: A `LlamaForCausalLM` on the CPU.

    Raises:
        ConfigError: if a step has fewer rows than there are processes, the device cannot shard, or there is no compiler
            where one is asked for.
    """

    def __init__(self, plan: TrainingPlan, rows: PackedRows, causal: Any) -> None:
        self.plan, self.rows, self.causal = plan, rows, causal
        self.accelerator = _accelerator(plan)
        self.parameters = count_parameters(causal)
        model = PackedLanguageModel(causal, torch.bfloat16 if plan.is_bfloat16 else None)
        self.is_compiled = _is_compiled(plan, says_why=self.accelerator.is_main_process)
        if self.is_compiled:
            for block in causal.model.layers:
                block.compile()
        # FSDP looks for the optimizer's parameters among the model's: the optimizer first.
        self.model, self._optimizer = self.accelerator.prepare(model, make_optimizer(model, plan.train))
        self.model.train()

    @property
    def computes_with(self) -> dict[str, Any]:
        """What decides how a step is rounded: `device` (its type), `precision`, `compiled`, `processes`, `sharded`."""
        plan, n_processes = self.plan, self.accelerator.num_processes
        return {
            "device": plan.device.type,
            "precision": "bfloat16" if plan.is_bfloat16 else "float32",
            "compiled": self.is_compiled,
            "processes": n_processes,
            "sharded": plan.train.fsdp and n_processes > 1,
        }

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run optimizer step `number`, counted from 1.

        Returns:
            This process's part of the mean loss (nats, float64), and the gradient's norm before clipping.
        """
        plan, accelerator = self.plan, self.accelerator
        scale = 1 / plan.step_tokens
        loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        parts = self._parts(number)
        for index, (rows, weight) in enumerate(parts):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                summed = self._summed_loss(rows) * weight
                # Gradients are averaged over the processes; what is wanted is their sum.
                accelerator.backward(summed * (scale * accelerator.num_processes))
            loss += summed.detach() * scale
        norm = accelerator.clip_grad_norm_(self.model.parameters(), plan.train.max_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate(number)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss, _whole(norm)

    def is_sound(self, number: int) -> bool:
        """Whether loss and gradient of the first row of step `number` are finite; every process must ask."""
        loss = self._summed_loss(self.rows.rows((number - 1) * self.plan.rows_per_step, 1))
        self.accelerator.backward(loss / self.plan.context_size)
        norm = _whole(self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf))
        self._optimizer.zero_grad(set_to_none=True)
        return math.isfinite(float(loss.detach())) and math.isfinite(float(norm))

    def _summed_loss(self, rows: Rows) -> torch.Tensor:
        device = self.accelerator.device
        arguments = [
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (rows.input_ids, rows.position_ids, rows.labels)
        ]
        return cast(torch.Tensor, self.model(*arguments))

    def _parts(self, number: int) -> list[tuple[Rows, float]]:
        """This process's micro-batches of a step, and the weight of each: nothing for a row that stands in for none."""
        plan, accelerator = self.plan, self.accelerator
        at_once = max(1, (plan.train.micro_batch_tokens or plan.step_tokens) // plan.context_size)
        before = (number - 1) * plan.rows_per_step
        return [
            (self.rows.rows(before + part.start, max(1, len(part))), float(len(part) > 0))
            for part in shares(
                plan.rows_per_step, accelerator.num_processes, accelerator.process_index, at_once
            )
        ]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Full weights and optimizer state on the CPU; every process must ask, the first one is answered."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self._optimizer.optimizer, options=options)
        return cast(dict[str, torch.Tensor], model), dict(optimizer)

    def load(self, storage: Storage, step: int) -> None:
        """Put weights and optimizer back to where they were after a step; every process must."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        # set_state_dict would leave the model alone in a process that gives it no weights.
        is_shared = self.accelerator.num_processes > 1
        _, optimizer = self.state()
        model: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            model, optimizer["state"] = load_tensors(storage, self.plan, step)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_shared)
        set_model_state_dict(self.model, model, options=options)
        set_optimizer_state_dict(self.model, self._optimizer.optimizer, optimizer, options=options)

    def close(self) -> None:
        """Free the model."""
        self.model, self._optimizer, self.causal = self.accelerator.free_memory(
            self.model, self._optimizer, self.causal
        )


def _accelerator(plan: TrainingPlan) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

    is_cpu = plan.device.type == "cpu"
    sharded = None
    if plan.train.fsdp and launched_processes() == 1:
        _logger.warning(
            "consolidation.train.fsdp does nothing for series %s: it is trained in one process, and a model is "
            "sharded over several (on several GPUs; see consolidation.train.processes)",
            plan.series,
        )
    if plan.train.fsdp and launched_processes() > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        low = torch.bfloat16 if plan.is_bfloat16 else None
        sharded = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            mixed_precision_policy=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
            cpu_ram_efficient_loading=False,
        )
    # bfloat16 is the model's own doing (PackedLanguageModel), so that one process can train in either.
    accelerator = Accelerator(
        cpu=is_cpu,
        mixed_precision="no",
        fsdp_plugin=sharded,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if sharded is not None and not accelerator.is_fsdp2:
        raise ConfigError(
            f"consolidation.train.fsdp: accelerate shards over GPUs, and series {plan.series} is trained on "
            f"{plan.device.type}",
            hint="leave fsdp out",
            stage=STAGE,
        )
    if plan.rows_per_step < accelerator.num_processes:
        raise ConfigError(
            f"series {plan.series}: a step has {plan.rows_per_step} rows for {accelerator.num_processes} processes",
            hint="raise consolidation.train.batch_tokens, or lower consolidation.train.processes",
            stage=STAGE,
        )
    if is_cpu and accelerator.num_processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // accelerator.num_processes))
    return accelerator


def _is_compiled(plan: TrainingPlan, *, says_why: bool) -> bool:
    """Whether blocks run through torch.compile; where it is merely `auto`, not without a compiler.

    Raises:
        ConfigError: if it is asked for and there is no compiler.
    """
    asked, is_cuda = plan.train.compile, plan.device.type == "cuda"
    if asked == "off" or (asked == "auto" and not is_cuda):
        return False
    # Triton builds the launchers of its kernels in C; on a CPU the kernels themselves are C++.
    language, variable, names = (
        ("C", "CC", ("gcc", "clang")) if is_cuda else ("C++", "CXX", ("g++", "clang++"))
    )
    named = os.environ.get(variable)
    if any(shutil.which(name) for name in ((named,) if named else names)):
        return True
    missing = f"a {language} compiler on {plan.device.type}, and there is none"
    way_out = f"install {names[0]}, or name one in {variable}"
    if asked == "on":
        raise ConfigError(
            f"consolidation.train.compile = on needs {missing}",
            hint=f"{way_out}, or set it to off",
            stage=STAGE,
        )
    if says_why:
        _logger.warning(
            "series %s is trained without torch.compile, more slowly: it needs %s (%s)",
            plan.series,
            missing,
            way_out,
        )
    return False


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """A norm that may be sharded, as a plain tensor."""
    from torch.distributed.tensor import DTensor

    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach()
