"""Steering: what setting a trait's features does to the answers (PAPER 1.3).

First the traits' features are found (`tasks.steering.traits`); then each experiment ([[steer]] of the cases' file) is
swept over modes, places, strengths and controls, one content-keyed folder each (`tasks.steering.experiments`), so a
sweep that is killed goes on with the first experiment that it lacks. An experiment whose own traits are known is known,
whatever other traits lack.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from infra import verified
from infra.manifest import Manifest, load_all
from schemas.errors import about
from schemas.steering.work import Steered, SteeredPrompt, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES, load_dictionary
from tasks.dictionaries.facts import Facts, facts_of
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Shown, Stage, Unit
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.tokenizers import load_tokenizer
from tasks.steering import questions
from tasks.steering.cases import check_cases, check_clamps, read_cases
from tasks.steering.experiments import ExperimentUnit, experiment_units
from tasks.steering.loaded_traits import known_traits, load_layers
from tasks.steering.prompt_features import Readers, labels_of, read_once
from tasks.steering.sweep import Effect, check_experiment, sweep
from tasks.steering.traits import TraitUnit, find_trait, found_traits, trait_units

SHOWN_FEATURES = 5
"""Features shown of a trait's most informative layer."""

SHOWN_TEXTS = 200
"""Rows of steered texts shown at most."""


class Steering(Stage[Unit, Steered]):
    """The traits' features, and what each experiment does with them."""

    name = section = "steering"
    needs = (TOKENIZE, DICTIONARIES)
    measure = "texts, steering"
    things = "traits and experiments"
    changed = "they are new or damaged, or their model, dictionaries or settings changed"
    libraries = ("sae_lens",)
    tops = ("traits", "steering")

    def __init__(self) -> None:
        # Traits and experiments are made in rounds: the model without its head never lies beside the one with it.
        self._readers = Readers()
        self._model: LanguageModel | None = None
        self._sae: tuple[str, Any] | None = None

    def units(self, run: Run) -> Sequence[Unit]:
        """The traits' layers, then the experiments, in the order of the cases' file."""
        function_ids = function_token_ids(run.config, run.storage, run.result(TOKENIZE))
        function = frozenset(function_ids.tolist())
        with about(stage=self.name):
            cases = read_cases(run.config, run.storage)
            of_traits = trait_units(run, cases, function)
            done = load_all(run.storage, [unit.folder for unit in of_traits])
            lacking = {unit.trait.name for unit in of_traits if unit.folder not in done}
            found = found_traits([unit for unit in of_traits if unit.trait.name not in lacking])
            known = known_traits(run.storage, cases, found)
            return [*of_traits, *experiment_units(run, cases, known, function)]

    def lines(self, missing: Sequence[Unit]) -> Sequence[str]:
        """A line a trait, then one an experiment."""
        traits = [unit for unit in missing if isinstance(unit, TraitUnit)]
        return [*labels_of(traits), *(unit.about for unit in missing if not isinstance(unit, TraitUnit))]

    def prepare(self, run: Run, missing: Sequence[Unit]) -> Sequence[Unit]:
        """Refuse what can be refused without a model, and leave experiments for when no trait is missing."""
        with about(stage=self.name):
            check_clamps(run.config, check_cases(run.config, run.storage), _facts(run))
        experiments = [unit for unit in missing if isinstance(unit, ExperimentUnit)]
        experiments.sort(key=lambda unit: unit.dictionary.layer)
        for unit in experiments:
            with about(unit.about, stage=self.name):
                check_experiment(self._sae_of(run, unit.dictionary), unit.experiment)
        traits = [unit for unit in missing if isinstance(unit, TraitUnit)]
        return read_once(traits) if traits else experiments

    def make(self, run: Run, group: Sequence[Unit]) -> Iterator[Made | int]:
        """What one trait lacks, or one experiment."""
        with about(group[0].about, stage=self.name):
            traits = [unit for unit in group if isinstance(unit, TraitUnit)]
            if traits:
                yield find_trait(run, traits, self._readers)
            for unit in group:
                if isinstance(unit, ExperimentUnit):
                    yield from self._steer(run, unit)

    def close(self) -> None:
        """Free models and dictionaries."""
        self._model = self._sae = None
        self._readers.forget()

    def result(self, run: Run, units: Sequence[Unit], done: Mapping[str, Manifest]) -> Steered:
        """All traits and experiments, in the order of the cases' file."""
        return Steered(
            traits=tuple(found_traits([unit for unit in units if isinstance(unit, TraitUnit)])),
            experiments=tuple(
                SteeredPrompt(case=unit.steer.title, prompt=unit.steer.prompt, folder=unit.folder)
                for unit in units
                if isinstance(unit, ExperimentUnit)
            ),
        )

    def question(self, run: Run, result: Steered) -> Question:
        """Traits and experiments, against the cases' file, the configuration and the dictionaries."""
        return questions.of_steering(run, result)

    def shown(self, run: Run, result: Steered) -> Iterable[Shown]:
        """Each trait's strongest features, and what each experiment answers at each strength."""
        yield Shown(
            name="traits",
            description="Each trait's strongest features at its most informative layer",
            rows=[row for trait in result.traits for row in _trait_rows(run, trait)],
        )
        rows = [row for made in result.experiments for row in _steered_rows(run, made)]
        places = ", ".join(dict.fromkeys(row["place"] for row in rows))
        yield Shown(
            name="steered-texts",
            description=f"Answers before and after the trait's features are set (place: {places or 'none'})",
            rows=rows[:SHOWN_TEXTS],
        )

    def _steer(self, run: Run, unit: ExperimentUnit) -> Iterator[Made | int]:
        if self._model is None:
            self._model = load_language_model(run.config.model, run.storage)
        tokenizer, effects = load_tokenizer(run.config.model, run.storage), list[Effect]()
        for some in sweep(self._model, self._sae_of(run, unit.dictionary), unit.experiment):
            effects += some
            yield len(some)
        rows = [
            unit.row(condition, effect, tokenizer)
            for condition, effect in zip(unit.experiment.conditions, effects, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=SHARD_FILES["steering"])
        name, stats = f"{unit.folder}/steering.parquet", {"n_conditions": len(rows)}
        yield Made(write=lambda: [(unit, [run.storage.write_parquet(name, table)], stats)])

    def _sae_of(self, run: Run, dictionary: Dictionary) -> Any:
        """A layer's SAE on the CPU; one is kept, as experiments come layer by layer."""
        if self._sae is None or self._sae[0] != dictionary.folder:
            self._sae = dictionary.folder, load_dictionary(run.storage, dictionary, "cpu")
        return self._sae[1]


STEERING = Steering()


def _facts(run: Run) -> dict[int, Facts]:
    saved = {
        entry.layer: verified.read_bytes(run.storage, f"{entry.folder}/cfg.json")
        for entry in run.result(DICTIONARIES)
    }
    return {layer: facts_of(json.loads(configuration)) for layer, configuration in saved.items()}


def _trait_rows(run: Run, trait: TraitFeatures) -> list[dict[str, Any]]:
    [best] = [layer for layer in load_layers(run.storage, trait) if layer.is_most_informative]
    [folder] = [entry.folder for entry in trait.layers if entry.layer == best.layer]
    features = verified.read_table(run.storage, f"{folder}/trait_features.parquet").to_pylist()
    return [
        {
            "trait": trait.trait,
            "layer": best.layer,
            "separation": best.separation,
            "accuracy": best.accuracy,
            **{name: row[name] for name in ("place", "feature_id", "coefficient", "contribution")},
        }
        for row in features
        if row["place"] <= SHOWN_FEATURES
    ]


def _steered_rows(run: Run, made: SteeredPrompt) -> list[dict[str, Any]]:
    rows = verified.read_table(run.storage, f"{made.folder}/steering.parquet").to_pylist()
    places = [row["place"] for row in rows if row["control"] == "trait"]
    shown = ("case", "prompt", "mode", "place", "strength", "baseline_text", "steered_text")
    return [
        {name: row[name] for name in shown}
        for row in rows
        if row["control"] == "trait" and row["place"] in places[:1]
    ]
