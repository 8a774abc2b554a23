"""The first page: what a run is, what was found, what its most frequent tokens reach."""

from __future__ import annotations

from typing import Any

from tasks.explore.cover import coverage
from tasks.explore.vocabulary import (
    Asked,
    Columns,
    Facts,
    Findings,
    Grid,
    Link,
    Page,
    PageAt,
    Panel,
    Query,
    address,
)
from tasks.report import corpus, graph
from tasks.report.text import integer
from tasks.report.vocabulary import Column, Finding, Part


def overview(asked: Asked) -> Page:
    """What this run is, what its most frequent tokens reach, findings and verdicts, dictionaries, checks."""
    return Page(
        title="Overview",
        lead="Which tokens open which features. A token opens a feature that it activates at least once here.",
        panels=[
            Columns(panels=_run(asked)),
            *coverage(asked),
            Findings(title="Findings", findings=_findings(asked)),
            *_dictionaries(asked),
            *_expectations(asked),
            *_settings(asked),
        ],
    )


FIRST = (
    "model",
    "model_revision",
    "tokenizer",
    "corpus_urls",
    "layers",
    "context_size",
    "prepend_bos",
    "functok_version",
)
"""What is said first of a run's settings."""

PAGES = (PageAt(path="/", title="Overview", build=overview, menu=True),)


def findings(connection: Any) -> list[Finding]:
    """The report's own findings, without those of experiments; the connection is one of `infra.duck.connect`."""
    return corpus.findings(connection) + graph.findings(connection)


def _findings(asked: Asked) -> list[Finding]:
    found = [*asked.kept("findings", lambda: findings(asked.connection))]
    for part in asked.context.get("parts", ()):
        found += findings_of(asked, part)
    return found


def findings_of(asked: Asked, part: Part) -> list[Finding]:
    """What an experiment found; computed once for the tables of a run, as its intervals take seconds."""
    found: list[Finding] = asked.kept(part, lambda: part.findings(asked.connection))
    return found


def _run(asked: Asked) -> list[Panel]:
    counted = [
        (name, value, "") for name, value in [*corpus.facts(asked.connection), *graph.facts(asked.connection)]
    ]
    for part in asked.context.get("parts", ()):
        counted += [(name, value, "") for name, value in part.facts(asked.connection)]
    if asked.has("expectations"):
        failed = asked.value(Query(sql="SELECT count(*) FROM expectations WHERE NOT success"))
        counted.append(("expectations not met", integer(failed), "#expectations"))
    numbers = Facts(title="In numbers", facts=counted)
    if not asked.has("run_info"):
        return [numbers]
    query = Query.of("explore/run_settings")
    settings = {row["key"]: row["value"] for row in asked.rows(query)}
    told = [(key.replace("_", " "), settings[key], "") for key in FIRST if key in settings]
    catalog = asked.context.get("catalog")
    keys = [(f"key of {group}", key, "") for group, key in (catalog.lineage.items() if catalog else ())]
    return [Facts(title="This run", facts=[*told, *keys], query=query), numbers]


def _dictionaries(asked: Asked) -> list[Panel]:
    if not asked.has("dictionaries", "graph_summary"):
        return []
    return [
        Grid(
            key="dictionaries",
            caption="Dictionaries",
            query=Query.of("explore/run_dictionaries"),
            columns=[
                Link(column=Column("layer", "plain"), to=lambda row: address("features", layer=row["layer"])),
                Column("source"),
                Column("dictionary_size", "integer", "features"),
                Column("activated_share", "percent", "activated"),
                Column("mean_l0", "number", "mean L0"),
                Column("explained_variance", "number"),
                Column("explained_variance_all", "number", "with outliers"),
                Column("l0", "number", "L0, held out"),
                Column("alive_share", "percent", "alive", digits=1),
                Column("heldout_tokens", "integer", "held-out tokens"),
            ],
            order="layer",
            note="Activated and mean L0: in the graph. The others: on held-out tokens where the dictionary was trained "
            "here, a dash where it was not. Explained variance leaves massive activations out, the column beside it "
            "has them in.",
        )
    ]


def _settings(asked: Asked) -> list[Panel]:
    if not asked.has("run_info"):
        return []
    return [
        Grid(
            key="settings",
            caption="Everything that this run says of itself",
            query=Query.of("explore/run_settings"),
            columns=[Column("key", heading="setting"), Column("value")],
            order="key",
            filters=["key", "value"],
            page_size=10,
        )
    ]


def _expectations(asked: Asked) -> list[Panel]:
    if not asked.has("expectations"):
        return []
    return [
        Grid(
            key="expectations",
            caption="What every stage was checked for, failures first",
            query=Query.of("explore/run_expectations"),
            columns=[
                Column("success", "met", "met"),
                Column("stage"),
                Column("expectation"),
                Column("observed"),
            ],
            order="success",
            filters=["stage", "expectation"],
            page_size=10,
        )
    ]
