"""Language models and their residual streams.

The residual stream after decoder block L is the output of that block's module, read by a forward hook; the
deepest hook asked for raises, so that later blocks, the final norm and the head never run. The field's other
way, `output_hidden_states`, gives the last block's output *after* the final norm and runs every block.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.cluster import available_cores
from infra.errors import ModelError
from infra.hashing import file_hash, folder_hash
from infra.manifest import Manifest, commit, content_key, load
from infra.storage import Storage
from schemas.config import Config, Model
from tasks.tokenizers import LoadedTokenizer, load_tokenizer

CONVERSION_VERSION = 1
IN_STORAGE = "storage:"
"""Begins the name of a model that lies in a folder of the storage, named by content: `storage:checkpoints/<key>`."""

_WEIGHT_SUFFIXES = (".json", ".safetensors")

Residuals = Callable[[int, torch.Tensor], None]
"""Called by a forward as `receive(layer, hidden)`, hidden of shape (batch, padded length, d_model)."""


class _DeepestReached(Exception):
    """Raised inside the deepest hook to stop a forward that has given all it was asked for."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A decoder on its device, ready for forwards that stop early.

    Attributes:
        module: The transformers model without its head.
        blocks: Its decoder blocks.
        device: Where it is.
        dtype: Of its weights and residual stream.
        key: Content key of its weights, configuration and dtype.
        context_length: Positions it was built for; None where it says nothing.
    """

    module: Any
    blocks: torch.nn.ModuleList
    d_model: int
    device: torch.device
    dtype: torch.dtype
    key: str
    context_length: int | None

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @torch.inference_mode()
    def forward(self, input_ids: torch.Tensor, layers: list[int], receive: Residuals) -> None:
        """Run right-padded windows up to the deepest of `layers`.

        No mask is given: in a causal model no real position sees what is to its right.

        Args:
            input_ids: (batch, padded length), any device.
            layers: Blocks whose output is wanted.
            receive: Called once for each, from shallow to deep.
        """
        with _hooks(self.blocks, layers, receive):
            try:
                self.module(input_ids=input_ids.to(self.device), use_cache=False)
            except _DeepestReached:
                return
        raise ModelError(f"the forward ended before block {max(layers)} was reached")


@contextmanager
def _hooks(blocks: torch.nn.ModuleList, layers: list[int], receive: Residuals) -> Iterator[None]:
    deepest = max(layers)

    def hook_for(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            receive(layer, output[0] if isinstance(output, tuple) else output)
            if layer == deepest:
                raise _DeepestReached

        return hook

    handles = [blocks[layer].register_forward_hook(hook_for(layer)) for layer in sorted(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def model_dimensions(model: Model, storage: Storage) -> tuple[int, int]:
    """(d_model, number of decoder blocks), from the model's configuration alone."""
    config = _text_config(load_config_of(model, storage))
    return int(config.hidden_size), int(config.num_hidden_layers)


def context_length(model: Model, storage: Storage) -> int | None:
    """Positions that the model was built for; None where its configuration says nothing."""
    positions = getattr(_text_config(load_config_of(model, storage)), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def check_windows(config: Config, positions: int | None) -> None:
    """Whether a window fits into the model.

    Raises:
        ModelError: if not.
    """
    if positions is not None and config.windows.context_size > positions:
        raise ModelError(
            f"windows.context_size = {config.windows.context_size} is more than {config.model.name} was built "
            f"for ({positions})",
            hint=f"set windows.context_size to {positions} or less",
        )


def load_config_of(model: Model, storage: Storage) -> Any:
    """The transformers configuration of a model.

    Raises:
        ModelError: if there is none at that name.
    """
    from transformers import AutoConfig

    with _explained(model):
        return AutoConfig.from_pretrained(*_location(model, storage), **_revision(model))


def model_key(model: Model, storage: Storage) -> str:
    """Content key of weights, configuration, and the dtype they run in (see `resolve_dtype`)."""
    return content_key(weights=_weights_identity(model, storage), dtype=str(resolve_dtype(model, storage)))


def resolve_dtype(model: Model, storage: Storage) -> torch.dtype:
    """float32 on a CPU (bfloat16 is six times slower there), the checkpoint's own on CUDA, unless named."""
    if model.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[model.dtype]
    if choose_device(model.device).type == "cpu":
        return torch.float32
    own = getattr(load_config_of(model, storage), "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.float32


def load_model(model: Model, storage: Storage) -> LoadedModel:
    """Load a decoder without its head.

    A GGUF file is converted to safetensors once, under `models/` in the storage, which loads 20 times faster.

    Raises:
        ModelError: if it cannot be loaded or has no recognizable decoder blocks.
    """
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device, dtype = choose_device(model.device), resolve_dtype(model, storage)
    if device.type == "cpu":
        # Products split over another number of threads round differently, and Dask gives its workers one:
        # without this, features at the threshold would depend on who computed them.
        torch.set_num_threads(model.threads or available_cores())
    with _explained(model):
        module = AutoModel.from_pretrained(*_location(model, storage), **_revision(model), dtype=dtype)
    module.eval().requires_grad_(False)
    module.to(device)
    config = _text_config(module.config)
    return LoadedModel(
        module=module,
        blocks=_decoder_blocks(module, int(config.num_hidden_layers), model.name),
        d_model=int(config.hidden_size),
        device=device,
        dtype=dtype,
        key=model_key(model, storage),
        context_length=context_length(model, storage),
    )


def _decoder_blocks(module: Any, n_layers: int, name: str) -> torch.nn.ModuleList:
    for _, child in module.named_modules():
        if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers:
            return child
    raise ModelError(
        f"model {name}: found no list of {n_layers} decoder blocks in {type(module).__name__}",
        hint="decoder-only models of transformers are supported",
    )


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_gguf(model: Model) -> bool:
    """Whether the model is a GGUF file."""
    return model.name.lower().endswith(".gguf")


def _location(model: Model, storage: Storage) -> tuple[str]:
    if is_gguf(model):
        return (str(converted_gguf(model, storage)),)
    if model.name.startswith(IN_STORAGE):
        return (str(local_model_folder(model.name, storage)),)
    refuse_missing_folder(model.name, "model.name")
    return (model.name,)


def local_model_folder(name: str, storage: Storage) -> Path:
    """The local folder of a model or tokenizer that lies in the storage (`storage:<folder>`)."""
    return storage.local_folder(name.removeprefix(IN_STORAGE))


def refuse_missing_folder(name: str, key: str) -> None:
    """Whether a name that can only be a path leads somewhere; a hub would be asked in vain, and for long.

    Raises:
        ModelError: if it does not.
    """
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ModelError(f"{key} = {name}: no such directory", hint="check the path, or give a hub id")


def _revision(model: Model) -> dict[str, str]:
    local = is_gguf(model) or model.name.startswith(IN_STORAGE) or Path(model.name).is_dir()
    return {"revision": model.revision} if model.revision and not local else {}


def _weights_identity(model: Model, storage: Storage) -> str:
    if is_gguf(model):
        return f"gguf:{_gguf_hash(model)}:{CONVERSION_VERSION}"
    if model.name.startswith(IN_STORAGE):
        return model.name
    folder = Path(model.name)
    if folder.is_dir():
        return f"folder:{folder_hash(folder, _WEIGHT_SUFFIXES)}"
    commit_hash = getattr(load_config_of(model, storage), "_commit_hash", None)
    if not commit_hash:
        raise ModelError(
            f"model {model.name}: its hub commit is unknown", hint="name a local directory instead"
        )
    return f"hub:{model.name}:{commit_hash}"


def _gguf_hash(model: Model) -> str:
    path = Path(model.name)
    if not path.is_file():
        raise ModelError(f"model.name = {model.name}: no such file", hint="`make assets` fetches the demo's")
    return file_hash(path)


def converted_gguf(model: Model, storage: Storage) -> Path:
    """The folder with a GGUF model and its tokenizer in Hugging Face format, converted at the first call."""
    key = content_key(gguf=_gguf_hash(model), version=CONVERSION_VERSION)
    folder = f"models/{key}"
    if load(storage, folder) is None:
        with tempfile.TemporaryDirectory() as aside, _explained(model):
            _convert(Path(model.name), Path(aside))
            storage.delete(folder)
            storage.upload(Path(aside), folder)
        commit(storage, folder, Manifest(stage="model", inputs={"gguf": Path(model.name).name, "key": key}))
    return storage.local_folder(folder)


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    module = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    # A model that remembers being quantized refuses to be saved.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(module, name):
            delattr(module, name)
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


@contextmanager
def _explained(model: Model) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, json.JSONDecodeError, shutil.Error) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load model.name = {model.name}: {first_line}",
            hint="give a directory with config.json and safetensors, a hub id, or a .gguf file",
        ) from error


__all__ = ["LoadedModel", "LoadedTokenizer", "load_model", "load_tokenizer", "model_dimensions", "model_key"]
