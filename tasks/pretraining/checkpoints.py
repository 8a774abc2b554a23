"""Checkpoint series: one notion with two sources, trained here or public (PAPER 1.4).

What this stage returns names each checkpoint by series and step and says how `tasks.models.model` loads it; nothing
after it can tell the sources apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra.addresses import without_credentials
from infra.manifest import Manifest, load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ModelError
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint
from schemas.sections import Model
from schemas.tables import TABLES
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Shown, Stage, Unit, table_of
from tasks.models.files import IN_STORAGE
from tasks.models.model import model_key
from tasks.models.text_generation import prompt_ids
from tasks.models.tokenizers import load_tokenizer
from tasks.pretraining.plan import TrainingPlan, plan_training
from tasks.pretraining.public_series import count_parameters, public_checkpoints
from tasks.pretraining.state import finished_checkpoints, is_trained, newest_state
from tasks.pretraining.training import train_series


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointUnit(Unit):
    """What a training leaves: one of its checkpoints, or its loss curve.

    Attributes:
        plan: The training.
        step: Of the checkpoint; None: the loss curve, with which it is at its end.
    """

    plan: TrainingPlan
    step: int | None = None


class Checkpoints(Stage[CheckpointUnit, list[Checkpoint]]):
    """The checkpoints of all series: trained here, or found."""

    name = "checkpoints"
    section = "consolidation"
    needs = (TOKENIZE,)
    measure = ""
    things = "checkpoints"
    changed = "series are new, or what trains them changed"
    libraries = ("torch", "transformers")
    tops = ("checkpoints", "training")

    def units(self, run: Run) -> Sequence[CheckpointUnit]:
        """What each series that is trained here leaves; a public one is only looked for (`result`)."""
        units: list[CheckpointUnit] = []
        for series in consolidation_of(run.config).series:
            if series.shape is None:
                continue
            plan = plan_training(run.config, run.result(TOKENIZE), series)
            about = _still_to_do(run.storage, plan)
            leaves = [("checkpoints", plan.checkpoint_inputs(step), step) for step in plan.checkpoint_steps]
            units += [
                CheckpointUnit(
                    top=top, inputs=inputs, about=about, together=series.name, plan=plan, step=step
                )
                for top, inputs, step in [*leaves, ("training", plan.inputs, None)]
            ]
        return units

    def lines(self, missing: Sequence[CheckpointUnit]) -> Sequence[str]:
        """A line a series."""
        return list(dict.fromkeys(unit.about for unit in missing))

    def prepare(self, run: Run, missing: Sequence[CheckpointUnit]) -> Sequence[CheckpointUnit]:
        """Refuse prompts that the models will have no room for: before days of training, not after them."""
        if consolidation_of(run.config).generations is not None:
            check_prompts(run.config, run.storage, missing[0].plan.context_size)
        return missing

    def make(self, run: Run, group: Sequence[CheckpointUnit]) -> Iterator[Made]:
        """Train a series; checkpoints are committed as they come, by the processes that train."""
        train_series(run.config, run.storage, run.result(TOKENIZE), group[0].plan, run.tell)
        yield Made()

    def result(
        self, run: Run, units: Sequence[CheckpointUnit], done: Mapping[str, Manifest]
    ) -> list[Checkpoint]:
        """All checkpoints, series in the configuration's order, steps ascending."""
        config = run.config
        section = consolidation_of(config)
        checkpoints: list[Checkpoint] = []
        for series in section.series:
            found: list[tuple[int, Model, int | None, int | None]]
            if series.shape is None:
                public = public_checkpoints(config, series)
                found = [(step, model, None, count_parameters(model.name)) for step, model in public]
            else:
                own = [unit for unit in units if unit.plan.series == series.name and unit.step is not None]
                found = [
                    (
                        unit.step or 0,
                        _model(config, unit.folder),
                        int(stats["tokens"]),
                        int(stats["parameters"]),
                    )
                    for unit in own
                    for stats in [done[unit.folder].stats]
                ]
            checkpoints += [
                Checkpoint(
                    series=series.name,
                    step=step,
                    model=model,
                    key=model_key(model, run.storage),
                    layer=section.layer_of(series),
                    tokens=tokens,
                    parameters=parameters,
                )
                for step, model, tokens, parameters in found
            ]
        return checkpoints

    def question(self, run: Run, result: list[Checkpoint]) -> Question:
        """Every configured series has its checkpoints, in order, and those made here are whole."""
        folders = {
            checkpoint.model.name: checkpoint.model.name.removeprefix(IN_STORAGE)
            for checkpoint in result
            if checkpoint.model.name.startswith(IN_STORAGE)
        }
        committed = load_all(run.storage, folders.values())
        rows = [
            {
                **row,
                "place": place,
                "key": checkpoint.key,
                "committed": folders.get(checkpoint.model.name) in {None, *committed},
            }
            for place, (checkpoint, row) in enumerate(zip(result, checkpoint_rows(result), strict=True))
        ]
        return Question(
            small={
                "checkpoints": pa.Table.from_pylist(rows, schema=_CHECKPOINTS),
                "wanted": wanted_series(run.config),
            }
        )

    def shown(self, run: Run, result: list[Checkpoint]) -> Iterable[Shown]:
        """The checkpoints of every series."""
        yield Shown(
            name="checkpoints", description="The checkpoints of every series", rows=checkpoint_rows(result)
        )


CHECKPOINTS = Checkpoints()

_CHECKPOINTS = pa.schema(
    [*TABLES["checkpoints"], ("place", pa.int64()), ("key", pa.string()), ("committed", pa.bool_())]
)


def wanted_series(config: Config) -> pa.Table:
    """The configured series, as expectations read them."""
    return table_of("model VARCHAR", [(series.name,) for series in consolidation_of(config).series])


def checkpoint_rows(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """The rows of the table `checkpoints`."""
    return [
        {
            **key_columns(checkpoint),
            "source": " ".join(
                filter(None, (without_credentials(checkpoint.model.name), checkpoint.model.revision))
            ),
            "tokens": checkpoint.tokens,
            "parameters": checkpoint.parameters,
        }
        for checkpoint in checkpoints
    ]


def key_columns(checkpoint: Checkpoint) -> dict[str, Any]:
    """The columns that tell checkpoints apart in every table: `model`, `step`."""
    return {"model": checkpoint.series, "step": checkpoint.step}


def check_prompts(config: Config, storage: Storage, context_length: int) -> None:
    """Whether every prompt leaves room for its continuation in models of that many positions.

    Raises:
        ModelError: naming the first prompt that does not, or one that is empty without a BOS token.
    """
    tokenizer, section = load_tokenizer(config.model, storage), consolidation_of(config).generations
    assert section is not None
    for prompt in section.prompts:
        length = len(prompt_ids(prompt, tokenizer, prepend_bos=config.windows.prepend_bos))
        if length + section.max_new_tokens > context_length:
            raise ModelError(
                f"consolidation.generations: the prompt {prompt[:60]!r} has {length} tokens, and with max_new_tokens = "
                f"{section.max_new_tokens} that is more than the models have positions ({context_length})",
                hint="shorten the prompt, lower max_new_tokens, or raise consolidation.train.context_size",
                stage="generations",
            )


def _still_to_do(storage: Storage, plan: TrainingPlan) -> str:
    if is_trained(storage, plan):
        return f"train {plan.series}"
    step = newest_state(storage, plan, finished_checkpoints(storage, plan))
    return f"train {plan.series}" + (f": goes on after step {step:,} of {plan.steps:,}" if step else "")


def _model(config: Config, folder: str) -> Model:
    # Its folder holds the tokenizer too, unless another is named.
    return config.model.model_copy(update={"name": f"{IN_STORAGE}{folder}", "revision": None})
