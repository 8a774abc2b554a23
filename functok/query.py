"""`functok query`: SQL on the published tables."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa

from functok.api import require_published
from functok.formats import WRITERS
from infra.duck import telling_damage
from infra.interrupt import ends_query_only, one_query
from infra.storage import Storage
from infra.terminal import printable
from schemas.errors import ConfigError, FunctokError
from tasks.explore.labels import connect_labelled

_ROWS_SHOWN = 1000
_BATCH = 10_000


def run_query(storage: Storage, sql: str, format: str, output: Path | None = None) -> None:
    """Run one or more statements and print what they give: as tables one after another, else the one result.

    Args:
        storage: The root whose catalogue is asked.
        sql: DuckDB SQL.
        format: `table`, `csv` (lists, structs and maps in it as JSON), `json` or `parquet`.
        output: A file to write instead of standard output.

    Raises:
        ConfigError: if there is no statement, or more results than the format holds.
        FunctokError: if nothing is published, or the SQL is wrong.
    """
    if not sql.strip():
        raise ConfigError("the query is empty", hint='for example `functok query "SHOW TABLES"`')
    with _explained():
        connection = _connected(storage)
        statements = connection.extract_statements(sql)
        n_results = sum(
            statement.expected_result_type == [duckdb.ExpectedResultType.QUERY_RESULT]
            for statement in statements
        )
        if n_results > 1 and format != "table":
            raise ConfigError(
                f"{n_results} of the statements give a result, and --format {format} holds one",
                hint="run them one by one, or leave --format out",
            )
        if format == "parquet" and output is None and sys.stdout.isatty():
            raise ConfigError("Parquet is binary", hint="give --output FILE, or redirect standard output")
        with ExitStack() as stack:
            target: IO[bytes] | None = None
            for statement in statements:
                reader = _reader(connection, statement)
                if reader is not None:
                    target = target or stack.enter_context(_target(output))
                    _WRITERS[format](reader, target)


def prompt(storage: Storage) -> None:
    """Read statements until the end of input; a statement ends with `;`. Ctrl-C ends a statement, not the prompt."""
    with _explained():
        connection = _connected(storage)
    history = History(history_file()) if sys.stdin.isatty() else None
    print(f"functok query on {storage.root}: SQL ending in ';', .tables, or .quit")
    statement = ""
    with ends_query_only():
        while True:
            try:
                line = input("functok> " if not statement else "    ...> ")
                command = line.strip()
                # No line of SQL is such a word, so a forgotten semicolon does not make it part of a statement.
                if command in {".quit", ".exit"} or (not statement and command in {"exit", "quit"}):
                    return
                statement = "SHOW TABLES;" if command == ".tables" else f"{statement}{line}\n"
                if not statement.strip():
                    statement = ""
                elif _is_whole(connection, statement):
                    asked, statement = statement, ""
                    if history is not None:
                        history.add(asked)
                    _answer(connection, asked)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("interrupted" if not statement else "")
                statement = ""


def _answer(connection: Any, sql: str) -> None:
    """Show the result of each statement of a line; what is wrong is said, and ends the line."""
    try:
        with one_query(), _explained():
            for statement in connection.extract_statements(sql):
                reader = _reader(connection, statement)
                if reader is not None:
                    _write_table(reader, sys.stdout.buffer)
    except FunctokError as error:
        print(error.message)


def _is_whole(connection: Any, sql: str) -> bool:
    """Whether a statement ends here: with a semicolon that is in no string and no comment."""
    if not sql.rstrip().endswith(";"):
        return False
    try:
        connection.extract_statements(sql)
    except duckdb.ParserException as error:
        return "unterminated" not in str(error)
    return True


_SECRET = re.compile(r"secret|passw|credential|api_?key|access_key|session_token|://[^/\s]*@", re.IGNORECASE)


def history_file() -> Path:
    """Where the prompt keeps what was asked: in the user's state folder (XDG)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "functok" / "query_history"


class History:
    """What was asked at the prompt, in this session and earlier ones; the user alone can read it.

    Statements that may hold a password or a key are in no file. Where none can be written, sessions have no history.

    Args:
        path: The file.
    """

    kept = 1000

    def __init__(self, path: Path) -> None:
        import readline

        self._readline = readline
        self._path: Path | None = path
        readline.set_auto_history(False)
        readline.clear_history()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            path.chmod(0o600)
            readline.read_history_file(path)
            if readline.get_current_history_length() > 2 * self.kept:
                readline.set_history_length(self.kept)
                readline.write_history_file(path)
        except OSError:
            self._path = None

    def add(self, statement: str) -> None:
        """Keep the lines of a statement."""
        lines = statement.strip().splitlines()
        for line in lines:
            self._readline.add_history(line)
        if self._path is not None and not _SECRET.search(statement):
            try:
                self._readline.append_history_file(len(lines), self._path)
            except OSError:
                self._path = None


def _connected(storage: Storage) -> Any:
    require_published(storage)
    return connect_labelled(storage)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        with telling_damage():
            yield
    except BrokenPipeError:
        # The reader of our output has seen enough.
        sys.stdout = io.TextIOWrapper(io.BytesIO())
    except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
        hint = '`functok query "SHOW TABLES"` lists the tables, "DESCRIBE tokens" a table\'s columns'
        raise FunctokError(f"the query failed: {error}", hint=hint) from error
    except pa.ArrowNotImplementedError as error:
        hint = "another --format may hold it, or cast the column: CAST(… AS VARCHAR)"
        raise FunctokError(f"the query failed: {error}", hint=hint) from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        hint = "if it names a damaged or missing file, `functok run CONFIG` makes it again"
        raise FunctokError(f"the query failed: {error}", hint=hint) from error


def _reader(connection: Any, statement: Any) -> pa.RecordBatchReader | None:
    relation = connection.sql(statement.query)
    return None if relation is None else relation.to_arrow_reader(_BATCH)


@contextmanager
def _target(output: Path | None) -> Iterator[IO[bytes]]:
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with open(output, "wb") as file:
        yield file


def _write_table(reader: pa.RecordBatchReader, target: IO[bytes]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name, kind in zip(reader.schema.names, reader.schema.types, strict=True):
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        table.add_column(Text(name), justify="right" if is_number else "left")
    rows = (
        row for batch in reader for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    )
    for row in islice(rows, _ROWS_SHOWN):
        table.add_row(*(Text(_cell(value)) for value in row))
    text = io.StringIO()
    console = Console(file=text, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if next(rows, None) is not None:
        console.print(f"the first {_ROWS_SHOWN} rows; --format csv, json or parquet gives all", markup=False)
    target.write(text.getvalue().encode())
    target.flush()


def _cell(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(str(value))


_WRITERS = {**WRITERS, "table": _write_table}
