"""`tasks.pretraining.worker` as a program that can die on the way, and that can shard over CPU processes.

`python tests/training_program.py CONFIG SERIES [--die-at-step N] [--die-at-write N] [--sharded]`

With both ways to die it trains twice, each time in a copy of itself, as importing takes longer than that, and prints
how the copies ended and which states each left.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import plain
from trained import Training

from schemas.config import Config
from tasks.pretraining import worker as pretraining_worker
from tasks.pretraining.trainer import Trainer


def _die_at_step(number: int) -> None:
    step = Trainer.step

    def deadly(self: Trainer, at: int) -> Any:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, at)

    Trainer.step = deadly  # type: ignore[method-assign]


def _take_processes_for_gpus() -> None:
    """accelerate shards over what it takes for GPUs only; FSDP2 itself runs on a CPU, over gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch import distributed

    def prepare_backend(*_: object, **__: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = prepare_backend
    distributed.init_process_group("gloo")


def _die_in_copies(ways: list[Callable[[], None]], config: Config, arguments: argparse.Namespace) -> None:
    for library in ("accelerate", "transformers.models.llama.modeling_llama"):
        import_module(library)
    for prepare in ways:
        if (child := os.fork()) == 0:
            prepare()
            pretraining_worker.work(config, arguments.series)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(ended, *Training(arguments.config.parent).states(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("series")
    parser.add_argument("--die-at-step", type=int)
    parser.add_argument("--die-at-write", type=int, help="in the middle of the nth file below training/")
    parser.add_argument("--sharded", action="store_true")
    arguments = parser.parse_args()
    config = Config.model_validate_json(arguments.config.read_text())
    die: list[Callable[[], None]] = []
    if arguments.die_at_step is not None:
        die.append(partial(_die_at_step, arguments.die_at_step))
    if arguments.die_at_write is not None:
        die.append(partial(plain._killing, "training/", arguments.die_at_write))
    if len(die) > 1:
        _die_in_copies(die, config, arguments)
        return
    for prepare in die:
        prepare()
    if arguments.sharded:
        _take_processes_for_gpus()
    pretraining_worker.work(config, arguments.series)
    pretraining_worker._leave_group()


if __name__ == "__main__":
    main()
