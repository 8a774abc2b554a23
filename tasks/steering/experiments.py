"""The experiments ([[steer]] of the cases' file), as far as they are known without weights (PAPER 1.3).

An experiment's key holds what is moved, not where that was found: another SAE at a layer makes the experiments anew
that are steered there, and of the others those alone that then move something else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from schemas.errors import about
from schemas.steering.section import Cases, Steer, steering_of
from schemas.work import Dictionary
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run
from tasks.engine.stage import Unit
from tasks.models.model import model_key
from tasks.models.text_generation import continuation
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.steering.conditions import Condition, conditions_of, moved_features, random_features
from tasks.steering.loaded_traits import LoadedTrait, choose_layer
from tasks.steering.measures import Question
from tasks.steering.prompts import content_position, last_function_position, target_ids, tokenized
from tasks.steering.sweep import Effect, Experiment

VERSION = 1
TOP = "steering"
_SECTION = {
    *("modes", "strengths", "places"),
    *("random_controls", "max_new_tokens", "seed", "batch_size"),
}
"""Settings that an experiment's rows depend on, beside what its prompt, its layer and what is moved say."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperimentUnit(Unit):
    """One experiment whose traits are known.

    Attributes:
        steer: Its entry of the cases' file.
        dictionary: That of the layer that is steered.
        experiment: What is swept.
    """

    steer: Steer
    dictionary: Dictionary
    experiment: Experiment

    def row(self, condition: Condition, effect: Effect, tokenizer: LoadedTokenizer) -> dict[str, Any]:
        """A row of the table; texts are decoded as they go on from the prompt."""
        columns, ids = asdict(condition) | asdict(effect), self.experiment.question.ids
        columns |= {
            f"{text}_text": continuation(ids, columns.pop(text), tokenizer)
            for text in ("baseline", "steered")
        }
        return columns | {
            "case": self.steer.title,
            "prompt": self.steer.prompt,
            "target": self.steer.target,
            "traits": " + ".join(self.steer.traits),
            "layer": self.dictionary.layer,
        }


def experiment_units(
    run: Run, cases: Cases, traits: Mapping[str, LoadedTrait], function_ids: Collection[int]
) -> list[Unit]:
    """All experiments, in the order of the cases' file.

    Those all of whose traits are known (`traits`, by name) are an `ExperimentUnit`; the others are checked as far as
    can be.

    Raises:
        ConfigError: naming the first whose prompt has no function token, whose prompt or target cannot be read, whose
            traits have no layer to steer together at, or whose dictionary is too small for random controls.
    """
    if not cases.steer:
        return []
    tokenizer, key = load_tokenizer(run.config.model, run.storage), model_key(run.config.model, run.storage)
    units = []
    for steer in cases.steer:
        with about(steer.label):
            units.append(_unit(run, steer, traits, function_ids, tokenizer, key))
    return units


def _unit(
    run: Run,
    steer: Steer,
    traits: Mapping[str, LoadedTrait],
    function_ids: Collection[int],
    tokenizer: LoadedTokenizer,
    key_of_model: str,
) -> Unit:
    config, section = run.config, steering_of(run.config)
    prompt = tokenized(steer.prompt, config, tokenizer)
    target = tuple(target_ids(steer.target, steer.prompt, config, tokenizer))
    last, content = last_function_position(prompt, function_ids), content_position(prompt, function_ids)
    own = [traits[name] for name in steer.traits if name in traits]
    is_known = len(own) == len(steer.traits)
    has_layer = is_known or section.layer is not None or any(trait.is_given for trait in own)
    unknown = Unit(top=TOP, inputs=None, about=steer.label)
    if not own or not has_layer:
        return unknown
    layer = choose_layer(config, own)
    (dictionary,) = (entry for entry in run.result(DICTIONARIES) if entry.layer == layer)
    moved = moved_features([trait.strongest(layer, section.features) for trait in own])
    if section.random_controls:
        random_features(section.seed, steer.prompt, 1, moved.feature_ids, dictionary.d_sae)
    if not is_known:
        return unknown
    end = tokenizer.tokenizer.eos_token_id
    experiment = Experiment(
        question=Question(
            ids=prompt.ids,
            target=target,
            layer=layer,
            max_new_tokens=section.max_new_tokens,
            stop_ids=() if end is None else (end,),
        ),
        moved=moved,
        conditions=conditions_of(section, last, content),
        seed=section.seed,
        prompt=steer.prompt,
        batch_size=section.batch_size,
    )
    return ExperimentUnit(
        top=TOP,
        inputs={
            "version": VERSION,
            "model": key_of_model,
            "tokenizer": tokenizer.key,
            "eos": end,
            "title": steer.title,
            "prompt": steer.prompt,
            "ids": prompt.ids,
            "target": steer.target,
            "target_ids": target,
            "traits": steer.traits,
            "layer": layer,
            "dictionary": dictionary.key,
            "features": moved.feature_ids,
            "values": {mode: moved.values[mode] for mode in section.modes},
            "positions": [last, content],
            "steering": section.model_dump(include=_SECTION),
        },
        about=steer.label,
        size=len(experiment.conditions),
        steer=steer,
        dictionary=dictionary,
        experiment=experiment,
    )
