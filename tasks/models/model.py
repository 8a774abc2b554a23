"""Language models and their residual streams.

The residual stream after decoder block L is the output of that block's module, read by a forward hook; the
deepest hook asked for raises, so that later blocks, the final norm and the head never run. The field's other
way, `output_hidden_states`, gives the last block's output *after* the final norm and runs every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError, whole_message
from tasks.models.devices import resolve_dtype, settle_dtype
from tasks.models.files import load_config_of, weights_identity
from tasks.models.loading import find_blocks, load_module, residual_of

_PROBE = (4, 12)
"""Tokens that tell at loading whether a model is causal: of the same beginning, and of the other end."""

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

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding: token ids are below it."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    @torch.inference_mode()
    def forward(self, input_ids: torch.Tensor, layers: list[int], receive: Residuals) -> None:
        """Run right-padded windows up to the deepest of `layers`.

        No mask is given: in a causal model no real position sees what is to its right.

        Args:
            input_ids: (batch, padded length), any device.
            layers: Blocks whose output is wanted.
            receive: Called once for each, from shallow to deep.

        Raises:
            ModelError: if an id is outside the model's vocabulary.
        """
        require_known(input_ids, self.vocabulary, "the model's vocabulary")
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
            receive(layer, residual_of(output))
            if layer == deepest:
                raise _DeepestReached

        return hook

    handles = [blocks[layer].register_forward_hook(hook_for(layer)) for layer in sorted(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_known(ids: torch.Tensor, vocabulary: int, whose: str) -> None:
    """Whether token ids are below a model's vocabulary: on CUDA the embedding itself would bring the process down.

    Raises:
        ModelError: naming the highest id, if not.
    """
    if ids.numel() and (highest := int(ids.max())) >= vocabulary:
        raise ModelError(
            f"token id {highest} is outside {whose} ({vocabulary:,} tokens)",
            hint="its tokenizer is another one than the corpus'; model.tokenizer names the right one",
        )


def model_dimensions(model: Model, storage: Storage) -> tuple[int, int]:
    """(d_model, number of decoder blocks), from the model's configuration alone."""
    config = text_config(load_config_of(model, storage))
    return int(config.hidden_size), int(config.num_hidden_layers)


def vocabulary_rows(model: Model, storage: Storage) -> int | None:
    """Rows of the model's embedding; None where its configuration says nothing."""
    rows = getattr(text_config(load_config_of(model, storage)), "vocab_size", None)
    return None if rows is None else int(rows)


def context_length(model: Model, storage: Storage) -> int | None:
    """Positions that the model was built for; None where its configuration says nothing."""
    positions = getattr(text_config(load_config_of(model, storage)), "max_position_embeddings", None)
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


def model_key(model: Model, storage: Storage, dtype: torch.dtype | None = None) -> str:
    """Content key of weights, configuration, and the dtype they run in (by default as `resolve_dtype` says)."""
    dtype = resolve_dtype(model, storage) if dtype is None else dtype
    return content_key(weights=weights_identity(model, storage), dtype=str(dtype))


def require_key(model: Model, found: str, expected: str) -> None:
    """Whether the model here is the one that the work was planned for: names, unlike contents, may lie.

    Raises:
        ModelError: if not.
    """
    if found != expected:
        raise ModelError(
            f"model {model.name} is not here what it was where the run was planned: another folder of that name, "
            "or files that changed since",
            hint="give all machines the same files, and run again",
        )


def load_model(model: Model, storage: Storage) -> LoadedModel:
    """Load a decoder without its head.

    A GGUF file is converted to safetensors once, under `models/` in the storage, which loads 20 times faster.

    Raises:
        ModelError: if it cannot be loaded as its files hold it, reads both ways, or has no blocks that hand on one
            residual stream.
    """
    module = load_module(model, storage, with_head=False)
    require_causal(module, model.name)
    config = text_config(module.config)
    weight, dtype = module.get_input_embeddings().weight, settle_dtype(model, storage)
    return LoadedModel(
        module=module,
        blocks=find_blocks(module, int(config.num_hidden_layers), int(config.hidden_size), model.name),
        d_model=int(config.hidden_size),
        device=weight.device,
        dtype=dtype,
        key=model_key(model, storage, dtype),
        context_length=context_length(model, storage),
    )


@torch.inference_mode()
def require_causal(module: Any, name: str) -> None:
    """Whether no position sees what is to its right, as all that is computed here takes for granted.

    Of three sequences two are the same, and the third has other tokens at its end: before them all must agree.

    Raises:
        ModelError: if they do not (the model reads both ways, as BERT does), or the model cannot read them.
    """
    weight = module.get_input_embeddings().weight
    ids = torch.arange(_PROBE[0] + _PROBE[1], device=weight.device).repeat(3, 1) % weight.shape[0]
    ids[2, _PROBE[0] :] = (ids[2, _PROBE[0] :] + weight.shape[0] // 2) % weight.shape[0]
    try:
        found = module(input_ids=ids, use_cache=False, return_dict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"model {name} cannot read a few tokens: {whole_message(error)}",
            hint="decoder-only models of transformers are supported",
        ) from error
    states = (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()[:, : _PROBE[0]]
    noise, apart = ((states[row] - states[row + 1]).abs().max() for row in (0, 1))
    # Experts read groups of rows, whose sizes round differently; where attention itself says that it reads both ways,
    # no rounding excuses a difference.
    says_both = any(getattr(child, "is_causal", True) is False for child in module.modules())
    rounding = (1e-5 if says_both else max(1e-5, 2 * torch.finfo(weight.dtype).eps)) * states.abs().max()
    if bool(apart > 8 * noise + rounding):
        raise ModelError(
            f"model {name} is not causal: what its positions compute depends on tokens to their right",
            hint="function tokens are defined for decoders, which read from left to right",
        )


def text_config(config: Any) -> Any:
    """The configuration of a model's text decoder, which may be the whole."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
