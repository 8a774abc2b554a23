"""Which dictionaries fit our residual stream, and why others are refused.

SAELens loads many things that give wrong features without a warning on the raw residual stream after a
block: dictionaries of other places, of centred or scaled activations, transcoders. Everything here decides
from the dictionary's saved configuration alone, so it can be asked again at no cost.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from infra.addresses import without_credentials
from schemas.config import Config, Gate, Sae
from schemas.errors import DictionaryError
from tasks.models.names import is_named

logger = logging.getLogger(__name__)

_RESIDUAL_HOOK = re.compile(r"^blocks\.(?P<block>\d+)\.hook_resid_(?P<side>pre|post)$")
_MODULE_HOOK = re.compile(r"^(?:[\w-]+\.)*(?:layers|h|blocks)\.(?P<block>\d+)(?:\.output)?$")
_OLDER_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
_RUN_TIME_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


class DictionaryUnavailableError(DictionaryError):
    """A registry or its network could not be reached: another try may succeed."""

    retryable = True


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a dictionary's saved configuration says of itself.

    Attributes:
        architecture: SAELens' name of its class.
        d_in: Width of the residuals it reads.
        d_sae: Number of latents.
        normalize_activations: SAELens' normalization; only some act when encoding.
        reshape_activations: SAELens' reshaping of heads.
        hook_name: TransformerLens name of the place it was trained on.
        hf_hook_name: transformers name of that place.
        hook_name_out: Place it predicts, where that is another one (transcoders).
        hook_head_index: Head it was trained on, if one.
        model_kwargs: How the model was changed for it (`center_writing_weights` and the like).
        prepend_bos: Whether its windows began with BOS.
        context_size: Length of its windows.
        model_name: Model that it was trained on, as its maker calls it.
    """

    architecture: str
    d_in: int
    d_sae: int
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    hook_name: str | None = None
    hf_hook_name: str | None = None
    hook_name_out: str | None = None
    hook_head_index: int | None = None
    model_kwargs: dict[str, Any] | None = None
    prepend_bos: bool | None = None
    context_size: int | None = None
    model_name: str | None = None


def facts_of(configuration: Mapping[str, Any]) -> Facts:
    """Facts of a loaded SAELens SAE's `cfg.to_dict()`, or of a `cfg.json` of any release of SAELens.

    Raises:
        KeyError, TypeError, ValueError: if it has no width or number of latents.
    """
    # Before 6.0 there was no metadata: all stood side by side.
    metadata = {**configuration, **(configuration.get("metadata") or {})}
    metadata = {_OLDER_NAMES.get(name, name): value for name, value in metadata.items()}
    normalization = configuration.get("normalize_activations") or "none"
    z_hook = "hook_z" if "hook_z" in str(metadata.get("hook_name")) else "none"
    return Facts(
        architecture=str(configuration.get("architecture") or "standard"),
        d_in=int(configuration["d_in"]),
        d_sae=int(configuration["d_sae"]),
        normalize_activations="expected_average_only_in" if normalization is True else str(normalization),
        reshape_activations=str(configuration.get("reshape_activations") or z_hook),
        hook_name=metadata.get("hook_name"),
        hf_hook_name=metadata.get("hf_hook_name"),
        hook_name_out=metadata.get("hook_name_out"),
        hook_head_index=metadata.get("hook_head_index"),
        model_kwargs=dict(metadata.get("model_from_pretrained_kwargs") or {}),
        prepend_bos=metadata.get("prepend_bos"),
        context_size=metadata.get("context_size"),
        model_name=metadata.get("model_name"),
    )


def check_layer(entry: Sae, n_layers: int, model_name: str) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        DictionaryError: if `entry.layer` is not below the number of decoder blocks.
    """
    if entry.layer >= n_layers:
        raise DictionaryError(
            f"sae layer {entry.layer} ({source_of(entry)}): {model_name} has {n_layers} decoder blocks",
            hint=f"layers are counted from 0: choose one of 0 to {n_layers - 1}",
        )


def check_facts(facts: Facts, entry: Sae, d_model: int, n_layers: int) -> None:
    """Refuse a dictionary that our residuals do not meet.

    Raises:
        DictionaryError: naming layer, source, the reason and the way out.
    """
    for reason, hint in _objections(facts, entry.layer, d_model, n_layers):
        raise refusal(entry, reason, hint)


def check_model_name(model_name: str | None, entry: Sae, names: Sequence[str]) -> None:
    """Refuse a dictionary that says it was trained on a model of none of these names, unless `entry.allow_other_model`.

    Raises:
        DictionaryError: naming both models.
    """
    if entry.train is not None or entry.allow_other_model or is_named(model_name, names):
        return
    raise refusal(
        entry,
        f"was trained on the model {model_name}, not on {' = '.join(names)}",
        "give an SAE of this model; or set allow_other_model = true in its [[sae]] entry, if this is that model under "
        "another name, or if its features are meant to be read in a model near to its own, such as its "
        "instruction-tuned form",
    )


def warn_of_differences(facts: Facts, entry: Sae, config: Config) -> None:
    """Say in the log where windows differ from those the dictionary was trained on; its features stay valid."""
    windows = config.windows
    for name, theirs, ours in (
        ("prepend_bos", facts.prepend_bos, windows.prepend_bos),
        ("context_size", facts.context_size, windows.context_size),
    ):
        if theirs is not None and theirs != ours:
            _warn_once(
                f"sae layer {entry.layer} ({source_of(entry)}) was trained with {name} = {theirs}, "
                f"but windows.{name} = {ours}"
            )


@cache
def _warn_once(text: str) -> None:
    # Every stage after the dictionaries asks for them again.
    logger.warning("%s", text)


def check_gate(quality: Mapping[str, float], gate: Gate, entry: Sae) -> None:
    """Refuse a dictionary trained here that falls short on held-out tokens.

    Raises:
        DictionaryError: with every figure, what was asked of it, and by how much it fell short.
    """
    deviation = abs(quality["l0"] / quality["k"] - 1)
    missing_variance = gate.min_explained_variance - quality["explained_variance"]
    missing_alive = gate.min_alive_share - quality["alive_share"]
    too_far = deviation - gate.max_l0_deviation
    short = {
        "variance": f", {missing_variance:.3f} too little" if missing_variance > 0 else "",
        "l0": f", off by {deviation:.0%}" if too_far > 0 else "",
        "alive": f", {100 * missing_alive:.1f} points too few" if missing_alive > 0 else "",
    }
    figures = (
        f"explained variance {quality['explained_variance']:.3f} (at least {gate.min_explained_variance:.2f}"
        f"{short['variance']}; {quality['explained_variance_all']:.3f} with outliers), "
        f"L0 {quality['l0']:.1f} for k = {quality['k']:g} (within {gate.max_l0_deviation:.0%}{short['l0']}), "
        f"alive {quality['alive_share']:.1%} (at least {gate.min_alive_share:.0%}{short['alive']})"
    )
    if any(short.values()):
        raise refusal(
            entry,
            f"did not pass its gate on {quality['heldout_tokens']:.0f} held-out tokens: {figures}",
            "train on more tokens (train.max_tokens, activations.max_tokens) or samples, make it narrower "
            "(train.d_sae), or change train.gate",
        )


def source_of(entry: Sae) -> str:
    """Where a dictionary comes from, for people."""
    if entry.release is not None:
        return f"{entry.release} / {entry.sae_id}"
    if entry.path is not None:
        return without_credentials(entry.path)
    return "trained here"


def refusal(entry: Sae, reason: str, hint: str) -> DictionaryError:
    """The error that refuses the dictionary of one layer."""
    return DictionaryError(f"sae layer {entry.layer} ({source_of(entry)}) {reason}", hint=hint)


def _objections(facts: Facts, layer: int, d_model: int, n_layers: int) -> Iterator[tuple[str, str]]:
    """Reasons against a dictionary, each with the way out."""
    another = "choose a residual-stream SAE"
    if "transcoder" in facts.architecture or facts.hook_name_out not in (None, facts.hook_name):
        predicts = f"({facts.architecture}, predicts {facts.hook_name_out})"
        yield f"is a transcoder {predicts}, not an autoencoder of the residual stream", another
    if facts.architecture == "temporal":
        yield "is a temporal SAE, which reads whole sequences, not tokens", "choose another architecture"
    if facts.d_in != d_model:
        reason = f"reads vectors of width {facts.d_in}, but the model's residual stream has {d_model}"
        yield reason, "it belongs to another model, or to another place in this one"
    if facts.normalize_activations not in _RUN_TIME_NORMALIZATIONS:
        normalization = f"normalize_activations = {facts.normalize_activations}"
        yield (
            f"has {normalization}, which SAELens does not apply when encoding",
            "fold it into the weights first (SAELens: fold_activation_norm_scaling_factor or "
            "fold_activation_whitening, then save_model)",
        )
    if facts.reshape_activations != "none":
        yield f"reshapes its input ({facts.reshape_activations}): it reads attention heads", another
    if facts.model_kwargs:
        changed = f"a changed model (model_from_pretrained_kwargs = {facts.model_kwargs})"
        reason = f"was trained on {changed}, whose residuals are not the raw ones"
        yield reason, "choose an SAE trained without weight processing"
    if facts.hook_head_index is not None:
        yield f"reads attention head {facts.hook_head_index} alone", another
    if place := _misplaced(facts, layer):
        ours = f"the residual stream after block {layer} (blocks.{layer}.hook_resid_post)"
        yield f"was trained on {place}, not on {ours}", _right_layer(place, n_layers)


def _misplaced(facts: Facts, layer: int) -> str | None:
    """The place the dictionary names, if it is not ours. None where it names none."""
    named = [name for name in (facts.hook_name, facts.hf_hook_name) if name]
    blocks = {name: _block_after(name) for name in named}
    for name, block in blocks.items():
        if block is not None and block != layer:
            return name
    if named and blocks[named[0]] is None:
        return named[0]
    return None


def _block_after(name: str) -> int | None:
    """The block whose output a hook reads; None for any other place."""
    if match := _RESIDUAL_HOOK.match(name):
        return int(match["block"]) - (match["side"] == "pre")
    if match := _MODULE_HOOK.match(name):
        return int(match["block"])
    return None


def _right_layer(place: str, n_layers: int) -> str:
    block = _block_after(place)
    if block is not None and 0 <= block < n_layers:
        return f"set layer = {block}, or choose another SAE"
    return "choose an SAE of the residual stream after that block"
