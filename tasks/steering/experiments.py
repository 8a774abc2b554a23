"""The experiments ([[steer]] of the cases' file), as far as they are known without weights (PAPER 1.3).

An experiment's key holds what is moved, not where that was found: another SAE at a layer makes the experiments anew
that are steered there, and of the others those alone that then move something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import about
from schemas.steering.section import Cases, Steer, steering_of
from schemas.steering.work import TraitFeatures
from schemas.work import Dictionary
from tasks.models.model import model_key
from tasks.models.tokenizers import load_tokenizer
from tasks.steering.conditions import Condition, Moved, conditions_of, moved_features, random_features
from tasks.steering.loaded_traits import LoadedTrait, choose_layer, given_trait, load_trait
from tasks.steering.measures import Question
from tasks.steering.prompts import Prompt, content_position, last_function_position, target_ids, tokenized
from tasks.steering.sweep import Experiment

VERSION = 1
_SECTION = {
    *("modes", "strengths", "places"),
    *("random_controls", "max_new_tokens", "seed", "batch_size"),
}
"""Settings that an experiment's rows depend on, beside what its prompt, its layer and what is moved say."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One experiment, before its traits are known.

    Attributes:
        steer: Its entry.
        prompt: Its prompt, tokenized.
        target: Token ids of its target.
        last: Position of the prompt's last function token.
        content: Position of the content token before it; None where there is none.
    """

    steer: Steer
    prompt: Prompt
    target: tuple[int, ...]
    last: int
    content: int | None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One experiment: a folder to make or to find.

    Attributes:
        asked: What is asked.
        dictionary: That of the layer that is steered.
        moved: The features that are moved, with their values at strength 1.
        conditions: The rows of its table.
        inputs: What determines them.
    """

    asked: Asked
    dictionary: Dictionary
    moved: Moved
    conditions: tuple[Condition, ...]
    inputs: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its folder in the storage."""
        return f"steering/{content_key(**self.inputs)}"

    def experiment(self, config: Config) -> Experiment:
        """What is swept."""
        section, end = steering_of(config), self.inputs["eos"]
        question = Question(
            ids=self.asked.prompt.ids,
            target=self.asked.target,
            layer=self.dictionary.layer,
            max_new_tokens=section.max_new_tokens,
            stop_ids=() if end is None else (end,),
        )
        return Experiment(
            question=question,
            moved=self.moved,
            conditions=self.conditions,
            seed=section.seed,
            prompt=self.asked.steer.prompt,
            batch_size=section.batch_size,
        )


def asked_of(config: Config, storage: Storage, cases: Cases, function_ids: frozenset[int]) -> list[Asked]:
    """All experiments, in the order of the cases' file.

    Raises:
        ConfigError: naming the first whose prompt has no function token, or whose prompt or target cannot be read.
    """
    tokenizer = load_tokenizer(config.model, storage)
    asked = []
    for steer in cases.steer:
        with about(steer.label, stage="steering"):
            prompt = tokenized(steer.prompt, config, tokenizer)
            asked.append(
                Asked(
                    steer=steer,
                    prompt=prompt,
                    target=tuple(target_ids(steer.target, steer.prompt, config, tokenizer)),
                    last=last_function_position(prompt, function_ids),
                    content=content_position(prompt, function_ids),
                )
            )
    return asked


def known_traits(storage: Storage, cases: Cases, found: Sequence[TraitFeatures]) -> dict[str, LoadedTrait]:
    """Traits by name: those that are found, and those whose features the cases' file gives."""
    given = {trait.name: known for trait in cases.trait if (known := given_trait(trait)) is not None}
    return given | {trait.trait: load_trait(storage, trait) for trait in found if trait.trait not in given}


def units_of(
    config: Config,
    storage: Storage,
    asked: Sequence[Asked],
    traits: Mapping[str, LoadedTrait],
    dictionaries: Sequence[Dictionary],
) -> list[Unit]:
    """The experiments all of whose traits are known, in their order; the others are checked as far as can be.

    Raises:
        ConfigError: naming the first whose traits have no layer to steer together at, or whose dictionary is too small
            for random controls.
    """
    if not asked:
        return []
    section = steering_of(config)
    at_layer = {dictionary.layer: dictionary for dictionary in dictionaries}
    tokenizer, key_of_model = load_tokenizer(config.model, storage), model_key(config.model, storage)
    units = []
    for one in asked:
        steer = one.steer
        own = [traits[name] for name in steer.traits if name in traits]
        is_known = len(own) == len(steer.traits)
        has_layer = is_known or section.layer is not None or any(trait.is_given for trait in own)
        if not own or not has_layer:
            continue
        with about(steer.label, stage="steering"):
            dictionary = at_layer[choose_layer(config, own)]
            moved = moved_features([trait.strongest(dictionary.layer, section.features) for trait in own])
            if section.random_controls:
                random_features(section.seed, steer.prompt, 1, moved.feature_ids, dictionary.d_sae)
        if not is_known:
            continue
        inputs = {
            "version": VERSION,
            "model": key_of_model,
            "tokenizer": tokenizer.key,
            "eos": tokenizer.tokenizer.eos_token_id,
            "title": steer.title,
            "prompt": steer.prompt,
            "ids": one.prompt.ids,
            "target": steer.target,
            "target_ids": one.target,
            "traits": steer.traits,
            "layer": dictionary.layer,
            "dictionary": dictionary.key,
            "features": moved.feature_ids,
            "values": {mode: moved.values[mode] for mode in section.modes},
            "positions": [one.last, one.content],
            "steering": section.model_dump(include=_SECTION),
        }
        conditions = conditions_of(section, one.last, one.content)
        units.append(
            Unit(asked=one, dictionary=dictionary, moved=moved, conditions=conditions, inputs=inputs)
        )
    return units
