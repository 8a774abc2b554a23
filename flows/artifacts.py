"""What a finished stage shows in Prefect: small tables and links, read from the published tables.

Artifacts' keys are global to a server, so each has the root's name in it (`infra.addresses.root_name`), and its
description the whole address.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from infra import verified
from infra.addresses import without_credentials
from infra.duck import CATALOG, connect, read_catalog, telling_damage
from infra.published import REPORT, browser_address, note_root, report_page
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.work import Checkpoint, GrownSae
from schemas.steering.work import CaseFeatures, SteeredPrompt, TraitFeatures
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.report.text import label, shared_texts

COVERAGE_RANKS = 10
"""The ranks of PAPER 1.2's table."""

FUNCTION_TOKENS = 200
"""Rows of the function token table at most; the paper's corpus has 122."""

HEAT_MAPS = 6
STEERED_TEXTS = 200
"""Heat maps and rows of steered texts at most."""

TRAIT_FEATURES = 5
"""Features shown of a trait's most informative layer."""


def show_corpus(storage: Storage, shards: CorpusShards) -> None:
    """A table of how much each corpus file gave."""
    sources: dict[str, list[int]] = {}
    for shard in shards.shards:
        counts = sources.setdefault(without_credentials(shard.source), [0, 0, 0, 0])
        for index, more in enumerate((1, shard.n_documents, shard.n_tokens, shard.n_rejects)):
            counts[index] += more
    rows = [
        dict(zip(("source", "shards", "documents", "tokens", "rejects"), (source, *counts), strict=True))
        for source, counts in sources.items()
    ]
    _show_table(
        storage,
        "corpus",
        rows[:1000],
        f"{shards.n_documents:,} documents, {shards.n_tokens:,} tokens and {shards.n_rejects:,} rejects",
    )


def show_dictionaries(storage: Storage, dictionaries: Sequence[Dictionary]) -> None:
    """A table of the dictionaries, with the gate's figures where they were trained here."""
    rows = [
        {"layer": entry.layer, "latents": entry.d_sae, "source": entry.source, **(entry.quality or {})}
        for entry in dictionaries
    ]
    _show_table(storage, "dictionaries", rows, "The dictionary of each layer")


def show_features(storage: Storage, features: Sequence[FeatureShard]) -> None:
    """A table of how much was extracted per layer."""
    rows: dict[int, dict[str, Any]] = {}
    for shard in features:
        row = rows.setdefault(shard.layer, {"layer": shard.layer, "shards": 0, "tokens": 0, "activations": 0})
        row["shards"] += 1
        row["tokens"] += shard.part.n_tokens
        row["activations"] += shard.n_activations
    _show_table(storage, "features", [rows[layer] for layer in sorted(rows)], "Activated features")


def show_checkpoints(storage: Storage, checkpoints: Sequence[Checkpoint]) -> None:
    """A table of the checkpoints of every series."""
    from tasks.pretraining.table_plan import checkpoint_rows

    _show_table(storage, "checkpoints", checkpoint_rows(checkpoints), "The checkpoints of every series")


def show_growth(storage: Storage, grown: Sequence[GrownSae]) -> None:
    """A table of what each checkpoint's SAE has learned, with its quality beside the count."""
    rows = [
        {
            "model": entry.checkpoint.series,
            "step": entry.checkpoint.step,
            **verified.read_table(storage, f"{entry.folder}/learned.parquet").to_pylist()[0],
        }
        for entry in grown
    ]
    _show_table(storage, "learned-features", rows, "Learned features by checkpoint")


def show_reactivation(storage: Storage, read: Sequence[CaseFeatures]) -> None:
    """A table of the cases: their prompts, and how many tokens were read."""
    rows = []
    for case in read:
        prompts = verified.read_table(storage, f"{case.folder}/prompt_tokens.parquet", columns=["prompt"])[
            "prompt"
        ]
        rows.append(
            {
                "case": case.case,
                "prompts": " / ".join(prompts.unique().to_pylist()),
                "tokens": case.n_tokens,
            }
        )
    _show_table(storage, "cases", rows, "Prompts that differ in one place")


def show_steering(
    storage: Storage, traits: Sequence[TraitFeatures], steered: Sequence[SteeredPrompt]
) -> None:
    """Tables of each trait's strongest features, and of what each experiment answers at each strength."""
    _show_table(
        storage,
        "traits",
        [row for trait in traits for row in _trait_rows(storage, trait)],
        "Each trait's strongest features at its most informative layer",
    )
    rows = [row for made in steered for row in _steered_rows(storage, made)]
    places = ", ".join(dict.fromkeys(row["place"] for row in rows))
    _show_table(
        storage,
        "steered-texts",
        rows[:STEERED_TEXTS],
        f"Answers before and after the trait's features are set (place: {places or 'none'})",
    )


def _trait_rows(storage: Storage, trait: TraitFeatures) -> list[dict[str, Any]]:
    from tasks.steering.loaded_traits import load_layers

    [best] = [layer for layer in load_layers(storage, trait) if layer.is_most_informative]
    [folder] = [entry.folder for entry in trait.layers if entry.layer == best.layer]
    features = verified.read_table(storage, f"{folder}/trait_features.parquet").to_pylist()
    return [
        {
            "trait": trait.trait,
            "layer": best.layer,
            "separation": best.separation,
            "accuracy": best.accuracy,
            **{name: row[name] for name in ("place", "feature_id", "coefficient", "contribution")},
        }
        for row in features
        if row["place"] <= TRAIT_FEATURES
    ]


def _steered_rows(storage: Storage, made: SteeredPrompt) -> list[dict[str, Any]]:
    rows = verified.read_table(storage, f"{made.folder}/steering.parquet").to_pylist()
    places = [row["place"] for row in rows if row["control"] == "trait"]
    shown = ("case", "prompt", "mode", "place", "strength", "baseline_text", "steered_text")
    return [
        {name: row[name] for name in shown}
        for row in rows
        if row["control"] == "trait" and row["place"] in places[:1]
    ]


def show_tables(config: Config, storage: Storage) -> None:
    """Tables of the function tokens and, where the graph is published, of the coverage per layer; a link."""
    published = read_catalog(storage).tables
    with telling_damage(), connect(storage, config.duckdb) as connection:
        shared = shared_texts(connection) if "tokens" in published else frozenset()
        if "tokens" in published:
            rows = connection.execute(
                "SELECT rank, token, token_id, count, share, doc_share FROM tokens WHERE is_function "
                "ORDER BY rank LIMIT ?",
                [FUNCTION_TOKENS],
            ).fetchall()
            _show_table(
                storage,
                "function-tokens",
                [
                    {
                        "rank": rank,
                        "token": label(token, token_id, shared),
                        "count": count,
                        "share": f"{share:.2%}",
                        "documents": f"{documents:.1%}",
                    }
                    for rank, token, token_id, count, share, documents in rows
                ],
                f"Function tokens: the most frequent, up to {config.function_tokens.share:.0%} of all",
            )
        if "coverage" in published:
            _show_table(
                storage,
                "coverage",
                coverage_rows(
                    connection.execute(
                        "SELECT rank, token, token_id, layer, coverage FROM coverage "
                        "QUALIFY row_number() OVER (PARTITION BY layer ORDER BY rank) <= ? ORDER BY rank, layer",
                        [COVERAGE_RANKS],
                    ).fetchall(),
                    shared,
                ),
                "Share of the activated features that the most frequent tokens reach together",
            )
    address = storage.url(CATALOG)
    question = f'functok query --root {shlex.quote(storage.root)} "SHOW TABLES"'
    _show_text(
        storage,
        "catalogue",
        f"{_code(address)}\n\n{_code(question)}",
        "The published tables, and how to ask them",
    )


def show_heat_maps(config: Config, storage: Storage) -> None:
    """What steering does, by strength, and heat maps of reactivation, from the published tables."""
    from tasks.report.charts import png_uri
    from tasks.steering.heat_maps import RULE, heat_map_chart, heat_maps

    published = read_catalog(storage).tables
    with telling_damage(), connect(storage, config.duckdb) as connection:
        if "steering_effects" in published:
            found = connection.execute(
                "SELECT mode, place, control, strength, n, target_logprob_delta, advantage, kl, "
                "log_perplexity_delta, changed FROM steering_effects ORDER BY ALL"
            )
            names = [column[0] for column in found.description]
            _show_table(
                storage,
                "steering-effects",
                [dict(zip(names, row, strict=True)) for row in found.fetchall()],
                "What steering does to the answers, on average over the experiments, beside its controls",
            )
        for place, found in enumerate(heat_maps(connection, HEAT_MAPS), 1):
            chart = heat_map_chart(found)
            create_image_artifact(
                image_url=png_uri(chart.spec),
                key=f"heat-map-{place}-{storage.name}",
                description=f"{chart.alt} {RULE} Root: {storage.root}",
            )


def coverage_rows(
    found: Sequence[tuple[int, str, int, int, float]], shared: Collection[str]
) -> list[dict[str, Any]]:
    """PAPER 1.2's table: a row for each rank, a column for each layer.

    Args:
        found: (rank, token, token id, layer, coverage).
        shared: Texts that several tokens have.
    """
    rows: dict[int, dict[str, Any]] = {}
    for rank, token, token_id, layer, coverage in found:
        row = rows.setdefault(rank, {"rank": rank, "token": label(token, token_id, shared)})
        row[f"layer {layer}"] = f"{coverage:.2%}"
    return list(rows.values())


def show_report(storage: Storage) -> None:
    """A link to the report where the server is one of `functok up`; elsewhere its address, which no page may open."""
    try:
        link = browser_address(report_page(storage.name))
        if link is not None:
            note_root(storage)
    except Exception as error:
        # The report is written; only the way to it is not.
        get_run_logger().warning("The report cannot be linked in Prefect: %s", error)
        return
    description = "The figures and tables of the paper"
    if link is None:
        how = "A browser opens a file on its own machine; `functok up` serves the reports of its runs."
        _show_text(storage, "report", f"{_code(storage.url(REPORT))}\n\n{how}", description)
    else:
        text = f"Report of {storage.name}"
        create_link_artifact(
            link=link,
            link_text=text,
            key=f"report-{storage.name}",
            # The page of a key shows its description alone.
            description=_of_root(f"[{text}]({link}): {description[0].lower()}{description[1:]}", storage),
        )


def show_damage(storage: Storage, rows: list[dict[str, Any]], n_files: int, n_bytes: int) -> None:
    """What `functok verify` found."""
    shown = rows or [{"file": "none", "what": "everything is as it was written"}]
    _show_table(storage, "damaged-files", shown, f"{n_files:,} files, {n_bytes:,} bytes read")


def _show_table(storage: Storage, what: str, rows: list[dict[str, Any]], description: str) -> None:
    create_table_artifact(
        table=rows, key=f"{what}-{storage.name}", description=_of_root(description, storage)
    )


def _show_text(storage: Storage, what: str, markdown: str, description: str) -> None:
    create_markdown_artifact(
        markdown=markdown, key=f"{what}-{storage.name}", description=_of_root(description, storage)
    )


def _of_root(description: str, storage: Storage) -> str:
    return f"{description} (root: {storage.root})"


def _code(text: str) -> str:
    """A block of code in Markdown, whatever backticks the text has."""
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
