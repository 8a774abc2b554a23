"""A Prefect home and API for the tests, which never touch the user's own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

for name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[name]
HOME = Path(tempfile.mkdtemp(prefix="functok-test-prefect-"))
os.environ["PREFECT_HOME"] = str(HOME)
atexit.register(shutil.rmtree, HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The URL of an API that flows in this process use: the temporary server of `functok run`."""
    import flows  # sets Prefect's environment before prefect is imported
    from infra.run_api import run_api

    assert flows.__doc__
    with run_api(debug=True):
        from prefect.settings import PREFECT_API_URL

        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def prefect_database() -> Path:
    """A copy of a migrated database: making one takes 10 s."""
    import flows  # sets Prefect's environment before prefect is imported
    from infra.run_api import run_api
    from infra.storage import LOCAL_CACHE
    from infra.temporary_server import empty_database

    assert flows.__doc__
    empty = empty_database(LOCAL_CACHE)
    if not empty.is_file():
        with run_api(debug=True):
            pass
    copy = HOME / "copy" / "prefect.db"
    copy.parent.mkdir()
    shutil.copyfile(empty, copy)
    return copy
