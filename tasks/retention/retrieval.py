"""The stage `retrieval`: what a cache still knows of a context when it is asked (PAPER 2).

A unit is a task at a length under a policy and budget. Contexts are read as the protocol `stream` reads them; whatever
their question is, it comes after the last eviction. What the full cache answers is a unit as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from infra import verified
from infra.manifest import Manifest, content_key
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import FunctokError, about
from schemas.retention.section import FULL, Retention, Retrieval, retention_of
from schemas.retention.tables import SHARD_FILES
from schemas.retention.work import Setup
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Shown, Stage, Unit
from tasks.models.devices import device_client, settle
from tasks.models.model import context_length, model_key
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.retention import prompts
from tasks.retention.answers import answers, require_positions
from tasks.retention.gates import GATES, read_gate
from tasks.retention.loaded import forget_loaded, function_mask, loaded_model
from tasks.retention.setups import has_gate, policy_key, policy_of, retrieval_setups, settings_of

VERSION = 1
SOLVED = 0.9
"""Share of a task's prompts that the full cache must answer for exact matches under a policy to count."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalUnit(Unit):
    """One task at one length under one policy and budget.

    Attributes:
        task: Which.
        length: Tokens of a context.
        policy: Name that the configuration gives it.
        budget: Share; 1 for the full cache.
        model_key: Key of the model that the work was planned for.
        function_ids: Function tokens, where the policy must know them.
        gate: Folder of the learned gate, where the policy has one.
    """

    task: str
    length: int
    policy: str
    budget: float
    model_key: str
    function_ids: tuple[int, ...] | None
    gate: str | None


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """The answers of one unit; its folder has `retrieval_answers.parquet`."""

    task: str
    length: int
    policy: str
    budget: float
    folder: str
    n: int
    exact: int


class RetrievalStage(Stage[RetrievalUnit, list[Retrieved]]):
    """Passkey, several keys and variables, asked after the context was read under each policy."""

    name = "retrieval"
    measure = "prompts, retrieval"
    things = "answers"
    changed = "the prompts, the model or how a policy reads changed"
    libraries = ("torch", "transformers")
    tops = ("retrieval",)
    needs = (TOKENIZE, GATES)

    def applies(self, config: Config) -> bool:
        """Where it is asked for."""
        section = config.section(Retention)
        return section is not None and section.retrieval is not None

    def refuse(self, config: Config) -> FunctokError:
        """There is no such section."""
        return FunctokError(
            "this configuration has no retrieval",
            stage=self.name,
            hint="add [retention.retrieval]; configs/retention.toml shows one",
        )

    def subject(self, config: Config) -> str:
        """The tasks."""
        return ", ".join(_asked_of(config).tasks) if self.applies(config) else ""

    def units(self, run: Run) -> Sequence[RetrievalUnit]:
        """A unit a task, length, policy and budget, the full cache first; none where none is asked for."""
        if not self.applies(run.config):
            return []
        config, storage, gate = run.config, run.storage, run.result(GATES)
        section, asked = retention_of(config, self.name), _asked_of(config)
        key_of_model, tokenizer = model_key(config.model, storage), load_tokenizer(config.model, storage)
        ids = tuple(int(i) for i in function_token_ids(config, storage, run.result(TOKENIZE)))
        reading = {
            "version": [VERSION, prompts.VERSION],
            "model": key_of_model,
            "tokenizer": tokenizer.key,
            "bos": _bos_id(config, tokenizer),
            "chunk": section.chunk,
        }
        of_policies = {
            "budget_of": section.budget_of,
            "protection": [section.sinks, section.recent],
            "seed": section.seed,
        }
        units = []
        for task, setup in ((task, setup) for task in asked.tasks for setup in retrieval_setups(section)):
            name, budget, length = setup.policy, setup.budget, setup.length
            kinds = ids if policy_of(section, name).needs_kinds else None
            own_gate = gate if has_gate(section, name) else None
            units.append(
                RetrievalUnit(
                    top="retrieval",
                    inputs={
                        **reading,
                        "prompts": [task, length, asked.depths, asked.n, section.seed],
                        "name": name,
                        "policy": policy_key(section, name, own_gate),
                        "budget": budget,
                        **({} if name == FULL else of_policies),
                        **({} if kinds is None else {"function_tokens": content_key(ids=kinds)}),
                    },
                    about=f"{task} of {length:,} tokens, {name}"
                    + ("" if name == FULL else f" at {budget:g}"),
                    size=len(asked.depths) * asked.n,
                    task=task,
                    length=length,
                    policy=name,
                    budget=budget,
                    model_key=key_of_model,
                    function_ids=kinds,
                    gate=own_gate,
                )
            )
        return units

    def prepare(self, run: Run, missing: Sequence[RetrievalUnit]) -> Sequence[RetrievalUnit]:
        """Decide the number format, and refuse what `check_prompts` does."""
        settle(run.config.model, run.storage)
        check_prompts(run.config, run.storage)
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[RetrievalUnit]]) -> AbstractContextManager[Any]:
        """Several GPUs or a cluster: each worker makes whole units."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[RetrievalUnit]) -> Iterator[Made]:
        """Read the contexts, and ask.

        Raises:
            ModelError: if the model here is another one, or a prompt is longer than its positions.
        """
        config, storage, section = run.config, run.storage, retention_of(run.config, self.name)
        tokenizer = load_tokenizer(config.model, storage)
        for unit in group:
            model = loaded_model(config.model, storage, unit.model_key)
            kinds = None
            if unit.function_ids is not None:
                kinds = function_mask(np.array(unit.function_ids), model.vocabulary)
            setup = Setup(policy=unit.policy, budget=unit.budget, protocol="stream", length=unit.length)
            settings = settings_of(
                section, setup, None if unit.gate is None else read_gate(storage, unit.gate)
            )
            asked = _prompts_of(config, tokenizer, unit.task, unit.length)
            with about(unit.about, stage=self.name):
                found = answers(model, asked, settings, function_tokens=kinds)
            rows = [
                {
                    "policy": unit.policy,
                    "budget": unit.budget,
                    "task": unit.task,
                    "length": unit.length,
                    "depth": prompt.depth,
                    "number": prompt.number,
                    "n_tokens": len(prompt.answer),
                    "exact_match": answer.exact_match,
                    "answer_logprob": answer.logprob,
                }
                for prompt, answer in zip(asked, found, strict=True)
            ]
            exact = sum(answer.exact_match for answer in found)
            yield Made.of(unit, partial(_write, run, unit, rows), {"n": len(found), "exact": exact})

    def close(self) -> None:
        """Free the model."""
        forget_loaded()

    def result(
        self, run: Run, units: Sequence[RetrievalUnit], done: Mapping[str, Manifest]
    ) -> list[Retrieved]:
        """All answers, in the order of the units."""
        return [
            Retrieved(
                task=unit.task,
                length=unit.length,
                policy=unit.policy,
                budget=unit.budget,
                folder=unit.folder,
                n=int(done[unit.folder].stats["n"]),
                exact=int(done[unit.folder].stats["exact"]),
            )
            for unit in units
        ]

    def question(self, run: Run, result: list[Retrieved]) -> Question:
        """The answers against the prompts that were wanted."""
        asked = _asked_of(run.config)
        wanted = [
            {
                "task": unit.task,
                "length": unit.length,
                "policy": unit.policy,
                "budget": unit.budget,
                "depth": depth,
                "n": asked.n,
            }
            for unit in result
            for depth in asked.depths
        ]
        return Question(
            of={"folders": [unit.folder for unit in result], "wanted": wanted},
            views=lambda: {
                "wanted": pa.Table.from_pylist(wanted, schema=_WANTED),
                "retrieval_answers": pa.concat_tables(
                    verified.read_table(run.storage, file_of(unit.folder)) for unit in result
                ),
            },
        )

    def shown(self, run: Run, result: list[Retrieved]) -> Sequence[Shown]:
        """How many prompts each policy answered, by task and length."""
        rows: dict[tuple[str, float], dict[str, Any]] = {}
        for unit in result:
            row = rows.setdefault((unit.policy, unit.budget), {"policy": unit.policy, "budget": unit.budget})
            row[f"{unit.task}, {unit.length:,} tokens"] = f"{unit.exact} of {unit.n}"
        return [Shown(name="retrieval", description="Prompts answered exactly", rows=list(rows.values()))]


RETRIEVAL = RetrievalStage()

_WANTED = pa.schema(
    [
        ("task", pa.string()),
        ("length", pa.int64()),
        ("policy", pa.string()),
        ("budget", pa.float64()),
        ("depth", pa.float64()),
        ("n", pa.int64()),
    ]
)


def file_of(folder: str) -> str:
    """The file of a unit's folder."""
    return f"{folder}/retrieval_answers.parquet"


def _asked_of(config: Config) -> Retrieval:
    asked = retention_of(config).retrieval
    assert asked is not None
    return asked


def _bos_id(config: Config, tokenizer: LoadedTokenizer) -> int | None:
    return tokenizer.bos_id if config.windows.prepend_bos else None


def check_prompts(config: Config, storage: Storage) -> None:
    """Refuse contexts that are too short for their task, or too long for the model; nothing where none are asked for.

    Raises:
        ConfigError: naming the first that is too short.
        ModelError: naming the first that is too long with its question and answer.
    """
    asked = retention_of(config).retrieval
    if asked is None:
        return
    tokenizer, positions = load_tokenizer(config.model, storage), context_length(config.model, storage)
    with about(stage="retrieval"):
        for task, length in product(asked.tasks, asked.lengths):
            for prompt in _prompts_of(config, tokenizer, task, length):
                require_positions(prompt, positions, config.model.name)


def _prompts_of(config: Config, tokenizer: LoadedTokenizer, task: str, length: int) -> list[prompts.Prompt]:
    section, asked = retention_of(config), _asked_of(config)
    return prompts.prompts(
        tokenizer.backend,
        task,
        length,
        asked.depths,
        asked.n,
        seed=section.seed,
        bos_id=_bos_id(config, tokenizer),
    )


def _write(run: Run, unit: RetrievalUnit, rows: list[dict[str, Any]]) -> list[StoredFile]:
    table = pa.Table.from_pylist(rows, schema=SHARD_FILES["retrieval_answers"])
    return [run.storage.write_parquet(file_of(unit.folder), table)]
