"""Experiment: which tokens must a model keep? Structured token retention against the field's baselines (PAPER 2)."""

from __future__ import annotations

from collections.abc import Mapping

from schemas.retention.section import retention_of
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.experiment import Experiment
from tasks.retention import report
from tasks.retention.gates import GATES
from tasks.retention.pages import PAGES
from tasks.retention.readings import READINGS
from tasks.retention.retrieval import RETRIEVAL
from tasks.retention.sequences import heldout_sequences
from tasks.retention.setups import check_fit
from tasks.retention.speed import SPEEDS
from tasks.retention.tables import RETENTION_GROUP


def _facts(run: Run) -> Mapping[str, object]:
    section, shards = retention_of(run.config), run.result(TOKENIZE)
    counts = {
        entry.length: len(heldout_sequences(run.config, run.storage, shards, entry.length, entry.documents))
        for entry in section.sequences
    }
    return {
        "retention_policies": ", ".join(section.policies),
        "retention_budgets": ", ".join(f"{budget:g}" for budget in section.budgets),
        "retention_budget_of": section.budget_of,
        "retention_protocols": ", ".join(section.protocols),
        "retention_chunk": section.chunk,
        "retention_sequences": "; ".join(f"{n} of {length} tokens" for length, n in counts.items()),
        "retention_heldout_share": section.heldout_share,
        "retention_protected": f"{section.sinks} sinks and {section.recent} recent tokens",
        "retention_seed": section.seed,
        "retention_resamples": section.resamples,
    }


EXPERIMENT = Experiment(
    name="retention",
    stages=(GATES, READINGS, SPEEDS, RETRIEVAL),
    tables=RETENTION_GROUP,
    report=report,
    facts=_facts,
    check_fit=check_fit,
    closing=report.closing,
    pages=PAGES,
)
