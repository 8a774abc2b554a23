"""Where a model runs, and in which number format.

The format is part of what is computed, so it is part of every key. `model.dtype = "auto"` is therefore decided once a
storage: the machine that runs a model first writes down its kind, and every other one (a worker with a GPU, a laptop
that asks for the status, a flow of the CPU pool that makes the tables) follows it and finds what is there.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from infra.cluster import available_cores, extraction_client
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError
from tasks.models.files import IN_STORAGE, load_config_of

PLACE = "dtype.json"
"""Which kind of machine `auto` is decided by: `{"auto": "cpu"}` or `{"auto": "cuda"}`."""

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ModelError: if a CUDA device is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_called(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model.device = {name!r}, but this machine has no CUDA device", hint="use auto or cpu"
        )
    return device


def device_called(name: str) -> torch.device:
    """A device, whether or not this machine has one; `auto` stays open and is told as the CPU.

    Raises:
        ModelError: if there is no such kind of device.
    """
    try:
        return torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ModelError(f"model.device = {name!r} is no device", hint="auto, cpu, cuda or cuda:N") from error


def prepared_device(model: Model) -> torch.device:
    """The model's device, with the process set up for it: threads on a CPU, no progress bars of transformers.

    Raises:
        ModelError: if a device is asked for that is not there.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = choose_device(model.device)
    if device.type == "cpu":
        # Products split over another number of threads round differently, and Dask gives its workers one:
        # without this, features at the threshold would depend on who computed them.
        torch.set_num_threads(model.threads or available_cores())
    return device


def usable_devices(model: Model) -> int:
    """Devices that can hold a copy of the model each: all GPUs, unless one is named; else one."""
    is_any_cuda = model.device in {"auto", "cuda"} and choose_device(model.device).type == "cuda"
    return torch.cuda.device_count() if is_any_cuda else 1


def resolve_dtype(model: Model, storage: Storage) -> torch.dtype:
    """The format that a model runs in: the one named, or for `auto` that of the kind of machine.

    It is float32 on a CPU (bfloat16 is six times slower there), the checkpoint's own on CUDA. The kind of machine is
    the storage's where that is settled, else this one's.

    Raises:
        ModelError: if the model has no configuration, or what the storage says is no kind of machine.
    """
    if model.dtype != "auto":
        return _FORMATS[model.dtype]
    # Weights that were trained here are float32 on any machine.
    if model.name.startswith(IN_STORAGE) or _kind(model, storage) == "cpu":
        return torch.float32
    own = getattr(load_config_of(model, storage), "dtype", None)
    return own if isinstance(own, torch.dtype) and own in _FORMATS.values() else torch.float32


def settle_dtype(model: Model, storage: Storage) -> torch.dtype:
    """`settle`, and the model's format then; raises as `resolve_dtype`."""
    settle(model, storage)
    return resolve_dtype(model, storage)


def settle(model: Model, storage: Storage) -> None:
    """Make this kind of machine that of the storage where `auto` was not decided yet.

    Called where work on a model begins, before it is given to others.

    Raises:
        ModelError: if what the storage says is no kind of machine.
    """
    if model.dtype == "auto" and not model.name.startswith(IN_STORAGE):
        if not storage.exists(PLACE):
            storage.write_json(PLACE, {"auto": _own_kind(model)})
        elif _kind(model, storage) == "cpu" and model.device != "cpu" and torch.cuda.is_available():
            _logger.warning(
                "%s runs in float32, as where %s was begun, on a CPU; model.dtype = 'bfloat16' suits this GPU better, "
                "and computes everything again",
                *(model.name, storage.root),
            )


def _kind(model: Model, storage: Storage) -> str:
    settled = storage.read_json(PLACE)
    if settled is None:
        return _own_kind(model)
    kind = settled.get("auto") if isinstance(settled, dict) else None
    if kind not in {"cpu", "cuda"}:
        raise ModelError(
            f"{storage.url(PLACE)} names no kind of machine", hint="delete it, or set model.dtype"
        )
    return str(kind)


def _own_kind(model: Model) -> str:
    # A client without a GPU may ask its workers for one.
    is_cuda = model.device.startswith("cuda") or choose_device(model.device).type == "cuda"
    return "cuda" if is_cuda else "cpu"


def device_client(config: Config, n_groups: int) -> AbstractContextManager[Any]:
    """A Dask client whose workers have a device each, or None where this process works as well (`infra.cluster`)."""
    return extraction_client(config.dask, partial(usable_devices, config.model), n_groups)
