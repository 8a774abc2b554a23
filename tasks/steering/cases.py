"""The file of cases (PAPER 1.3): read from anywhere, and checked before any weights are."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
from pydantic import ValidationError

from infra.addresses import is_unreachable, storage_options, without_credentials
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, StorageError, about
from schemas.sections import explain
from schemas.steering.section import Case, Cases, Steer, Trait, short, steering_of
from schemas.work import Dictionary
from tasks.dictionaries.facts import Facts
from tasks.models.model import context_length
from tasks.models.tokenizers import load_tokenizer
from tasks.steering.directions import clamp_objection
from tasks.steering.prompts import Prompt, listed, target_ids, tokenized


def read_cases(config: Config, storage: Storage) -> Cases:
    """Read the file `steering.cases`, from anywhere that fsspec knows.

    Raises:
        ConfigError: if it is not there, is not TOML, or does not fit `schemas.steering.section.Cases`.
        StorageError: if where it lies does not answer.
    """
    url = steering_of(config).cases
    name = without_credentials(url)
    content = _read(url, name, storage.endpoint_url)
    try:
        values = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"steering.cases = {name} is not valid TOML: {error}", hint="configs/cases.toml shows such a file"
        ) from error
    try:
        return Cases.model_validate(values)
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False)
        wrong = "; ".join(f"{_at(item['loc'], values)}{explain(item, Cases)}" for item in items)
        raise ConfigError(
            f"{name}: {wrong}",
            hint="schemas/steering/section.py says what each key means; see configs/cases.toml",
        ) from error


def place_of(case: Case, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """Where a case's tokenized prompts differ: [first, end) in all of them, before and after which they are the same.

    Raises:
        ConfigError: if they have different numbers of tokens, differ nowhere, or in more than one place.
    """
    first = prompts[0]
    for other in prompts[1:]:
        if len(other.ids) != len(first.ids):
            raise ConfigError(
                f"{case.label}: its prompts need equally many tokens, so that their positions correspond: "
                f"{short(first.text)} has {len(first.ids)}, {short(other.text)} has {len(other.ids)}",
                hint="where they differ, choose words of equally many tokens, or fillers of another length",
            )
    columns = zip(*(prompt.ids for prompt in prompts), strict=True)
    differing = [position for position, ids in enumerate(columns) if len(set(ids)) > 1]
    if not differing:
        raise ConfigError(f"{case.label}: its prompts have the same tokens", hint="let them differ in a word")
    between = sorted({*range(differing[0], differing[-1])} - {*differing})
    if between:
        raise ConfigError(
            f"{case.label}: its prompts differ in more than one place: before and after "
            f"{first.tokens[between[0]]!r}, position {between[0]}",
            hint="let them differ in one run of tokens",
        )
    return differing[0], differing[-1] + 1


def check_cases(config: Config, storage: Storage) -> Cases:
    """Read the cases, and check all that can be told without weights and without the corpus.

    Raises:
        ConfigError: naming file, entry and way out of the first that cannot be used as asked.
    """
    section, cases = steering_of(config), read_cases(config, storage)
    tokenizer = load_tokenizer(config.model, storage)
    positions = context_length(config.model, storage)

    def fitting(text: str, target: str | None = None) -> Prompt:
        prompt, after = tokenized(text, config, tokenizer), 0
        if target is not None:
            after = max(section.max_new_tokens, len(target_ids(target, text, config, tokenizer)))
        _check_window(prompt, after, positions, config.model.name)
        return prompt

    with about(without_credentials(section.cases)):
        for case in cases.case:
            with about(case.label):
                prompts = [fitting(text) for text in case.prompts]
                for text, target in zip(case.prompts, case.targets or (), strict=False):
                    target_ids(target, text, config, tokenizer)
            _check_later(case, prompts[0], place_of(case, prompts)[1])
        for trait in cases.trait:
            with about(trait.label):
                for text in (*(trait.positive or ()), *(trait.negative or ())):
                    fitting(text)
                _check_given(trait, config)
        for steer in cases.steer:
            with about(steer.label):
                fitting(steer.prompt, steer.target)
                _check_layers(steer, cases)
    return cases


def check_feature_ids(cases: Cases, dictionaries: Sequence[Dictionary]) -> None:
    """Whether the dictionaries have the features that traits name.

    Raises:
        ConfigError: naming the first trait, and its layer or feature that there is not.
    """
    sizes = {dictionary.layer: dictionary.d_sae for dictionary in dictionaries}
    for trait in cases.trait:
        with about(trait.label):
            _check_features(trait, sizes)


def check_clamps(config: Config, cases: Cases, facts: Mapping[int, Facts]) -> None:
    """Whether the dictionaries where experiments may steer let features be clamped, if that is asked for.

    Raises:
        ConfigError: naming the first layer whose dictionary does not.
    """
    section = steering_of(config)
    if "clamp" not in section.modes:
        return
    given = {trait.name: trait.layer for trait in cases.trait if trait.layer is not None}
    objections = {
        layer: clamp_objection(known.architecture, known.normalize_activations)
        for layer, known in facts.items()
    }
    for steer in cases.steer:
        layers = {given[name] for name in steer.traits if name in given}
        if section.layer is not None:
            layers = {section.layer}
        # Where the layer is still to be chosen, one that can be clamped may be.
        is_open = not layers and (len(facts) < len(config.sae) or not all(objections.values()))
        refused = [layer for layer in sorted(layers or facts) if not is_open and objections.get(layer)]
        if refused:
            raise ConfigError(
                f"{steer.label}: features of layer {refused[0]} cannot be clamped: {objections[refused[0]]}",
                hint='set steering.modes = ["add"], or a steering.layer with another dictionary',
            )


def _read(url: str, name: str, endpoint_url: str | None) -> bytes:
    # What a filesystem says may hold the address, and that a password: only its kind is shown.
    try:
        with fsspec.open(url, "rb", **storage_options(url, endpoint_url)) as file:
            return bytes(file.read())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if is_unreachable(error):
            # What stopped it, not that a file is missing, says whether another try can help.
            raise _unread(name, error.__cause__) from error.__cause__
        raise ConfigError(
            f"steering.cases = {name}: no such file",
            hint="give the path or URL of a TOML file of [[case]], [[trait]] and [[steer]]",
        ) from error
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"steering.cases = {name} is nothing that can be opened ({type(error).__name__})",
            hint="give a path, or a URL such as s3://bucket/cases.toml",
        ) from error
    except Exception as error:
        raise _unread(name, error) from error


def _unread(name: str, error: BaseException | None) -> StorageError:
    return StorageError(
        f"cannot read steering.cases = {name} ({type(error).__name__})",
        hint="check the address, the network, permissions and credentials",
    )


def _at(place: Sequence[str | int], values: Mapping[str, Any]) -> str:
    """Which entry and key an error of validation is about: `[[case]] 'name', prompts: `."""
    if not place:
        return ""
    kind, rest = str(place[0]), place[1:]
    if not rest or not isinstance(rest[0], int):
        return f"{'.'.join(str(part) for part in place)}: "
    entry = values[kind][rest[0]]
    names = [entry[key] for key in ("name", "prompt") if entry.get(key)] if isinstance(entry, dict) else []
    named = f"[[{kind}]] {short(str(names[0])) if names else f'number {rest[0] + 1}'}"
    return f"{', '.join([named, '.'.join(str(part) for part in rest[1:])]).rstrip(', ')}: "


def _check_window(prompt: Prompt, after: int, positions: int | None, model: str) -> None:
    if positions is None or len(prompt.ids) + after <= positions:
        return
    follow = f" and the {after} that may follow" if after else ""
    raise ConfigError(
        f"the {len(prompt.ids)} tokens of the prompt {short(prompt.text)}{follow} are more than {model} was built "
        f"for ({positions})",
        hint=f"shorten the prompt{' or the target, or lower steering.max_new_tokens' if after else ''}",
    )


def _check_later(case: Case, prompt: Prompt, end: int) -> None:
    tokens = zip(prompt.tokens[end:], prompt.is_special[end:], strict=True)
    later = [token for token, is_special in tokens if not is_special]
    if not later:
        raise ConfigError(
            f"{case.label}: nothing follows the place where its prompts differ",
            hint="add words after it: they are what is looked at",
        )
    if case.look_at is not None and not {*case.look_at} & {*later}:
        raise ConfigError(
            f"{case.label}: look_at: {listed(case.look_at)} are not among the tokens that follow the place where "
            f"its prompts differ: {listed(later)}",
            hint="give tokens as they are, with their spaces, or leave look_at out",
        )


def _check_given(trait: Trait, config: Config) -> None:
    if trait.layer is None:
        return
    wanted = steering_of(config).layer
    if wanted is not None and wanted != trait.layer:
        raise ConfigError(
            f"its features are of layer {trait.layer}, but steering.layer = {wanted}",
            hint="leave steering.layer out, or give features of that layer",
        )
    if "clamp" in steering_of(config).modes and min(trait.values or (0.0,)) < 0:
        raise ConfigError(
            "one of its values is below 0, which no activation can be clamped to",
            hint='give values of 0 or more, or set steering.modes = ["add"]',
        )
    _check_features(trait, {entry.layer: entry.train.d_sae if entry.train else None for entry in config.sae})


def _check_features(trait: Trait, sizes: Mapping[int, int | None]) -> None:
    """Whether the dictionary of a trait's layer, where its size is known, has its features."""
    if trait.layer is None:
        return
    if trait.layer not in sizes:
        raise ConfigError(
            f"layer {trait.layer} has no dictionary; the layers are {sorted(sizes)}",
            hint="add a [[sae]] entry for it to the configuration, or choose one of these",
        )
    size = sizes[trait.layer]
    too_large = [feature for feature in trait.features or () if size is not None and feature >= size]
    if too_large:
        raise ConfigError(
            f"feature {too_large[0]} is not in the dictionary of layer {trait.layer}, which has {size}",
            hint=f"features are counted from 0: give ids up to {(size or 0) - 1}",
        )


def _check_layers(steer: Steer, cases: Cases) -> None:
    layers = {trait.name: trait.layer for trait in cases.trait if trait.layer is not None}
    given = {name: layers[name] for name in steer.traits if name in layers}
    if len(set(given.values())) > 1:
        shown = ", ".join(f"{name!r} at layer {layer}" for name, layer in given.items())
        raise ConfigError(
            f"its traits are given at different layers: {shown}",
            hint="traits are steered together at one layer: give their features there",
        )
