"""`functok run`: ask what there is to do, do it through Prefect, and show what came out."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from infra.config_file import refuse_secrets
from infra.duck import CATALOG, connect, read_catalog, telling_damage
from infra.published import REPORT
from infra.run_api import chosen_api
from infra.storage import Storage
from infra.terminal import printable
from schemas.config import Config
from schemas.errors import FunctokError
from schemas.work import Stage
from tasks.engine.plan import is_up_to_date, plan_run, stages_of
from tasks.report.text import label, shared_texts
from tasks.report.vocabulary import Finding

TOP_RANKS = 10


def run_pipeline(
    config: Config,
    storage: Storage,
    *,
    only: Stage | None,
    start_from: Stage | None,
    debug: bool = False,
    verify: bool = False,
) -> None:
    """Run what is missing; start Prefect only if something is.

    Raises:
        FunctokError: if a stage does not apply to this configuration, or fails.
    """
    started = time.monotonic()
    stages = stages_of(config, only, start_from)
    if not stages:
        raise FunctokError(
            f"the stage {only or start_from} does not apply to this configuration",
            hint=f"it has the stages {', '.join(stages_of(config))}",
        )
    refuse_secrets(config)
    with ExitStack() as stack:
        # Without a catalogue there is something to do: Prefect starts beside the planning.
        is_new = "tables" in stages and not storage.exists(CATALOG)
        api = stack.enter_context(chosen_api(debug=debug)) if is_new else None
        if is_up_to_date(plan_run(config, storage, verify=verify), stages):
            print("nothing to do: everything asked for is up to date")
        else:
            from flows.reproduce import run

            run(config, only=only, start_from=start_from, debug=debug, api=api)
    with telling_damage():
        show_results(config, storage, time.monotonic() - started)


def show_results(config: Config, storage: Storage, seconds: float) -> None:
    """Print the coverage table, if there is one, and where everything lies."""
    from rich.console import Console

    console = Console()
    catalog = read_catalog(storage)
    if "coverage" in catalog.tables:
        console.print(coverage_table(storage))
    if {"reactivation_scores", "steering_effects"} & catalog.tables.keys():
        show_steering(storage, console)
    if "loss_buckets" in catalog.tables:
        show_consolidation(storage, console)
    console.print(
        f"\nfinished in {seconds:.1f} s; everything is under {storage.root}", markup=False, highlight=False
    )
    if storage.exists(REPORT):
        console.print(f"report:  {storage.url(REPORT)}", markup=False, highlight=False)
    if catalog.tables:
        shown = next(table for table in ("coverage", "loss_buckets", "tokens") if table in catalog.tables)
        example = f"SELECT * FROM {shown} LIMIT 10"
        console.print(
            f'query:   functok query --root {shlex.quote(config.storage.root)} "{example}"',
            markup=False,
            highlight=False,
        )


def coverage_table(storage: Storage) -> Any:
    """Cumulative share of the activated features that the most frequent tokens reach, a column a layer (PAPER 1.2)."""
    from rich.table import Table
    from rich.text import Text

    connection = connect(storage)
    layers = [
        row[0] for row in connection.sql("SELECT DISTINCT layer FROM coverage ORDER BY layer").fetchall()
    ]
    rows = connection.execute(
        "SELECT rank, token, token_id, layer, coverage FROM coverage "
        "QUALIFY row_number() OVER (PARTITION BY layer ORDER BY rank) <= ? ORDER BY rank, layer",
        [TOP_RANKS],
    ).fetchall()
    shared = shared_texts(connection)
    connection.close()
    table = Table(title="Coverage: share of the activated features reached by the most frequent tokens")
    table.add_column("rank", justify="right")
    table.add_column("token")
    for layer in layers:
        table.add_column(f"layer {layer}", justify="right")
    by_rank: dict[int, tuple[str, dict[int, float]]] = {}
    for rank, token, token_id, layer, coverage in rows:
        by_rank.setdefault(rank, (label(token, token_id, shared), {}))[1][layer] = coverage
    for rank, (shown, shares) in by_rank.items():
        cells = [Text(f"{shares[layer]:.2%}") if layer in shares else Text("") for layer in layers]
        table.add_row(str(rank), Text(shown), *cells)
    return table


def show_consolidation(storage: Storage, console: Any) -> None:
    """Print the last checkpoints' losses by token group, and whether each finding of PAPER 1.4 holds here."""
    from rich.table import Table
    from rich.text import Text

    from tasks.pretraining.report import final_losses, findings

    with connect(storage) as connection:
        losses, found = final_losses(connection), findings(connection)
    table = Table(title="Loss by token group (current → next), nats on held-out documents, 95 % intervals")
    table.add_column("group")
    series = {(row["model"], row["step"]): f"{row['model']}, step {row['step']:,}" for row in losses}
    for title in series.values():
        table.add_column(Text(printable(title)), justify="right")
    cells = {
        (row["bucket"], row["model"]): "–"
        if row["mean_loss"] is None
        else f"{row['mean_loss']:.3f}"
        + (
            ""
            if row["mean_loss_low"] is None
            else f" ({row['mean_loss_low']:.3f}–{row['mean_loss_high']:.3f})"
        )
        for row in losses
    }
    for bucket in dict.fromkeys(row["bucket"] for row in losses):
        table.add_row(bucket, *(cells.get((bucket, model), "") for model, _ in series))
    console.print(table)
    _show_findings(found, console)


def show_steering(storage: Storage, console: Any) -> None:
    """Print whether the findings of PAPER 1.3 hold here."""
    from tasks.steering.report import findings

    with connect(storage) as connection:
        found = findings(connection)
    _show_findings(found, console)


def _show_findings(findings: Sequence[Finding], console: Any) -> None:
    for found in findings:
        told = f"\n{found.title}: {found.verdict.upper()}. {printable(found.text)}"
        console.print(told, markup=False, highlight=False)
