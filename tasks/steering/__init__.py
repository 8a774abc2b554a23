"""Experiment: reactivation and steering (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Mapping

from infra.addresses import without_credentials
from infra.storage import Storage
from schemas.config import Config
from schemas.steering.section import steering_of
from tasks.dictionaries.facts import Facts
from tasks.engine.run import Run
from tasks.experiment import Experiment
from tasks.steering import report
from tasks.steering.cases import check_cases, check_clamps
from tasks.steering.pages import PAGES
from tasks.steering.reactivation import REACTIVATION
from tasks.steering.steering import STEERING
from tasks.steering.tables import STEERING_GROUP


def _facts(run: Run) -> Mapping[str, object]:
    section = steering_of(run.config)
    return {
        "steering_cases": without_credentials(section.cases),
        "steering_chat_template": str(section.chat_template).lower(),
        "steering_decomposition": section.decomposition,
        "steering_features": section.features,
        "steering_random_controls": section.random_controls,
        "steering_resamples": section.resamples,
        "steering_seed": section.seed,
    }


def _check_fit(config: Config, storage: Storage, known: Mapping[int, Facts]) -> None:
    check_clamps(config, check_cases(config, storage), known)


EXPERIMENT = Experiment(
    name="steering",
    stages=(REACTIVATION, STEERING),
    tables=STEERING_GROUP,
    report=report,
    facts=_facts,
    check_fit=_check_fit,
    pages=PAGES,
)
