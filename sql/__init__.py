"""Analysis: one `.sql` file a table, of the catalogue or on the way to one; the file name is the table name."""

from importlib.resources import files


def read_sql(table: str) -> str:
    """The SELECT that makes `table`."""
    return files(__name__).joinpath(f"{table}.sql").read_text(encoding="utf-8")
