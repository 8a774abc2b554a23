"""Prefect's UI as `functok up` serves it, in a headless browser: no page calls out, and what people meet is clear."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import asked_in, chromium
from s3 import free_port

from infra.config_file import load_config
from infra.prefect_api import health
from infra.prefect_server import PROJECT, server_environment
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.chromium, pytest.mark.server]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server with two roots whose reports were written and a run that failed.

    Attributes:
        url: Where a browser finds it.
        roots: Two roots whose paths end alike.
        deployment: Id of the deployment `report`.
        runs: Name of each run to the run.
        artifacts: Key of each artifact to the artifact.
        logs: What the failed run logged.
    """

    url: str
    roots: tuple[Storage, Storage]
    deployment: str
    runs: dict[str, dict[str, Any]]
    artifacts: dict[str, dict[str, Any]]
    logs: list[str]


@pytest.fixture(scope="module")
def served(
    finished: Path, prefect_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("ui"), free_port()
    home = folder / "home"
    home.mkdir()
    shutil.copy(prefect_database, home / "prefect.db")
    environment = server_environment("127.0.0.1", port, root=None, config=None, database_url=None)
    environment |= {"PREFECT_HOME": str(home)}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "infra.web_server", "--port", str(port)],
            env=environment,
            cwd=PROJECT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 180
        while not health(environment["PREFECT_API_URL"]):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield _with_runs(f"http://127.0.0.1:{port}", finished, folder)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _with_runs(url: str, finished: Path, folder: Path) -> Served:
    from prefect.client.orchestration import get_client
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    from flows.report import report

    configs = [_at(finished, folder / place / "demo") for place in "ab"]
    for config in configs:
        shutil.copytree(finished / "run", config.storage.root)
    with temporary_settings({PREFECT_API_URL: f"{url}/api", PREFECT_UI_URL: url}):
        for config in configs:
            report(config)
        with pytest.raises(FunctokError, match="tables is not finished"):
            report(_at(finished, folder / "empty"))
        APILogHandler().flush()
        deployment = asyncio.run(_deploy(configs[0]))
        with get_client(sync_client=True) as client:

            def found(what: str, **body: Any) -> list[dict[str, Any]]:
                return list(client._client.post(f"/{what}/filter", json=body).raise_for_status().json())

            runs = {run["name"]: run for run in found("flow_runs")}
            [failed] = [run for run in runs.values() if run["state_type"] == "FAILED"]
            logs = found("logs", logs={"flow_run_id": {"any_": [failed["id"]]}})
            artifacts = {entry["key"]: entry for entry in found("artifacts/latest")}
    first, second = (Storage(config.storage.root) for config in configs)
    return Served(
        url=url,
        roots=(first, second),
        deployment=deployment,
        runs=runs,
        artifacts=artifacts,
        logs=[entry["message"] for entry in logs],
    )


def _at(finished: Path, root: Path) -> Config:
    return load_config(finished / "tiny.toml", root=str(root))


async def _deploy(config: Config) -> str:
    """A deployment with its form and a work pool, as `functok up` makes them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.utilities.callables import parameter_schema
    from prefect.workers.process import ProcessWorker

    from flows.report import report

    template = ProcessWorker.get_default_base_job_template()
    async with get_client() as client:
        await client.create_work_pool(
            WorkPoolCreate(name="functok-cpu", type=ProcessWorker.type, base_job_template=template)
        )
        made = await client.create_deployment(
            flow_id=await client.create_flow(report),
            name="report",
            work_pool_name="functok-cpu",
            entrypoint="flows.report.report",
            parameters={"config": config.model_dump(mode="json", exclude_unset=True)},
            parameter_openapi_schema=parameter_schema(report).model_dump_for_openapi(),
        )
    return str(made)


def test_every_key_and_run_name_has_the_root_and_no_path(served: Served) -> None:
    first, second = served.roots
    assert first.name != second.name
    for root in served.roots:
        report = served.artifacts[f"report-{root.name}"]
        assert report["data"].count(f"{served.url}/functok/{root.name}/report")
        assert root.root in report["description"]
        assert served.runs[f"report on model in {root.name}"]["state_type"] == "COMPLETED"
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in served.artifacts)


def test_a_failed_run_says_what_is_wrong_without_a_traceback(served: Served) -> None:
    [failed] = [run for run in served.runs.values() if run["state_type"] == "FAILED"]
    assert "run it first" in failed["state"]["message"]
    told = [message for message in served.logs if "the stage tables is not finished" in message]
    assert any("\nWay out: run it first: functok run CONFIG --only tables" in message for message in told)
    assert not [message for message in served.logs if "Traceback" in message or 'File "' in message]


def walked(served: Served) -> dict[str, str]:
    """The pages of the UI, by what they show."""
    runs = {run["state_type"]: run["id"] for run in served.runs.values()}
    deployment = f"/deployments/deployment/{served.deployment}"
    report = f"report-{served.roots[0].name}"
    return {
        "dashboard": "/dashboard",
        "runs": "/runs",
        "a run": f"/runs/flow-run/{runs['COMPLETED']}",
        "a failed run": f"/runs/flow-run/{runs['FAILED']}",
        "flows": "/flows",
        "deployments": "/deployments",
        "a deployment": deployment,
        "a deployment's form": f"{deployment}/run",
        "a deployment's settings": f"{deployment}/edit",
        "work pools": "/work-pools",
        "a new work pool": "/work-pools/create",
        "a work pool": "/work-pools/work-pool/functok-cpu",
        "blocks": "/blocks/catalog",
        "a new block": "/blocks/catalog/secret/create",
        "variables": "/variables",
        "automations": "/automations/create",
        "events": "/events",
        "concurrency limits": "/concurrency-limits",
        "artifacts": "/artifacts",
        "an artifact's key": f"/artifacts/key/{report}",
        "an artifact": f"/artifacts/artifact/{served.artifacts[report]['id']}",
        "settings": "/settings",
        "the other interface": "/v2/dashboard",
        "the API's documentation": "/docs",
        "reports": "/functok",
        "no such report": "/functok/none/report",
        "how to explore": f"/functok/{served.roots[0].name}/explore",
    }


def test_no_page_calls_out_and_the_report_is_reached_by_its_link(served: Served, tmp_path: Path) -> None:
    net_log = tmp_path / "net-log.json"
    asked: dict[str, list[str]] = {}
    with chromium(f"--log-net-log={net_log}") as browser:
        page, errors = watched(browser, asked)
        for name, path in walked(served).items():
            asked[name] = []
            visit(page, served.url + path)
            assert page.get_by_text("Switch to V2").count() == 0, f"{name}: the switch to the other interface"
            for text in SHOWN.get(name, ()):
                page.get_by_text(text).first.wait_for()
        assert not errors, "\n".join(errors)

        visit(page, served.url + walked(served)["an artifact's key"])
        asked["the report"] = []
        with page.expect_popup() as opened:
            page.get_by_role("link", name=f"Report of {served.roots[0].name}").first.click()
        report = opened.value
        report.wait_for_load_state()
        assert report.url == f"{served.url}/functok/{served.roots[0].name}/report"
        assert report.title() == "functok report"
        assert report.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert len(asked) == len(walked(served)) + 1
    outside = {
        name: sorted({url for url in urls if not is_here(url, served.url)}) for name, urls in asked.items()
    }
    assert not {name: urls for name, urls in outside.items() if urls}
    assert all(asked.values()), "every page asked this server for something"
    assert asked_in(net_log) <= {served.url.removeprefix("http://")}


SHOWN = {
    "how to explore": ["functok explore --root"],
    "a failed run": ["the stage tables is not finished", "Way out: run it first"],
    "a deployment's form": ["corpus"],
    "no such report": ["No run of this server has written a report under the name none."],
}
"""Texts that a page must show."""


def watched(browser: Browser, asked: dict[str, list[str]]) -> tuple[Page, list[str]]:
    """A page whose requests, blocked ones and websockets too, are noted under the last name in `asked`."""
    context = browser.new_context(viewport={"width": 1400, "height": 950})
    errors: list[str] = []

    def note(url: str) -> None:
        asked[list(asked)[-1]].append(url)

    context.on("request", lambda request: note(request.url))
    page = context.new_page()
    page.on("websocket", lambda socket: note(socket.url))
    page.on("pageerror", lambda error: errors.append(f"{page.url}: {error}"))
    page.on(
        "console",
        lambda line: (
            errors.append(f"{page.url}: {line.text}") if "Content Security Policy" in line.text else None
        ),
    )
    return page, errors


def visit(page: Page, url: str) -> None:
    """Open a page and wait until it asks for nothing more."""
    page.goto(url)
    page.wait_for_load_state("networkidle")


def is_here(url: str, server: str) -> bool:
    """Whether a request stays on the server, or within the page."""
    return url.startswith((f"{server}/", server.replace("http", "ws", 1), "data:", "blob:"))
