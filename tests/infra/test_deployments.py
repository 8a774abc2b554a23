"""What a start of `functok up` changes of deployments that are there, and which runs and schedules it looks after."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from infra.deployments import (
    Settled,
    Wanted,
    fill,
    fingerprints,
    settle_values,
    told_before,
    values_of,
    with_every_stage,
)
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

PROJECT = Path(__file__).resolve().parents[2]


def tokenizing(**config: Any) -> Wanted:
    sections = {"corpus": {"urls": ["a.jsonl"]}, "model": {"name": "m"}, "storage": {"root": "one"}}
    return Wanted(
        name="tokenize",
        entrypoint="flows.tokenize.tokenize",
        description="Count.",
        parameters={"config": sections | config},
        schedules={},
    )


@pytest.fixture
def deploy(prefect_api: str) -> Callable[[Wanted], Callable[[Sequence[str]], None]]:
    """Stands in for `prefect deploy`, which costs a process."""

    def of(wanted: Wanted) -> Callable[[Sequence[str]], None]:
        def make(names: Sequence[str]) -> None:
            with httpx.Client(base_url=prefect_api) as api:
                for name in names:
                    flow = api.post("/flows/", json={"name": name}).raise_for_status().json()
                    body = {"name": name, "flow_id": flow["id"], "parameters": wanted.parameters}
                    api.post(
                        "/deployments/", json=body | {"description": wanted.description}
                    ).raise_for_status()

        return make

    return of


def found_by(prefect_api: str, name: str) -> dict[str, Any]:
    return dict(httpx.get(f"{prefect_api}/deployments/name/{name}/{name}").raise_for_status().json())


def test_values_that_nobody_touched_follow_and_those_of_people_stay() -> None:
    first = values_of(tokenizing())
    filled = fingerprints(first)
    people = values_of(tokenizing(function_tokens={"share": 0.3}, model={"name": "other"}))
    del people["parameters"]["config"]["corpus"]
    told = values_of(tokenizing(storage={"root": "two"}, model={"name": "new"}, dask={"workers": 2}))

    assert settle_values(people, told, filled) == Settled(
        {
            "parameters": {
                "config": {
                    "dask": {"workers": 2},
                    "function_tokens": {"share": 0.3},
                    "model": {"name": "other"},
                    "storage": {"root": "two"},
                }
            },
            "description": {"tokenize": "Count."},
        },
        [
            "kept config.corpus.urls unset, as it was set in the UI, where ['a.jsonl'] was told",
            "set config.dask.workers to 2",
            "kept config.model.name at 'other', which people set, where 'new' was told",
            "set config.storage.root to 'two' where it was 'one'",
        ],
    )
    assert settle_values(first, values_of(tokenizing(storage={})), filled).said == [
        "set config.storage to {}",
        "unset config.storage.root, which was 'one'",
    ]
    assert settle_values(first, first, set()).said == []


def test_no_secret_of_the_ui_is_told() -> None:
    people = values_of(tokenizing(corpus={"urls": ["https://u:hunter2@host/a.jsonl?token=hunter3"]}))
    [line] = settle_values(people, values_of(tokenizing()), set()).said
    assert "host/a.jsonl" in line
    assert "hunter" not in line


def patch(address: str, body: dict[str, Any]) -> None:
    """Change what is at an address of the server, once its SQLite is not locked: until then it answers 503."""
    deadline = time.monotonic() + 120
    while (answer := httpx.patch(address, json=body, timeout=60)).status_code == 503:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)
    answer.raise_for_status()


def test_parameters_that_no_longer_fit_are_told_and_can_be_mended(
    prefect_api: str, deploy: Callable[[Wanted], Callable[[Sequence[str]], None]]
) -> None:
    told = {"FUNCTOK_ROOT": "one"}
    fill(prefect_api, [tokenizing()], PROJECT, deploy(tokenizing()), told)
    assert told_before(prefect_api) == told
    deployment = found_by(prefect_api, "tokenize")
    address = f"{prefect_api}/deployments/{deployment['id']}"
    # as a form of an older version would have taken it
    old = tokenizing(function_tokens={"share": 4})
    patch(
        address,
        {"parameters": old.parameters, "enforce_parameter_schema": False, "entrypoint": "old.flow"},
    )

    [line] = fill(prefect_api, [tokenizing()], PROJECT, deploy(tokenizing()), told)

    assert "the parameters of tokenize do not fit" in line
    assert "share" in line
    assert f"/deployments/deployment/{deployment['id']}/edit" in line
    refreshed = found_by(prefect_api, "tokenize")
    assert refreshed["entrypoint"] == "flows.tokenize.tokenize"
    assert refreshed["parameters"] == old.parameters
    assert refreshed["parameter_openapi_schema"]["definitions"]["Config"]

    mended = tokenizing(function_tokens={"share": 0.4})
    patch(address, {"parameters": mended.parameters})
    assert fill(prefect_api, [tokenizing()], PROJECT, deploy(tokenizing()), told) == []
    assert found_by(prefect_api, "tokenize")["enforce_parameter_schema"] is True

    before = found_by(prefect_api, "tokenize")["updated"]
    assert fill(prefect_api, [tokenizing()], PROJECT, deploy(tokenizing()), told) == []
    assert found_by(prefect_api, "tokenize")["updated"] == before, "an update would delete the planned runs"


def test_what_the_last_start_was_told_holds_until_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from infra.prefect_server import _take_up_what_was_told

    config = tmp_path / "mine.toml"
    config.write_text("")
    before = {"FUNCTOK_CONFIG": str(config), "FUNCTOK_ROOT": "s3://u:hunter2@bucket/one"}
    monkeypatch.setattr("infra.deployments.told_before", lambda _url: before)
    said: list[str] = []
    environment = {"PREFECT_API_URL": "http://here/api"}
    assert _take_up_what_was_told(environment, said.append) == before
    assert environment["FUNCTOK_ROOT"] == before["FUNCTOK_ROOT"]
    assert said == [
        f"goes on with --config {config}, as it was started with last",
        "goes on with --root s3://bucket/one, as it was started with last",
    ]
    now = {"PREFECT_API_URL": "http://here/api", "FUNCTOK_ROOT": "two"}
    assert _take_up_what_was_told(now, said.append) == before | {"FUNCTOK_ROOT": "two"}
    config.unlink()
    with pytest.raises(ConfigError, match=r"mine\.toml.*is not here.*--config FILE"):
        _take_up_what_was_told({"PREFECT_API_URL": "http://here/api"}, said.append)


def test_a_schedule_of_which_no_run_is_planned_is_told(prefect_api: str) -> None:
    """The temporary server of a run has no scheduler, as one has none whose loop died."""
    from infra.prefect_api import silent_schedules

    with httpx.Client(base_url=prefect_api) as api:
        flow = api.post("/flows/", json={"name": "silent"}).raise_for_status().json()
        nightly = {"slug": "nightly", "schedule": {"cron": "0 3 * * *", "timezone": "UTC"}}
        ended = {"slug": "ended", "schedule": {"rrule": "DTSTART:20200101T000000\nFREQ=DAILY;COUNT=2"}}
        off = nightly | {"slug": "off", "active": False}
        for name, paused in (("silent", False), ("resting", True)):
            body = {"name": name, "flow_id": flow["id"], "paused": paused, "schedules": [nightly, ended, off]}
            api.post("/deployments/", json=body).raise_for_status()
    since = datetime.now(UTC)
    assert silent_schedules(prefect_api, since) == []
    assert silent_schedules(prefect_api, since, timedelta()) == [
        "the schedule nightly of silent is active, and Prefect's scheduler has planned no run of it"
    ]


def test_only_what_this_machines_workers_had_taken_is_crashed(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling, Pending, Running, State

    from infra.prefect_api import WORKER, crash_dead_runs, worker_name

    @flow
    def taken() -> None: ...

    gone = subprocess.Popen(["true"])
    gone.wait()
    ours, theirs = worker_name("functok-cpu", 4200), "functok-cpu of elsewhere:4200"

    def run_of(client: SyncPrefectClient, worker: str, state: State[Any], pid: int | None) -> UUID:
        run = client.create_flow_run(taken, state=state)
        client.update_flow_run_labels(run.id, {WORKER: worker})
        if pid is not None:
            client.update_flow_run(run.id, infrastructure_pid=str(pid))
        return run.id

    with get_client(sync_client=True) as client:
        begun = run_of(client, ours, Running(), gone.pid)
        cancelling = run_of(client, ours, Cancelling(), gone.pid)
        fresh = run_of(client, ours, Pending(name="Submitting"), None)
        other = [run_of(client, theirs, state, gone.pid) for state in (Pending(), Running())]

        def crashed() -> list[bool]:
            runs = [begun, cancelling, fresh, *other]
            return [client.read_flow_run(run).state_name == "Crashed" for run in runs]

        crash_dead_runs(prefect_api, "gone", taken_by=[ours])
        assert crashed() == [True, True, False, False, False], (
            "the worker lives and may begin the fresh one yet"
        )
        monkeypatch.setattr("infra.prefect_api.PENDING_SECONDS", 0)
        crash_dead_runs(prefect_api, "gone", taken_by=[worker_name("functok-gpu", 4200)])
        assert crashed() == [True, True, False, False, False]
        crash_dead_runs(prefect_api, "stopped", gone_workers=[ours])
        assert crashed() == [True, True, True, False, False]
    assert socket.gethostname() in ours


def test_a_stage_without_an_entry_is_deployed_as_features_is() -> None:
    content = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    completed = with_every_stage(content, ("tokenize", "first_letters"))
    (added,) = [entry for entry in completed["deployments"] if entry not in content["deployments"]]
    (features,) = [entry for entry in content["deployments"] if entry["name"] == "features"]
    assert added["name"] == "first_letters"
    assert added["entrypoint"] == "flows.first_letters.first_letters"
    for same in ("parameters", "work_pool", "concurrency_limit", "tags"):
        assert added[same] == features[same]
    assert "schedules" not in added
