"""`functok run`: ask what there is to do, do it through Prefect, and show what came out."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from infra.catalog import CATALOG, read_catalog
from infra.config_file import refuse_secrets
from infra.duck import connect, telling_damage
from infra.published import REPORT
from infra.run_api import chosen_api
from infra.storage import Storage
from infra.terminal import printable
from schemas.config import Config
from schemas.work import StageName
from tasks.stages import is_up_to_date, plan_run, published_experiments, stages_of


def run_pipeline(
    config: Config,
    storage: Storage,
    *,
    only: StageName | None,
    start_from: StageName | None,
    debug: bool = False,
    verify: bool = False,
) -> None:
    """Run what is missing; start Prefect only if something is.

    Raises:
        FunctokError: if a stage does not apply to this configuration, or fails.
    """
    started = time.monotonic()
    stages = stages_of(config, only, start_from)
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
    """Print the coverage table, what each experiment ends with, and where everything lies."""
    from rich.console import Console

    console = Console()
    say = partial(console.print, markup=False, highlight=False)
    catalog = read_catalog(storage)
    with connect(storage) as connection:
        if "coverage" in catalog.tables:
            console.print(coverage_table(connection))
        for one in published_experiments(catalog):
            one.closing(connection, console)
            for found in one.report.findings(connection):
                say(f"\n{found.title}: {found.verdict.upper()}. {printable(found.text)}")
    say(f"\nfinished in {seconds:.1f} s; everything is under {storage.root}")
    if storage.exists(REPORT):
        say(f"report:  {storage.url(REPORT)}")
    if catalog.tables:
        example = f"SELECT * FROM {'coverage' if 'coverage' in catalog.tables else 'tokens'} LIMIT 10"
        say(f'query:   functok query --root {shlex.quote(config.storage.root)} "{example}"')


def coverage_table(connection: Any) -> Any:
    """Cumulative share of the activated features that the most frequent tokens reach, a column a layer (PAPER 1.2)."""
    from rich.table import Table
    from rich.text import Text

    from tasks.graph.tables import top_coverage

    by_rank: dict[int, tuple[str, dict[int, float]]] = {}
    for rank, token, layer, coverage in top_coverage(connection):
        by_rank.setdefault(rank, (token, {}))[1][layer] = coverage
    layers = sorted({layer for _, shares in by_rank.values() for layer in shares})
    table = Table(title="Coverage: share of the activated features reached by the most frequent tokens")
    table.add_column("rank", justify="right")
    table.add_column("token")
    for layer in layers:
        table.add_column(f"layer {layer}", justify="right")
    for rank, (shown, shares) in by_rank.items():
        cells = [Text(f"{shares[layer]:.2%}") if layer in shares else Text("") for layer in layers]
        table.add_row(str(rank), Text(shown), *cells)
    return table
