"""Where a browser finds what a run has made: the roots that a server of `functok up` knows, and its addresses for them.

A page that comes over http may not open `file://` or `s3://`, so `functok up` serves reports itself
(`infra.web_server`). It serves the roots alone that a run or `functok up` has noted with the server, as a variable
(`functok_root_<name>`): a name leads to a root, so no address that somebody asks for is ever opened.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.prefect_api import answer, client_of, keep_variable

if TYPE_CHECKING:
    from infra.storage import Storage

REPORT = "report.html"
"""The report in its root."""

PAGES = "/functok"
"""Where functok's own pages begin, beside Prefect's UI (`/`) and API (`/api`)."""

GREETING = "functok"
"""What `/functok/health` answers, which Prefect's own server does not."""

_VARIABLE = "functok_root_"


@dataclass(frozen=True, kw_only=True)
class KnownRoot:
    """A root that a server knows.

    Attributes:
        name: Short and stable (`infra.addresses.root_name`).
        root: Its address.
        endpoint_url: S3 endpoint, if not AWS.
    """

    name: str
    root: str
    endpoint_url: str | None = None

    def open(self) -> Storage:
        """Its storage."""
        from infra.storage import Storage

        return Storage(self.root, self.endpoint_url)


def note_root(storage: Storage, api_url: str | None = None) -> None:
    """Have the server know a root.

    Args:
        storage: The root.
        api_url: The server; Prefect's setting PREFECT_API_URL if not given.
    """
    value = asdict(KnownRoot(name=storage.name, root=storage.root, endpoint_url=storage.endpoint_url))
    with client_of(api_url) as client:
        keep_variable(client, _VARIABLE + storage.name, value)


def known_root(name: str) -> KnownRoot | None:
    """The root of that name, if the server of PREFECT_API_URL knows one."""
    with client_of() as client:
        found = client.read_variable_by_name(_VARIABLE + name)
    return None if found is None else _from_variable(found.value)


def known_roots() -> list[KnownRoot]:
    """All roots that the server of PREFECT_API_URL knows, by name."""
    with client_of() as client:
        response = client.request(
            "POST",
            "/variables/filter",
            json={"variables": {"name": {"like_": _VARIABLE}}, "sort": "NAME_ASC"},
        )
    entries = [entry for entry in response.json() if entry["name"].startswith(_VARIABLE)]
    return [root for entry in entries if (root := _from_variable(entry["value"])) is not None]


def report_page(name: str) -> str:
    """Path of the page that shows a root's report."""
    return f"{PAGES}/{name}/report"


def explorer_page(name: str) -> str:
    """Path of the page that says how a root's tables are looked at."""
    return f"{PAGES}/{name}/explore"


def explore_command(root: str, endpoint_url: str | None = None) -> str:
    """What opens the explorer on a root."""
    endpoint = f" --endpoint-url {shlex.quote(endpoint_url)}" if endpoint_url else ""
    return f"functok explore --root {shlex.quote(root)}{endpoint}"


def browser_address(path: str) -> str | None:
    """The address of one of our pages on the server of PREFECT_API_URL; None where that is not `functok up`."""
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

    server = (PREFECT_API_URL.value() or "").rstrip("/").removesuffix("/api")
    if not server:
        return None
    found = answer(f"{server}{PAGES}/health", seconds=10)
    # Prefect's own server answers any path, with its UI.
    if found is None or found.text != GREETING:
        return None
    return f"{(PREFECT_UI_URL.value() or server).rstrip('/')}{path}"


def absolute(root: str, folder: Path) -> str:
    """A root as runs that start in a folder understand it."""
    return root if "://" in root else os.path.join(folder, root)


def _from_variable(value: Any) -> KnownRoot | None:
    # People can edit variables in the UI.
    if not isinstance(value, dict) or not isinstance(value.get("root"), str) or not value.get("name"):
        return None
    return KnownRoot(name=str(value["name"]), root=value["root"], endpoint_url=value.get("endpoint_url"))
