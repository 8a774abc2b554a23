"""Where a model runs, and in which number format.

The format is part of what is computed, so it is part of every key. `model.dtype = "auto"` is therefore decided once a
storage: the machine that runs a model first writes down its choice, and every other one (a worker with a GPU, a laptop
that asks for the status, a flow of the CPU pool that makes the tables) follows it and finds what is there.
"""

from __future__ import annotations

import logging

import torch

from infra.cluster import available_cores
from infra.errors import ModelError
from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Model
from tasks.model_files import IN_STORAGE, load_config_of, weights_identity

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    Raises:
        ModelError: if a CUDA device is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device = {name!r} is no device", hint="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"model.device = {name!r}, but this machine has no CUDA device", hint="use auto or cpu"
        )
    return device


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
    """The format that a model runs in: the one named; for `auto` the storage's, else what this machine would choose.

    A machine chooses float32 on a CPU (bfloat16 is six times slower there), the checkpoint's own on CUDA.

    Raises:
        ModelError: if the model has no configuration, or the storage's choice is none of the known formats.
    """
    if model.dtype != "auto":
        return _FORMATS[model.dtype]
    # Weights that were trained here are float32, on any device.
    settled = None if _is_own(model) else storage.read_json(_place(model, storage))
    if settled is None:
        return _own_choice(model, storage)
    name = settled.get("dtype") if isinstance(settled, dict) else None
    if name not in _FORMATS:
        raise ModelError(
            f"{storage.url(_place(model, storage))} names no number format",
            hint="delete it, or set model.dtype",
        )
    return _FORMATS[name]


def settle_dtype(model: Model, storage: Storage) -> torch.dtype:
    """Make this machine's choice that of the storage where `auto` was not decided yet; return what holds.

    Called where work on a model begins, before it is given to others.

    Raises:
        ModelError: as `resolve_dtype`.
    """
    dtype = resolve_dtype(model, storage)
    if model.dtype != "auto" or _is_own(model):
        return dtype
    if not storage.exists(_place(model, storage)):
        storage.write_json(
            _place(model, storage), {"model": model.name, "dtype": str(dtype).removeprefix("torch.")}
        )
    elif model.device != "cpu" and torch.cuda.is_available() and _own_choice(model, storage) != dtype:
        _logger.warning(
            "%s runs in %s, as where %s was begun; model.dtype = '%s' would compute everything again in this "
            "GPU's format",
            *(model.name, str(dtype).removeprefix("torch."), storage.root),
            str(_own_choice(model, storage)).removeprefix("torch."),
        )
    return dtype


def _own_choice(model: Model, storage: Storage) -> torch.dtype:
    # A client without a GPU may ask its workers for one.
    is_cuda = model.device.startswith("cuda") or choose_device(model.device).type == "cuda"
    own = getattr(load_config_of(model, storage), "dtype", None) if is_cuda else None
    return own if isinstance(own, torch.dtype) and own in _FORMATS.values() else torch.float32


def _is_own(model: Model) -> bool:
    return model.name.startswith(IN_STORAGE)


def _place(model: Model, storage: Storage) -> str:
    return f"dtypes/{content_key(weights=weights_identity(model, storage))}.json"
