"""Analysis: one `.sql` file a table, of the catalogue or on the way to one; the file name is the table name."""

from importlib.resources import files

_ASKS = "explore"
"""The room whose SELECTs are questions of pages, which make no table and may be called as the one that they ask."""


def read_sql(table: str) -> str:
    """The SELECT that makes `table`, from the room that it is in.

    Raises:
        FileNotFoundError: if there is none.
    """
    name = f"{table}.sql"
    for room in files(__name__).iterdir():
        if room.is_dir() and room.name != _ASKS and (query := room / name).is_file():
            return query.read_text(encoding="utf-8")
    raise FileNotFoundError(f"there is no sql/…/{name}")
