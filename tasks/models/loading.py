"""Loading a transformers model so that it is the one which its files hold, or not at all.

transformers fills what the files lack with random numbers, leaves out what its class does not know, and logs both.
Here either is an error that names the folder and the first weights. `model_outline` asks the same of the files'
headers alone, on PyTorch's meta device: no weight is read, so it comes before any work.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from infra.storage import Storage
from schemas.config import Model
from schemas.errors import ModelError
from tasks.models.devices import prepared_device, settle_dtype
from tasks.models.files import explained, load_config_of, location, refuse_adapters, revision

logger = logging.getLogger(__name__)

_WRAPPER = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|^module)\."
"""What torch.compile, FSDP, activation checkpointing and DataParallel put into names."""

_WRAPPED_AT_MOST = 4

_POOLER = re.compile(r"(^|\.)pooler\.")
"""What sums a sequence up behind the last block: nothing here reads it, and many checkpoints lack it."""

_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""Masks and frequencies that older versions saved and current ones compute."""

_PROBE_TOKENS = 4
_SHOWN = 3


def load_module(model: Model, storage: Storage, *, with_head: bool) -> Any:
    """A transformers model, with its head or without, on its device, in evaluation mode, all weights from its files.

    Raises:
        ModelError: if it cannot be loaded, its files hold other weights than it has, or an adapter lies beside them.
    """
    device, dtype = prepared_device(model), settle_dtype(model, storage)
    module = _from_files(model, storage, with_head=with_head, dtype=dtype)
    module.eval().requires_grad_(False)
    return module.to(device)


def load_ends(model: Model, storage: Storage, dtype: torch.dtype) -> Any:
    """A causal transformers model without its blocks: embedding, final norm and head, on the CPU, from its files.

    What the files hold of blocks is not read; that they hold a head is.

    Raises:
        ModelError: if it cannot be loaded, or its files lack what it has outside its blocks.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as told

    config = load_config_of(model, storage)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    place = location(model, storage)
    verbosity = told.get_verbosity()
    # The blocks that are left out are no news.
    told.set_verbosity_error()
    try:
        with explained(model):
            module, found = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, **revision(model)
            )
    finally:
        told.set_verbosity(verbosity)
    if missing := _names(found["missing_keys"]):
        raise ModelError(
            f"model {model.name}: its files lack {_first(missing)}, which would be filled with random numbers",
            hint="set features.logits = false, or give a model that was saved with its head",
        )
    return module.eval().requires_grad_(False)


def model_outline(model: Model, storage: Storage, *, with_head: bool) -> Any:
    """The same model on the meta device: its modules, and where its files are here, its names against their headers.

    Of a model on a hub only the configuration is read: its weights may be for another machine to fetch.

    Raises:
        ModelError: as `load_module`, of what can be known without reading a weight.
    """
    if Path(location(model, storage)).is_dir():
        return _from_files(model, storage, with_head=with_head, device_map="meta").eval()
    from transformers import AutoModel, AutoModelForCausalLM

    config = load_config_of(model, storage)
    with torch.device("meta"), explained(model):
        return (AutoModelForCausalLM if with_head else AutoModel).from_config(config).eval()


def find_blocks(module: Any, n_layers: int, d_model: int, name: str) -> torch.nn.ModuleList:
    """The decoder blocks of a transformers model: the list below its text decoder whose modules give a residual stream.

    A few tokens are sent through it, which tells what each block gives; on the meta device nothing is computed.

    Args:
        module: The model, with or without its head.
        n_layers: How many blocks its configuration says there are.
        d_model: Width of the residual stream.
        name: What errors call it.

    Raises:
        ModelError: if there is no such list, or its blocks give something else than one residual stream.
    """
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    lists = [
        child
        for _, child in decoder.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers
    ]
    architecture = type(module).__name__
    if not lists:
        raise ModelError(
            f"model {name}: found no list of {n_layers} decoder blocks in {architecture}",
            hint="decoder-only models of transformers are supported",
        )
    given = _what_blocks_give(module, lists)
    if given is None:
        if len(lists) == 1:
            return lists[0]
        raise ModelError(
            f"model {name}: which of {len(lists)} lists in {architecture} are its decoder blocks cannot be told",
            hint="decoder-only models of transformers are supported",
        )
    wanted = [(1, _PROBE_TOKENS, d_model)] * n_layers
    fitting = [blocks for blocks, shapes in zip(lists, given, strict=True) if shapes == wanted]
    if len(fitting) == 1:
        return fitting[0]
    seen = next((shapes for shapes in given if any(shapes)), given[0])
    what = next((str(shape) for shape in seen if shape != wanted[0]), "several lists of blocks")
    raise ModelError(
        f"model {name}: the blocks of {architecture} give no single residual stream of shape "
        f"(batch, length, {d_model}), but {what}",
        hint="this architecture is not supported: models whose blocks hand on one residual stream are",
    )


def residual_of(output: Any) -> torch.Tensor:
    """The residual stream in what a block gives: itself, or the first of a tuple or list."""
    residual: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return residual


def with_residual(output: Any, residual: torch.Tensor) -> Any:
    """What a block gives, with another residual stream in it."""
    if isinstance(output, list):
        return [residual, *output[1:]]
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


def _what_blocks_give(
    module: Any, lists: list[torch.nn.ModuleList]
) -> list[list[tuple[int, ...] | None]] | None:
    """Of each list the shape that each of its modules gives, None where it was not called; None if nothing runs."""
    shapes: dict[int, tuple[int, ...]] = {}

    def note(child: Any, _inputs: Any, output: Any) -> None:
        found = (
            residual_of(output) if isinstance(output, torch.Tensor | tuple | list) and len(output) else None
        )
        if isinstance(found, torch.Tensor):
            shapes[id(child)] = tuple(found.shape)

    handles = [child.register_forward_hook(note) for blocks in lists for child in blocks]
    embedding = module.get_input_embeddings().weight
    ids = torch.arange(_PROBE_TOKENS, device=embedding.device)[None] % embedding.shape[0]
    try:
        with torch.inference_mode(), _NoValues():
            module(input_ids=ids, use_cache=False)
    except Exception as error:
        # Not every architecture runs on the meta device, which has no values to branch on.
        if embedding.device.type == "meta":
            logger.debug("no probe on the meta device: %s", error)
            return None
        raise
    finally:
        for handle in handles:
            handle.remove()
    return [[shapes.get(id(child)) for child in blocks] for blocks in lists]


class _NoValues(TorchFunctionMode):
    """Lets code on the meta device ask for a value, as masks do to find a shortcut: it is told 0 or false."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ASKED and args[0].device.type == "meta":
            return _ASKED[function](0)
        return function(*args, **(kwargs or {}))


_ASKED: dict[Any, type] = {
    torch.Tensor.__bool__: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.item: int,
}


def _from_files(model: Model, storage: Storage, *, with_head: bool, **options: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    place = location(model, storage)
    refuse_adapters(model, place)
    kind = AutoModelForCausalLM if with_head else AutoModel
    # Other shapes are told by name with the rest, and refused with it.
    options |= {**revision(model), "output_loading_info": True, "ignore_mismatched_sizes": True}
    with explained(model):
        module, found = kind.from_pretrained(place, **options)
        wrapped = [key for key in _names(found["unexpected_keys"]) if _unwrapped(key) != key]
        if wrapped and found["missing_keys"]:
            logger.warning(
                "model %s: its weights are named as a wrapper saved them (%s); read without the wrapper's prefix",
                *(model.name, wrapped[0]),
            )
            # transformers takes each pattern out of a name once; a comment makes equal ones differ.
            renamed = {f"{_WRAPPER}(?#{n})": "" for n in range(_WRAPPED_AT_MOST)}
            module, found = kind.from_pretrained(place, **options, key_mapping=renamed)
    _require_filled(model, storage, module, found, with_head=with_head)
    return module


def _unwrapped(key: str) -> str:
    unwrapped = re.sub(_WRAPPER, "", key)
    return key if unwrapped == key else _unwrapped(unwrapped)


def _require_filled(
    model: Model, storage: Storage, module: Any, found: Mapping[str, Any], *, with_head: bool
) -> None:
    """Whether the files hold just the weights that the model has.

    Raises:
        ModelError: naming the first that are missing, unknown or of another shape.
    """
    if other := _names(found["mismatched_keys"]):
        raise ModelError(
            f"model {model.name}: {_first(other)} have other shapes than its config.json says",
            hint="give the config.json that belongs to these weights",
        )
    if missing := [key for key in _names(found["missing_keys"]) if with_head or not _POOLER.search(key)]:
        head = with_head and all(key.startswith(_head_names(module)) for key in missing)
        raise ModelError(
            f"model {model.name}: its files lack {_first(missing)}, which would be filled with random numbers",
            hint="losses and texts need a model that was saved with its head"
            if head
            else "save the whole model again, with the config.json that belongs to it",
        )
    known = set() if with_head else _names_of_whole(model, storage)
    unknown = [
        key
        for key in _names(found["unexpected_keys"])
        if not _BUFFERS.search(key) and _unwrapped(key) not in known
    ]
    if unknown:
        raise ModelError(
            f"model {model.name}: its files hold {_first(unknown)}, which {type(module).__name__} as its config.json "
            "describes it does not have and would leave out",
            hint="give the config.json that belongs to these weights (number of layers, architecture), "
            "or save the model again as it is meant to run",
        )


def _names(keys: Iterable[Any]) -> list[str]:
    return sorted(key if isinstance(key, str) else str(key[0]) for key in keys)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _head_names(module: Any) -> tuple[str, ...]:
    head = module.get_output_embeddings()
    return tuple(name for name, child in module.named_modules() if child is head and name) or ("lm_head",)


def _names_of_whole(model: Model, storage: Storage) -> set[str]:
    """Names of the model's weights with the head that it was saved with, which the residual stream does without."""
    import transformers

    config = load_config_of(model, storage)
    names = {"lm_head.weight", "embed_out.weight"}
    for architecture in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, architecture, None)
        if kind is not None:
            with torch.device("meta"), explained(model):
                names |= set(kind(config).state_dict())
    return names
