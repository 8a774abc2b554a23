"""The features of each case's prompts at every position and layer: what function tokens re-activate (PAPER 1.3).

Two prompts of a case differ in one place, and later tokens are the same. What is kept here is what is active where;
which features tell the contexts apart and come back is SQL over it. One content-keyed folder a case for its tokens, and
one a case and layer for its features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from infra import verified
from infra.manifest import Manifest
from schemas.errors import about
from schemas.steering.section import Case
from schemas.steering.work import CaseFeatures
from schemas.tables import SHARD_FILES
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.dictionaries.encoding import Encoder
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Shown, Stage, Written
from tasks.graph.features import round_mantissa
from tasks.models.model import LoadedModel, model_key
from tasks.models.tokenizers import load_tokenizer
from tasks.steering import questions
from tasks.steering.cases import place_of, read_cases
from tasks.steering.prompt_features import (
    LayerUnit,
    Readers,
    labels_of,
    layer_folders,
    read_once,
    residuals_of,
)
from tasks.steering.prompts import Prompt, tokenized

VERSION = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseUnit(LayerUnit):
    """The tokens of one case's prompts, or one layer's features of them.

    Attributes:
        case: The case.
        prompts: Its prompts, tokenized.
        place: [first, end) positions at which they differ.
    """

    case: Case
    prompts: tuple[Prompt, ...]
    place: tuple[int, int]


class Reactivation(Stage[CaseUnit, list[CaseFeatures]]):
    """Which feature is active at which position of the cases' prompts, layer by layer."""

    name = "reactivation"
    section = "steering"
    needs = (TOKENIZE, DICTIONARIES)
    measure = "tokens, cases"
    things = "cases"
    changed = "they are new or damaged, or their model, dictionaries or settings changed"
    libraries = ("sae_lens",)
    tops = ("reactivation",)

    def __init__(self) -> None:
        self._readers = Readers()

    def units(self, run: Run) -> Sequence[CaseUnit]:
        """For each case its tokens, then its layers, ascending."""
        config, storage = run.config, run.storage
        with about(stage=self.name):
            cases = read_cases(config, storage).case
        if not cases:
            return []
        tokenizer, key_of_model = load_tokenizer(config.model, storage), model_key(config.model, storage)
        dictionaries = run.result(DICTIONARIES)
        units = []
        for case in cases:
            with about(case.label, stage=self.name):
                prompts = tuple(tokenized(text, config, tokenizer) for text in case.prompts)
                place = place_of(case, prompts)
            of_tokens = {
                "version": VERSION,
                "case": case.name,
                "relation": case.relation,
                "look_at": case.look_at,
                "prompts": [vars(prompt) for prompt in prompts],
                "place": place,
            }
            of_features = {
                "version": VERSION,
                "model": key_of_model,
                "prompts": [[prompt.text, prompt.ids, prompt.is_special] for prompt in prompts],
                "mantissa_bits": config.activations.mantissa_bits,
            }
            of_layers = [
                (entry, {**of_features, "layer": entry.layer, "dictionary": entry.key})
                for entry in sorted(dictionaries, key=lambda entry: entry.layer)
            ]
            units += [
                CaseUnit(
                    top="reactivation",
                    inputs=inputs,
                    about=case.label,
                    size=sum(not special for prompt in prompts for special in prompt.is_special),
                    together=case.name,
                    dictionary=dictionary,
                    n_layers=len(dictionaries),
                    case=case,
                    prompts=prompts,
                    place=place,
                )
                for dictionary, inputs in [(None, of_tokens), *of_layers]
            ]
        return units

    def lines(self, missing: Sequence[CaseUnit]) -> Sequence[str]:
        """A line a case."""
        return labels_of(missing)

    def prepare(self, run: Run, missing: Sequence[CaseUnit]) -> Sequence[CaseUnit]:
        """Count each case's tokens once."""
        return read_once(missing)

    def make(self, run: Run, group: Sequence[CaseUnit]) -> Iterator[Made]:
        """What one case lacks: its prompts are read once for all layers."""
        with about(group[0].about, stage=self.name):
            features = self._features(run, group)

        def write() -> Iterator[Written]:
            for unit in group:
                if unit.dictionary is None:
                    name, table, counted = "prompt_tokens", _tokens(unit), "n_tokens"
                else:
                    name, table, counted = "prompt_features", features[unit.dictionary.layer], "n_activations"
                written = run.storage.write_parquet(f"{unit.folder}/{name}.parquet", table)
                yield unit, [written], {counted: table.num_rows}

        yield Made(size=sum(unit.size for unit in group), write=write)

    def close(self) -> None:
        """Free the model and the dictionaries."""
        self._readers.forget()

    def result(self, run: Run, units: Sequence[CaseUnit], done: Mapping[str, Manifest]) -> list[CaseFeatures]:
        """One for each `[[case]]`, in the order of their file."""
        of_case: dict[str, list[CaseUnit]] = {}
        for unit in units:
            of_case.setdefault(unit.case.name, []).append(unit)
        return [
            CaseFeatures(
                case=tokens.case.name,
                folder=tokens.folder,
                layers=layer_folders(of_case[tokens.case.name]),
                n_tokens=tokens.size,
            )
            for tokens in units
            if tokens.dictionary is None
        ]

    def question(self, run: Run, result: list[CaseFeatures]) -> Question:
        """The cases that were read, against their file, the dictionaries and the vocabulary."""
        return questions.of_reactivation(run, result)

    def shown(self, run: Run, result: list[CaseFeatures]) -> Iterable[Shown]:
        """The cases' prompts, and how many tokens were read."""
        rows = []
        for case in result:
            name = f"{case.folder}/prompt_tokens.parquet"
            prompts = verified.read_table(run.storage, name, columns=["prompt"])["prompt"].unique()
            rows.append(
                {"case": case.case, "prompts": " / ".join(prompts.to_pylist()), "tokens": case.n_tokens}
            )
        yield Shown(name="cases", description="Prompts that differ in one place", rows=rows)

    def _features(self, run: Run, group: Sequence[CaseUnit]) -> dict[int, pa.Table]:
        """By layer, the rows of `prompt_features`, prompts in order."""
        dictionaries = [unit.dictionary for unit in group if unit.dictionary is not None]
        if not dictionaries:
            return {}
        model, mantissa_bits = self._readers.model(run), run.config.activations.mantissa_bits
        encoders = {entry.layer: self._readers.encoder(run, entry) for entry in dictionaries}
        read = [_features(prompt, model, encoders, mantissa_bits) for prompt in group[0].prompts]
        return {layer: pa.concat_tables([tables[layer] for tables in read]) for layer in encoders}


REACTIVATION = Reactivation()


def _tokens(unit: CaseUnit) -> pa.Table:
    """The rows of `prompt_tokens`, prompts and positions in order."""
    (first, end), look_at = unit.place, unit.case.look_at
    rows = [
        {
            "case": unit.case.name,
            "relation": unit.case.relation,
            "prompt": prompt.text,
            "position": position,
            "token_id": prompt.ids[position],
            "token": prompt.tokens[position],
            "in_text": prompt.in_text[position],
            "in_place": first <= position < end,
            "looked_at": position >= end and (look_at is None or prompt.tokens[position] in look_at),
        }
        for prompt in unit.prompts
        for position in range(len(prompt.ids))
        if not prompt.is_special[position]
    ]
    return pa.Table.from_pylist(rows, schema=SHARD_FILES["prompt_tokens"])


def _features(
    prompt: Prompt, model: LoadedModel, encoders: Mapping[int, Encoder], mantissa_bits: int
) -> dict[int, pa.Table]:
    """By layer, the rows of `prompt_features` of one prompt, in (position, feature) order."""
    positions = torch.tensor([at for at, special in enumerate(prompt.is_special) if not special])
    residuals, tables = residuals_of(model, prompt.ids, encoders), {}
    for layer, encoder in encoders.items():
        sparse = encoder(residuals[layer][positions.to(model.device)])
        n = len(sparse.row)
        tables[layer] = pa.table(
            [
                pa.repeat(prompt.text, n),
                positions[sparse.row.cpu()].to(torch.int32).numpy(),
                pa.repeat(pa.scalar(layer, pa.int32()), n),
                sparse.feature.to(torch.int32).cpu().numpy(),
                round_mantissa(sparse.value.cpu().numpy(), mantissa_bits),
            ],
            schema=SHARD_FILES["prompt_features"],
        )
    return tables
