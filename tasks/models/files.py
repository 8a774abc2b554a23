"""Where a model's files are, and what identifies them: a local folder, a hub id, the storage, or a GGUF file."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import verified
from infra.hashing import file_hash, folder_hash
from infra.manifest import Manifest, commit, content_key, load
from infra.storage import Storage
from schemas.config import Model
from schemas.errors import FunctokError, ModelError, whole_message
from tasks.models.tokenizer_files import find_file, read_as_gguf_says

CONVERSION_VERSION = 2
IN_STORAGE = "storage:"
"""Begins the name of a model that lies in a folder of the storage, named by content: `storage:checkpoints/<key>`."""

_WEIGHT_SUFFIXES = (".json", ".safetensors", ".bin")

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_construction = threading.RLock()


def location(model: Model, storage: Storage) -> str:
    """What transformers calls `pretrained_model_name_or_path`: a local folder or a hub id.

    A GGUF file is converted at the first call.

    Raises:
        ModelError: if the name can only be a path and leads nowhere.
    """
    if is_gguf(model):
        return str(converted_gguf(model, storage))
    if model.name.startswith(IN_STORAGE):
        return str(local_model_folder(model.name, storage))
    refuse_missing_folder(model.name, "model.name")
    return model.name


def revision(model: Model) -> dict[str, str]:
    """The keyword `revision` for transformers, where the model is on a hub and has one."""
    local = is_gguf(model) or model.name.startswith(IN_STORAGE) or Path(model.name).is_dir()
    return {"revision": model.revision} if model.revision and not local else {}


def local_model_folder(name: str, storage: Storage) -> Path:
    """The local folder of a model or tokenizer that lies in the storage (`storage:<folder>`)."""
    return verified.local_folder(storage, name.removeprefix(IN_STORAGE))


def refuse_missing_folder(name: str, key: str) -> None:
    """Whether a name that can only be a path leads somewhere; a hub would be asked in vain, and for long.

    Raises:
        ModelError: if it does not.
    """
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ModelError(f"{key} = {name}: no such directory", hint="check the path, or give a hub id")


def load_config_of(model: Model, storage: Storage) -> Any:
    """The transformers configuration of a model.

    Raises:
        ModelError: if there is none at that name.
    """
    from transformers import AutoConfig

    place = location(model, storage)
    refuse_adapters(model, place)
    with explained(model):
        return AutoConfig.from_pretrained(place, **revision(model))


def refuse_adapters(model: Model, place: str) -> None:
    """Whether nothing lies beside the weights that would change the model and is not read.

    Raises:
        ModelError: naming the adapter, and how it is merged.
    """
    found = _adapter(model, place)
    if found is None:
        return
    name, base = found
    on = f" on {base}" if base else ""
    code = (
        f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base or "BASE"}"), "{model.name}")'
        '.merge_and_unload().save_pretrained("merged")'
    )
    raise ModelError(
        f"model {model.name} holds an adapter (LoRA, {name}){on}, which is not read",
        hint=f"merge it and save its base's tokenizer beside it, then give that folder: {code}; or, to study the base "
        "alone, move the adapter's files out of the folder",
    )


def _adapter(model: Model, place: str) -> tuple[str, str] | None:
    """The file that tells of an adapter, and the model that it is for."""
    folder = Path(place)
    if folder.is_dir():
        name = next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
        configuration = folder / _ADAPTER_FILES[0]
    else:
        with explained(model):
            cached = find_file(place, _ADAPTER_FILES[0], model.revision)
        name, configuration = (None, Path()) if cached is None else (_ADAPTER_FILES[0], cached)
    if name is None:
        return None
    try:
        base = json.loads(configuration.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    except (OSError, ValueError, AttributeError):
        base = ""
    return name, str(base)


def weights_identity(model: Model, storage: Storage) -> str:
    """What changes with the content of weights and configuration.

    Raises:
        ModelError: if the model is on a hub that does not say its commit.
    """
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


def is_gguf(model: Model) -> bool:
    """Whether the model is a GGUF file."""
    return model.name.lower().endswith(".gguf")


def converted_gguf(model: Model, storage: Storage) -> Path:
    """The folder with a GGUF model and its tokenizer in Hugging Face format, converted at the first call."""
    key = content_key(gguf=_gguf_hash(model), version=CONVERSION_VERSION)
    folder = f"models/{key}"
    if load(storage, folder) is None:
        with tempfile.TemporaryDirectory() as aside, explained(model):
            _convert(Path(model.name), Path(aside))
            storage.delete(folder)
            written = storage.upload(Path(aside), folder)
        manifest = Manifest(stage="model", inputs={"gguf": Path(model.name).name, "key": key})
        commit(storage, folder, manifest, written)
    return verified.local_folder(storage, folder)


def _gguf_hash(model: Model) -> str:
    path = Path(model.name)
    if not path.is_file():
        raise ModelError(f"model.name = {model.name}: no such file", hint="`make assets` fetches the demo's")
    return file_hash(path)


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    read_as_gguf_says(tokenizer.backend_tokenizer, source)
    module = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # A model that remembers being quantized refuses to be saved.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(module, name):
            delattr(module, name)
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


@contextmanager
def constructed_alone() -> Iterator[None]:
    """Let no other thread of this process construct or load a transformers model meanwhile.

    `from_pretrained` takes weight tying out of `PreTrainedModel` itself while it constructs: two threads that load
    at once can leave it out for good, and every later model of the process has a head of random or no weights.
    """
    with _construction:
        yield


@contextmanager
def explained(model: Model) -> Iterator[None]:
    """Turn what transformers raises while it loads a model into a `ModelError` that names it."""
    try:
        with constructed_alone():
            yield
    except FunctokError:
        raise
    except Exception as error:
        cause, hint = _cause(error)
        raise ModelError(f"cannot load the model {model.name}: {cause}", hint=hint) from error


def _cause(error: Exception) -> tuple[str, str]:
    """What a library said when it could not load a model, and the way out."""
    from safetensors import SafetensorError

    said = whole_message(error)
    if "ignore_mismatched_sizes" in said:
        return (
            "its weights have other shapes than its config.json says",
            "give the config.json that belongs to these weights",
        )
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged or half copied ({said})", "copy it again"
    if "trust_remote_code" in said or "custom code" in said:
        return (
            f"its repository brings code of its own, which is not run here ({said})",
            "choose a model whose architecture is part of transformers, or save it converted to one",
        )
    if isinstance(error, ImportError):
        return (
            said,
            "install the package that it names; or give the model's weights unquantized (float32, bfloat16)",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"there is not enough memory ({said})",
            "choose model.dtype = 'bfloat16', or a machine with more",
        )
    if isinstance(error, (OSError, ValueError, KeyError, RuntimeError, shutil.Error)):
        return said, "give a directory with config.json and safetensors, a hub id, or a .gguf file"
    return (
        whole_message(error, with_type=True),
        "see the traceback with --debug; a decoder of transformers' own architectures is expected",
    )
