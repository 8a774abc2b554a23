"""How each checkpoint continues fixed prompts: greedily, and sampled with a fixed seed (PAPER 1.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra import verified
from infra.manifest import Manifest
from schemas.pretraining.section import Generations as Section
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint, GeneratedTexts
from schemas.tables import SHARD_FILES, TABLES
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Stage, Unit, table_of
from tasks.models.devices import device_client, settle
from tasks.models.text_generation import continuation, prompt_ids
from tasks.models.tokenizers import load_tokenizer
from tasks.pretraining.checkpoints import CHECKPOINTS, key_columns
from tasks.pretraining.loading import named, open_checkpoint

VERSION = 1
MODES = ("greedy", "sampled")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextsUnit(Unit):
    """One checkpoint's texts."""

    checkpoint: Checkpoint


class Generations(Stage[TextsUnit, list[GeneratedTexts]]):
    """Every checkpoint's continuations of every prompt."""

    name = "generations"
    section = "consolidation.generations"
    needs = (CHECKPOINTS,)
    measure = "texts, generations"
    things = "texts"
    changed = "checkpoints are new, or prompts, or how they are continued, changed"
    loads = True
    libraries = ("torch", "transformers")
    tops = ("generations",)

    def units(self, run: Run) -> Sequence[TextsUnit]:
        """A unit a checkpoint; none where there are no prompts."""
        if not self.applies(run.config):
            return []
        config, section = run.config, _section(run)
        tokenizer = load_tokenizer(config.model, run.storage)
        return [
            TextsUnit(
                top="generations",
                inputs={
                    "version": VERSION,
                    "model": checkpoint.key,
                    "generations": section.model_dump(),
                    "prepend_bos": config.windows.prepend_bos,
                    "tokenizer": tokenizer.key,
                    # Where texts end; which special token does is no part of the tokenizer's key.
                    "eos": tokenizer.tokenizer.eos_token_id,
                },
                about=f"{checkpoint.series}, step {checkpoint.step}",
                size=len(MODES) * len(section.prompts),
                checkpoint=checkpoint,
            )
            for checkpoint in run.result(CHECKPOINTS)
        ]

    def prepare(self, run: Run, missing: Sequence[TextsUnit]) -> Sequence[TextsUnit]:
        """Decide number formats."""
        for unit in missing:
            settle(unit.checkpoint.model, run.storage)
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[TextsUnit]]) -> AbstractContextManager[Any]:
        """Several GPUs or a cluster: each worker takes whole checkpoints."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[TextsUnit]) -> Iterator[Made | int]:
        """A checkpoint's texts."""
        (unit,) = group
        section = _section(run)
        rows = []
        with named(unit.checkpoint, self.name):
            model, tokenizer = open_checkpoint(run.config, run.storage, unit.checkpoint)
            end = tokenizer.tokenizer.eos_token_id
            stops = [] if end is None else [end]
            for prompt in section.prompts:
                ids = prompt_ids(prompt, tokenizer, prepend_bos=run.config.windows.prepend_bos)
                for mode in MODES:
                    (new,) = model.generate(
                        [ids],
                        section.max_new_tokens,
                        temperature=section.temperature if mode == "sampled" else None,
                        top_p=section.top_p,
                        seed=section.seed,
                        stop_ids=stops,
                    )
                    rows.append(
                        {
                            "prompt": prompt,
                            "continuation": continuation(ids, new, tokenizer),
                            "mode": mode,
                            "seed": section.seed if mode == "sampled" else None,
                        }
                    )
                    yield 1
        table = pa.Table.from_pylist(rows, schema=SHARD_FILES["generations"])
        file = f"{unit.folder}/generations.parquet"
        yield Made(write=lambda: [(unit, [run.storage.write_parquet(file, table)], {})])

    def result(
        self, run: Run, units: Sequence[TextsUnit], done: Mapping[str, Manifest]
    ) -> list[GeneratedTexts]:
        """The texts of all checkpoints, in their order."""
        return [GeneratedTexts(checkpoint=unit.checkpoint, folder=unit.folder) for unit in units]

    def question(self, run: Run, result: list[GeneratedTexts]) -> Question:
        """Every checkpoint continues every prompt, greedily and sampled."""
        section = _section(run)
        checkpoints = [(made.checkpoint.series, made.checkpoint.step, made.folder) for made in result]
        wanted = [
            (prompt, mode, section.seed if mode == "sampled" else None)
            for prompt in section.prompts
            for mode in MODES
        ]

        def views() -> dict[str, pa.Table]:
            rows = [
                {**key_columns(made.checkpoint), **row}
                for made in result
                for row in verified.read_table(run.storage, f"{made.folder}/generations.parquet").to_pylist()
            ]
            return {"generations": pa.Table.from_pylist(rows, schema=TABLES["generations"])}

        return Question(
            small={
                "checkpoints": table_of("model VARCHAR, step BIGINT, folder VARCHAR", checkpoints),
                "wanted": table_of("prompt VARCHAR, mode VARCHAR, seed BIGINT", wanted),
            },
            views=views,
        )


GENERATIONS = Generations()


def _section(run: Run) -> Section:
    section = consolidation_of(run.config).generations
    assert section is not None
    return section
