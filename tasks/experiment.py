"""An experiment, as a value: what a folder of `tasks/` brings that stands on the spine and is known by none of it.

A new experiment adds its rooms and its name to `schemas.experiments.EXPERIMENTS`; `tasks.stages` finds the rest here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.storage import Storage
from schemas.config import Config
from tasks.dictionaries.facts import Facts
from tasks.engine.run import Run
from tasks.engine.stage import Stage
from tasks.engine.tables import TableGroup
from tasks.explore.vocabulary import DensityBounds, PageAt, TokenValues
from tasks.report.vocabulary import Part

if TYPE_CHECKING:
    from rich.console import Console


def _nothing(run: Run) -> Mapping[str, object]:
    return {}


def _no_check(config: Config, storage: Storage, known: Mapping[int, Facts]) -> None: ...


def _no_print(connection: Any, console: Console) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What an experiment brings.

    Attributes:
        name: Its name in `schemas.experiments.EXPERIMENTS`, and of its rooms.
        stages: Its stages, in order, each with its own expectations.
        tables: The group of tables that it publishes.
        report: Its part of the report; a run ends with its findings.
        facts: What `run_info` says of it: names and values, no secret.
        check_fit: Asks, before any work, what can be known without weights: raises what is wrong. It is given what is
            known of the dictionaries, by layer.
        closing: Prints what a run ends with before them, from the published tables.
        pages: What it shows in the explorer; their addresses begin with its name.
        brings: What it adds to the explorer's pages of texts and features.
    """

    name: str
    stages: tuple[Stage[Any, Any], ...]
    tables: TableGroup
    report: Part
    facts: Callable[[Run], Mapping[str, object]] = _nothing
    check_fit: Callable[[Config, Storage, Mapping[int, Facts]], None] = _no_check
    closing: Callable[[Any, Console], None] = _no_print
    pages: tuple[PageAt, ...] = ()
    brings: tuple[TokenValues | DensityBounds, ...] = ()
