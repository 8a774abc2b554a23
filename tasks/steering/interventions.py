"""Features set in the residual stream: a decoder direction added, or an activation made another (PAPER 1.3).

Adding moves the stream by value × decoder direction, whatever is there. Clamping moves it along the same directions,
by just so much that the encoder then reads the wanted values: one equation a feature, as features overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from schemas.errors import DictionaryError, ModelError, about
from tasks.models.language_model import LanguageModel
from tasks.steering.directions import Directions, named

_ANOTHER = "one steered() covers one pass: open another for the next, and generate with the cache"


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """What is done to the residual stream after one block.

    Attributes:
        directions: The features.
        values: F activations: added (`add`), or what the encoder reads afterwards (`clamp`; 0 switches a feature
            off where it is on, up to rounding).
        mode: `add`: residual + Σ value × decoder direction. `clamp`: the change along the decoder directions after
            which the encoder reads the values.
        position: In the sequence, from 0; None: every position, generated ones too.
        sized_as: Scale the change, position by position, to the norm that this other intervention's change has at
            the same residual (a control of equal norm; its own position does not matter).

    Raises:
        DictionaryError: if values are not finite or not one a feature; or, where they are clamped: if the dictionary's
            architecture does not allow it, a value is negative or too small to be read back, or the encoder does not
            tell the features apart.
    """

    directions: Directions
    values: tuple[float, ...]
    mode: Literal["add", "clamp"]
    position: int | None
    sized_as: Intervention | None = None

    def __post_init__(self) -> None:
        own, features = self.directions, named(self.directions.feature_ids)
        with about(f"layer {own.layer}"):
            if len(self.values) != len(own.feature_ids):
                raise DictionaryError(
                    f"{features} cannot be given {len(self.values)} values", hint="one a feature"
                )
            if not all(map(math.isfinite, self.values)):
                raise DictionaryError(
                    f"{features} cannot be given the values {list(self.values)}", hint="give finite ones"
                )
            if self.sized_as is not None and self.sized_as.directions.layer != own.layer:
                raise DictionaryError(
                    f"layer {own.layer}: a change cannot be sized as one at layer {self.sized_as.directions.layer}",
                    hint="name one at the same layer",
                )
            if self.mode == "clamp":
                self._check_clamp(features)

    def _check_clamp(self, features: str) -> None:
        own, instead = self.directions, 'steer with mode = "add" alone: steering.modes = ["add"]'
        if own.objection:
            raise DictionaryError(f"{features} cannot be clamped: {own.objection}", hint=instead)
        for feature, value, threshold in zip(
            own.feature_ids, self.values, own.threshold.tolist(), strict=True
        ):
            refused = f"feature {feature} cannot be clamped to {value:g}"
            if value < 0:
                raise DictionaryError(
                    f"{refused}: activations are not negative", hint=f"clamp it to 0 or more, or {instead}"
                )
            if 0 < value <= threshold:
                raise DictionaryError(
                    f"{refused}: the encoder reads 0 up to its threshold of {threshold:g}",
                    hint="clamp it to a larger value (another strength), or to 0",
                )
        _ = own.inverse

    def change(self, hidden: torch.Tensor) -> torch.Tensor:
        """What is added to (…, d_model) residuals of any dtype, on the directions' device: (…, d_model) float32."""
        hidden = hidden.float()
        own = self._clamping(hidden) if self.mode == "clamp" else self._adding(hidden)
        if self.sized_as is None:
            return own
        wanted, norm = self.sized_as.change(hidden).norm(dim=-1, keepdim=True), own.norm(dim=-1, keepdim=True)
        return own * torch.where(norm > 0, wanted / norm, 0.0)

    def _adding(self, hidden: torch.Tensor) -> torch.Tensor:
        own = self.directions
        direction = torch.tensor(self.values, dtype=torch.float32, device=own.decoder.device) @ own.decoder
        return own.scale(hidden) * direction

    def _clamping(self, hidden: torch.Tensor) -> torch.Tensor:
        own = self.directions
        before = hidden.double() @ own.double_encoder + own.bias.double()
        values = before.new_tensor(self.values)
        # What is silent at 0 stays as silent as it is.
        off = torch.where(before > own.threshold, 0.0, before)
        wanted = torch.where(values > 0, values, off)
        coefficients = (wanted - before) @ own.inverse
        return (coefficients @ own.decoder.double()).float()


@contextmanager
def steered(model: LanguageModel, rows: Sequence[Sequence[Intervention]]) -> Iterator[None]:
    """Within the block, one pass of a batch runs with its residual stream changed; then the model is as before.

    A pass is one forward, or one generation with cached keys and values: tokens are counted as they come, so that an
    intervention at a position acts when the prompt is read, and later tokens see it through the cache; one at every
    position acts on each generated token as well. Changes are computed in float32 and rounded to the model's dtype.

    Args:
        model: The model.
        rows: What is done to each row of the batch, in order, each on what the one before has left. A row without
            interventions stays as it is, to the bit.

    Raises:
        ModelError: if there is no such block; and, from within the pass, if the batch has another number of rows, a
            position is not in its first forward, or the context is used for a second pass.
    """
    layers = sorted({intervention.directions.layer for row in rows for intervention in row})
    with ExitStack() as stack:
        for layer in layers:
            own = [[one for one in row if one.directions.layer == layer] for row in rows]
            steering = _Steering(model.name, layer, own)
            stack.enter_context(model.replaced(layer, steering))
            handle = model.module.get_decoder().register_forward_pre_hook(steering.before, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _begins(arguments: dict[str, Any]) -> bool:
    """Whether a forward of the decoder, with these arguments, surely has no tokens before its own."""
    cache = arguments.get("past_key_values")
    if cache is None:
        return arguments.get("use_cache") is False
    return hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0


class _Steering:
    """What a block's output becomes, over one pass."""

    def __init__(self, name: str, layer: int, rows: list[list[Intervention]]) -> None:
        self.where, self.rows = f"layer {layer} of {name}", rows
        self.seen = 0

    def before(self, _module: Any, _args: Any, arguments: dict[str, Any]) -> None:
        """Refuse a second pass, which may be one token long as a step of a generation is."""
        if self.seen and _begins(arguments):
            raise ModelError(
                f"{self.where}: a second pass begins after {self.seen} tokens were steered", hint=_ANOTHER
            )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Change (rows, new tokens, d_model)."""
        n_rows, n_tokens = hidden.shape[:2]
        self._check(n_rows, n_tokens)
        changed = hidden.clone()
        for row, interventions in enumerate(self.rows):
            for intervention in interventions:
                here = slice(None)
                if intervention.position is not None:
                    if self.seen:
                        continue
                    here = slice(intervention.position, intervention.position + 1)
                before = changed[row, here].float()
                changed[row, here] = (before + intervention.change(before)).to(hidden.dtype)
        self.seen += n_tokens
        return changed

    def _check(self, n_rows: int, n_tokens: int) -> None:
        if n_rows != len(self.rows):
            raise ModelError(
                f"{self.where}: a batch of {n_rows} rows cannot be steered by the interventions of {len(self.rows)}",
                hint="give each row its interventions, if only none",
            )
        if self.seen and n_tokens != 1:
            raise ModelError(
                f"{self.where}: {n_tokens} tokens came after {self.seen}, but a generation adds one at a time",
                hint=_ANOTHER,
            )
        # After the prompt's forward, an intervention at a position has been made.
        positions = [] if self.seen else [one.position for row in self.rows for one in row]
        for position in positions:
            if position is not None and not 0 <= position < n_tokens:
                raise ModelError(
                    f"{self.where}: position {position} cannot be steered: the prompt has {n_tokens} tokens",
                    hint=f"positions are counted from 0: choose one of 0 to {n_tokens - 1}",
                )


def change_norms(intervention: Intervention, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(…,) float32 norms of a change, wherever it is made, and of the (…, d_model) residuals that it changes."""
    return intervention.change(hidden).norm(dim=-1), hidden.float().norm(dim=-1)
