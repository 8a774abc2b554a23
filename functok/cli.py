"""The `functok` command. Every command's work is done elsewhere; this reads arguments and shows results."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from functok.api import PRIVATE, QUIET, opened, require_published
from infra.interrupt import end_interrupted, interruptible
from infra.last_words import last_words
from schemas.errors import ConfigError, FunctokError, whole_message
from schemas.work import StageName

if TYPE_CHECKING:
    from infra.storage import Storage

app = typer.Typer(
    name="functok",
    help="Which tokens open a language model's memory? From a corpus, a model and sparse autoencoders to the "
    "token-feature graph, its coverage tables, and a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DEFAULT_ROOT = "runs/functok"

RootOption = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="URL",
        envvar="FUNCTOK_ROOT",
        help="Where everything is written: a local path or s3://bucket/prefix.",
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own logs.")]
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint-url", metavar="URL", help="S3 endpoint, if not AWS.", envvar="AWS_ENDPOINT_URL"),
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Read every manifest again, instead of the index of those of each stage."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.PATH=VALUE", help="Override a key of the configuration; repeat for more."
    ),
]
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file, such as configs/demo.toml.", show_default=False)
]


class Format(StrEnum):
    """How query results are printed."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@app.command()
def run(
    config: ConfigArgument,
    assignments: SetOption = None,
    only: Annotated[StageName | None, typer.Option("--only", help="Run this stage alone.")] = None,
    start_from: Annotated[
        StageName | None, typer.Option("--from", help="Run this stage and those after it.")
    ] = None,
    verify: VerifyOption = False,
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Run the pipeline. Finished work is kept; only what is missing or changed is done.

    Needs no server: Prefect's own is started for the run, unless `PREFECT_API_URL` names one.
    Example: `functok run configs/demo.toml --set graph.rarefaction_m=50`.
    """
    from functok.pipeline import run_pipeline

    if only is not None and start_from is not None:
        raise ConfigError("--only and --from exclude each other")
    loaded, storage = opened(config, assignments or (), root)
    run_pipeline(loaded, storage, only=only, start_from=start_from, debug=debug, verify=verify)


@app.command()
def status(
    config: ConfigArgument,
    assignments: SetOption = None,
    details: Annotated[bool, typer.Option("--details", help="List every shard that would be made.")] = False,
    verify: VerifyOption = False,
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Show which stages and shards are done, stale or missing, and what a run would do now."""
    from rich.console import Console
    from rich.table import Table

    from tasks.stages import plan_run

    loaded, storage = opened(config, assignments or (), root)
    table = Table(title=f"{config} → {storage.root}", title_justify="left")
    for column in ("stage", "done", "to do", "why"):
        table.add_column(column)
    plans = plan_run(loaded, storage, verify=verify)
    for plan in plans:
        missing = "?" if plan.missing is None else str(plan.missing)
        table.add_row(plan.stage, str(plan.done), missing, plan.reason)
    console = Console()
    console.print(table)
    lines = [f"{plan.stage}: {line}" for plan in plans for line in plan.details]
    for line in lines if details else lines[:10]:
        console.print(line, markup=False, highlight=False)
    if len(lines) > 10 and not details:
        console.print(f"… and {len(lines) - 10} more (--details)")


@app.command()
def query(
    sql: Annotated[
        str | None, typer.Argument(metavar="SQL", help="None opens a prompt.", show_default=False)
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead.")] = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Run SQL against the catalogue. `functok query "SHOW TABLES" --root runs/demo` lists the tables."""
    from functok.query import prompt, run_query

    storage = _storage(root, endpoint_url)
    if sql is None:
        prompt(storage)
    else:
        run_query(storage, sql, format.value, output)


@app.command()
def catalog(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The DuckDB file to write.", show_default=False)
    ],
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a DuckDB file whose views are the tables, so that any DuckDB client can open it."""
    from schemas.config import DuckDb
    from tasks.engine.catalog_file import write_catalog_file
    from tasks.explore.labels import labels_table

    storage = _published(root, endpoint_url)
    write_catalog_file(storage, str(path), DuckDb(), labels_table(storage))
    typer.echo(f"{path}: open it with any DuckDB client")


@app.command()
def report(root: RootOption = None, endpoint_url: EndpointOption = None, debug: DebugOption = False) -> None:
    """(Re)write the HTML report from the tables."""
    from tasks.stages import write_report

    typer.echo(write_report(_published(root, endpoint_url)))


@app.command()
def explore(
    root: RootOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Where others can reach it, all pages need the token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="If it is taken, the next free one.")] = 4300,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Encode pasted text too: `run` for the run's own model, or where it is now.",
            show_default=False,
        ),
    ] = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Look at the tables in a browser: tokens, the features that they open, texts, SQL.

    Needs no network and no server beside it. Example: `functok explore --root runs/demo`.
    """
    from functok.explorer.server import serve

    serve(_published(root, endpoint_url), host, port, browser=browser, model=model)


@app.command()
def verify(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="With --repair: make anew what it needs.", show_default=False),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged, and make it anew if CONFIG is given.")
    ] = False,
    keep_suspects: Annotated[
        bool,
        typer.Option("--keep-suspects", help="With --repair: keep what was made from what is damaged."),
    ] = False,
    assignments: SetOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Read everything under a root, and tell each file that is not what was written. Exit status 1 if any is."""
    from functok.upkeep import verify as verify_root

    if config is None:
        loaded, storage = None, _storage(root, endpoint_url)
    else:
        loaded, storage = opened(config, assignments or (), root)
    verify_root(storage, loaded, repair=repair, keep_suspects=keep_suspects, debug=debug)


@app.command()
def gc(
    configs: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            help="Finished work that none of these needs is told too; repeat for more.",
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is told.")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="HOURS", min=0, help="Leave alone what is younger.")
    ] = 24.0,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what nothing reaches any more: how many bytes, and why. `--delete` acts."""
    from functok.upkeep import collect

    loaded = [opened(path, root=root) for path in configs or []]
    storage = loaded[0][1] if loaded else _storage(root, endpoint_url)
    collect(storage, [config for config, _ in loaded], delete=delete, hours=older_than)


@app.command()
def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the Prefect UI and API.")] = 4200,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="Configuration whose values fill the forms.", show_default="the demo's"
        ),
    ] = None,
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Start Prefect's server, work pools, workers and all deployments, ready to schedule in the UI.

    What is set in the UI outlives restarts. `--config` and `--root` reach the parameters that nobody has changed
    there, and hold at later starts until others are given.

    Teams: set `PREFECT_API_DATABASE_CONNECTION_URL` to a PostgreSQL database first.
    """
    from infra.prefect_server import up as bring_up

    bring_up(root, host=host, port=port, config=None if config is None else str(config), debug=debug)


def _storage(root: str | None, endpoint_url: str | None) -> Storage:
    from infra.storage import Storage

    return Storage(root or DEFAULT_ROOT, endpoint_url)


def _published(root: str | None, endpoint_url: str | None) -> Storage:
    storage = _storage(root, endpoint_url)
    require_published(storage)
    return storage


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors become one line on stderr and exit status 1, unless `--debug`."""
    if arguments is None:
        with last_words():
            main(sys.argv[1:])
        return
    debug = "--debug" in arguments
    for name, value in (PRIVATE if debug else {**PRIVATE, **QUIET}).items():
        # Inherited by all processes of a run.
        os.environ.setdefault(name, value)
    if not debug:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with interruptible():
            app(arguments, standalone_mode=True)
    except FunctokError as error:
        if debug:
            raise
        place = "the configuration" if isinstance(error, ConfigError) else ""
        _complain(f"stage {error.stage}" if error.stage else place, error.message, error.hint)
    except (KeyboardInterrupt, typer.Abort):
        is_run = arguments[:1] == ["run"]
        end_interrupted("finished work is kept; run the same command again to continue" if is_run else "")
    except Exception as error:
        if debug:
            raise
        message = f"unexpected {whole_message(error, with_type=True)}"
        _complain("", message, "run again with --debug for the traceback")


def _complain(stage: str, message: str, hint: str) -> None:
    print(f"error{f' in {stage}' if stage else ''}: {message}", file=sys.stderr)
    if hint:
        print(f"  way out: {hint}", file=sys.stderr)
    raise SystemExit(1)
