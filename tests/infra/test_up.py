"""`functok up` for real: a server, its deployments, a run through a worker, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import hostile
import httpx
import psutil
import pytest
from s3 import free_port
from tiny import save_tokenizer, texts, write_jsonl

from infra.children import Children, require_free_port
from infra.prefect_server import PROJECT, server_environment, up
from schemas.errors import ConfigError, FunctokError
from schemas.work import STAGES

FLOWS = {"reproduce", "verify", *STAGES}


def eventually(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{seconds} s passed without {what}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> dict[str, str]:
    """A Prefect home of its own, and a configuration that needs a tokenizer only."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "home").mkdir()
    shutil.copy(prefect_database, folder / "home")
    save_tokenizer(folder / "model")
    write_jsonl(folder / "corpus.jsonl", texts(20))
    (folder / "tiny.toml").write_text(
        f'[corpus]\nurls = ["{folder}/corpus.jsonl"]\n[model]\nname = "{folder}/model"\n'
        "[dask]\nworkers = 1\n[storage]\nroot = 'not/this/one'\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return inherited | {
        "PREFECT_HOME": str(folder / "home"),
        "FUNCTOK_CONFIG": str(folder / "tiny.toml"),
        "FUNCTOK_TEST_ROOT": str(folder / "root"),
    }


@contextmanager
def brought_up(environment: dict[str, str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "functok", "up", "--port", str(port)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--root", environment["FUNCTOK_TEST_ROOT"]],
            env=environment,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            psutil.wait_procs(family, timeout=30)
            for left in (*filter(psutil.Process.is_running, family), process):
                left.kill()
            process.wait()


@dataclass(frozen=True)
class Up:
    """A running `functok up`, what it has printed, and its API."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    api: httpx.Client

    @property
    def told(self) -> str:
        return self.log.read_text()

    @property
    def worker(self) -> str:
        return f"functok-cpu of {socket.gethostname()}:{self.port}"


@contextmanager
def served(environment: dict[str, str], port: int, log: Path) -> Iterator[Up]:
    with (
        brought_up(environment, port, log) as process,
        # The server waits 60 s for a lock of SQLite before it says 503.
        httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=180) as api,
    ):
        up = Up(process, port, log, api)
        eventually(lambda: "functok is up" in up.told or process.poll() is not None, 300, "`functok up`")
        assert process.poll() is None, up.told
        yield up


@pytest.fixture(scope="module")
def first(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The `functok up` of the tests that follow, begun where folders are called as ours are; the last kills it."""
    project = hostile.lay_out(tmp_path_factory.mktemp("first"))
    with served(environment, free_port(), project / "up.log") as up:
        yield up


@pytest.mark.server
def test_up_serves_deployments_and_runs_them(environment: dict[str, str], first: Up) -> None:
    assert f"http://127.0.0.1:{first.port}" in first.told
    deployments = deployments_of(first.api)
    assert deployments.keys() == FLOWS
    root = environment["FUNCTOK_TEST_ROOT"]
    assert root in httpx.get(f"http://127.0.0.1:{first.port}/functok", timeout=60).text
    for deployment in deployments.values():
        assert deployment["parameters"]["config"]["storage"]["root"] == root
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert not any(schedule["active"] for schedule in deployment["schedules"])
        assert "corpus" in deployment["parameter_openapi_schema"]["definitions"]["Config"]["properties"]
    [automation] = post(first.api, "/automations/filter", {})
    assert automation["trigger"]["posture"] == "Proactive"
    assert automation["trigger"]["within"] == 90

    create = f"/deployments/{deployments['tokenize']['id']}/create_flow_run"
    wrong = deployments["tokenize"]["parameters"]["config"] | {"function_tokens": {"share": 4}}
    refused = answer(first.api, "POST", create, {"parameters": {"config": wrong}})
    assert refused.status_code == 409
    assert "share" in refused.text

    run = post(first.api, create, {})

    def ended() -> dict[str, Any] | None:
        state = call(first.api, "GET", f"/flow_runs/{run['id']}").json()
        return state if state["state_type"] in {"COMPLETED", "FAILED", "CRASHED"} else None

    state = eventually(ended, 300, "the run's end")
    logs = post(first.api, "/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert state["state_type"] == "COMPLETED", [entry["message"] for entry in logs]
    assert list(Path(root, "tokens").rglob("manifest.json"))
    [named] = [line for line in first.told.splitlines() if line.startswith("what the server")]
    logs_folder = Path(named.split(" is in ")[1])
    assert "tokenize" in (logs_folder / "worker-of-functok-cpu.log").read_text()

    second = subprocess.run(
        [sys.executable, "-m", "functok", "up", "--port", str(first.port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert second.returncode == 1
    assert "already running" in second.stderr
    assert "Traceback" not in second.stderr


def deployments_of(api: httpx.Client) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in post(api, "/deployments/filter", {})}


def runs_of(api: httpx.Client, schedule: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that Prefect's scheduler has planned for a schedule, by itself."""
    wanted = {"deployments": {"id": {"any_": [schedule["deployment_id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    runs = post(api, "/flow_runs/filter", wanted)
    return [run for run in runs if run["auto_scheduled"] and run["created_by"]["id"] == schedule["id"]]


def schedule(api: httpx.Client, deployment: dict[str, Any], when: dict[str, Any]) -> dict[str, Any]:
    """Make an active schedule, as the UI does it."""
    [made] = post(api, f"/deployments/{deployment['id']}/schedules", [{"active": True, "schedule": when}])
    return dict(made)


def taken(api: httpx.Client, deployment: dict[str, Any], worker: str) -> dict[str, Any]:
    """A run that a worker has taken, with its deployment's one place, and that never begins."""
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
    run = post(api, f"/deployments/{deployment['id']}/create_flow_run", {"state": later})
    for name in ("Pending", "Submitting"):
        state = {"state": {"type": "PENDING", "name": name}}
        assert post(api, f"/flow_runs/{run['id']}/set_state", state)["status"] == "ACCEPT"
    call(api, "PATCH", f"/flow_runs/{run['id']}/labels", {"prefect.worker.name": worker})
    return dict(run)


def places(home: str) -> dict[str, int]:
    """Deployment to how many of its runs hold a place."""
    with closing(sqlite3.connect(Path(home) / "prefect.db", timeout=60)) as connection:
        found = connection.execute(
            "SELECT deployment.name, active_slots FROM deployment "
            "JOIN concurrency_limit_v2 AS l ON l.id = concurrency_limit_id"
        )
        return dict(found.fetchall())


def change_database(home: str, sql: str) -> None:
    with closing(sqlite3.connect(Path(home) / "prefect.db", timeout=60)) as connection:
        connection.execute(sql)
        connection.commit()


@pytest.mark.server
def test_schedules_fire_and_dead_runs_are_seen_while_the_server_runs(first: Up) -> None:
    """Of flows that end at once: their tables are missing."""
    api, found = first.api, deployments_of(first.api)
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = post(api, "/flow_runs/", {"flow_id": found["growth"]["flow_id"], "state": {"type": "RUNNING"}})
    label = {"functok.process": f"{socket.gethostname()}:{gone.pid}"}
    call(api, "PATCH", f"/flow_runs/{dead['id']}/labels", label)

    minutes = schedule(api, found["tables"], {"cron": "* * * * *", "timezone": "UTC", "day_or": True})
    seconds = schedule(api, found["report"], {"interval": 5, "anchor_date": "2026-01-01T00:00:00Z"})
    planned = eventually(lambda: runs_of(api, minutes), 60, "runs that the cron has planned")
    times = [datetime.fromisoformat(run["expected_start_time"]) for run in planned[:3]]
    assert [time.second for time in times] == [0, 0, 0]
    assert {after - before for before, after in pairwise(times)} == {timedelta(minutes=1)}
    eventually(lambda: any(run["start_time"] for run in runs_of(api, seconds)), 300, "a run of the interval")
    call(api, "DELETE", f"/deployments/{found['report']['id']}/schedules/{seconds['id']}")
    eventually(
        lambda: any(run["state_type"] != "SCHEDULED" for run in runs_of(api, minutes)),
        180,
        "a run of the cron",
    )
    call(api, "DELETE", f"/deployments/{found['tables']['id']}/schedules/{minutes['id']}")
    eventually(
        lambda: call(api, "GET", f"/flow_runs/{dead['id']}").json()["state_name"] == "Crashed",
        60,
        "a dead run's state while the server runs",
    )
    assert f"marked as crashed: {dead['name']}" in first.told


@pytest.mark.server
def test_what_people_set_outlives_kill_9_and_a_stop_leaves_nothing(
    environment: dict[str, str], first: Up, tmp_path: Path
) -> None:
    api, found, home = first.api, deployments_of(first.api), environment["PREFECT_HOME"]
    tokenize, reproduce = found["tokenize"], found["reproduce"]
    often = schedule(api, tokenize, {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z"})
    call(api, "PATCH", f"/deployments/{tokenize['id']}/schedules/{often['id']}", {"active": False})
    [nightly] = reproduce["schedules"]
    call(api, "PATCH", f"/deployments/{reproduce['id']}/schedules/{nightly['id']}", {"active": True})
    [hourly] = tokenize["schedules"]
    call(api, "DELETE", f"/deployments/{tokenize['id']}/schedules/{hourly['id']}")
    changed = tokenize["parameters"]["config"] | {"function_tokens": {"share": 0.3}}
    own = {
        "parameters": {"config": changed},
        "description": "ours",
        "tags": ["mine"],
        "paused": True,
        "concurrency_limit": 3,
    }
    call(api, "PATCH", f"/deployments/{tokenize['id']}", own)
    moved = {"entrypoint": "flows.old.losses", "pull_steps": []}
    call(api, "PATCH", f"/deployments/{found['losses']['id']}", moved)
    call(api, "DELETE", f"/deployments/{found['growth']['id']}")
    lost = taken(api, found["losses"], first.worker)
    assert places(home)["losses"] == 1
    first.process.kill()
    first.process.wait()

    elsewhere = environment | {"FUNCTOK_TEST_ROOT": f"{environment['FUNCTOK_TEST_ROOT']}2"}
    with served(elsewhere, first.port, tmp_path / "up.log") as again:
        root, found = elsewhere["FUNCTOK_TEST_ROOT"], deployments_of(again.api)
        assert f"set config.storage.root to '{root}'" in again.told
        assert "deployed growth" in again.told
        assert found.keys() == FLOWS
        assert {entry["parameters"]["config"]["storage"]["root"] for entry in found.values()} == {root}
        tokenize = found["tokenize"]
        assert tokenize["parameters"]["config"] == changed | {"storage": {"root": root}}
        assert tokenize["description"] == "ours"
        assert tokenize["tags"] == ["mine"]
        assert tokenize["paused"] is True
        assert tokenize["global_concurrency_limit"]["limit"] == 3
        assert [(entry["id"], entry["active"]) for entry in tokenize["schedules"]] == [(often["id"], False)]
        assert [entry["active"] for entry in found["reproduce"]["schedules"]] == [True]
        assert found["losses"]["entrypoint"] == "flows.losses.losses"
        [step] = found["losses"]["pull_steps"]
        assert step["prefect.deployments.steps.set_working_directory"]["directory"] == str(PROJECT)
        assert call(again.api, "GET", f"/flow_runs/{lost['id']}").json()["state_name"] == "Crashed"
        assert places(home)["losses"] == 0

        pending = taken(again.api, found["features"], again.worker)
        assert places(home)["features"] == 1
        # A loop of the server that dies in earnest, and is told.
        change_database(home, "ALTER TABLE deployment_schedule RENAME TO away")
        eventually(lambda: "no such table: deployment_schedule" in again.told, 60, "the scheduler's error")
        [line, *_] = [line for line in again.told.splitlines() if "no such table" in line]
        assert line.startswith("the server reports: ")
        change_database(home, "ALTER TABLE away RENAME TO deployment_schedule")

        family = psutil.Process(again.process.pid).children(recursive=True)
        assert len(family) >= 3
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(60) == 0, again.told
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert "stopped" in again.told
    with closing(sqlite3.connect(Path(home) / "prefect.db")) as connection:
        [state] = connection.execute(
            "SELECT state_name FROM flow_run WHERE id = ?", [pending["id"]]
        ).fetchall()
    assert state == ("Crashed",)
    assert places(home)["features"] == 0


@pytest.mark.slow
def test_a_version_with_which_no_schedule_fires_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"sqlalchemy": "2.1.0", "prefect": "3.8.8"}
    monkeypatch.setattr("infra.prefect_server.version", versions.__getitem__)
    with pytest.raises(
        ConfigError, match=r"SQLAlchemy 2\.1\.0 .*never starts a scheduled run.*sqlalchemy<2\.1"
    ):
        up(port=free_port())


@pytest.mark.slow
def test_a_scheduler_that_is_switched_off_is_refused() -> None:
    from prefect.settings import PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED, temporary_settings

    with (
        temporary_settings({PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED: False}),
        pytest.raises(
            ConfigError, match=r"switch its scheduler off.*PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"
        ),
    ):
        up(port=free_port())


@pytest.mark.process
def test_errors_of_children_are_told_once_and_kept(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PREFECT_HOME": str(tmp_path)}
    trouble = (
        "10:11:12.123 | INFO    | prefect.server.services.scheduler - Scheduled 0 runs.",
        "10:11:12.124 | ERROR   | prefect.server.services.scheduler - Unexpected error in loop 17",
        "10:11:17.130 | ERROR   | prefect.server.services.scheduler - Unexpected error in loop 18",
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in <module>',
        "sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement",
    )
    (tmp_path / "ails.py").write_text(
        f"import time\nprint('\\n'.join({trouble!r}), flush=True)\ntime.sleep(60)\n"
    )
    told: list[str] = []
    with Children(name="test", environment=environment, directory=tmp_path) as children:
        children.start("server", "ails")

        def stop() -> None:
            if len(told) >= 2:
                os.kill(os.getpid(), signal.SIGTERM)

        children.wait(told.append, every=stop, seconds=0.2)
    where = f"(all of it: {tmp_path}/functok-test-logs/server.log)"
    assert told == [
        f"the server reports: prefect.server.services.scheduler - Unexpected error in loop 17 {where}",
        f"the server reports: sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement {where}",
    ]
    assert (tmp_path / "functok-test-logs" / "server.log").read_text().splitlines() == list(trouble)


def answer(api: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
    """What the server answers once its SQLite is not locked: then it says 503, or at some places 500."""
    return eventually(
        lambda: (answered := api.request(method, path, json=body)).status_code not in {500, 503} and answered,
        300,
        f"an answer to {path} other than 500 and 503",
    )


def call(api: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
    return answer(api, method, path, body).raise_for_status()


def post(api: httpx.Client, path: str, body: Any) -> Any:
    return call(api, "POST", path, body).json()


@pytest.mark.server
def test_a_run_without_a_server_says_one_clear_line(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "functok", "run", environment["FUNCTOK_CONFIG"], "--only", "report"]
    ran = subprocess.run(
        [*command, "--root", str(tmp_path / "empty")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    which, *lines = ran.stderr.strip().splitlines()
    assert which.startswith("Prefect: a temporary server for this run alone")
    assert "tables" in lines[0]
    assert "--only tables" in lines[1]
    assert len(lines) == 2, ran.stderr


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}.*--port {port + 1}"):
            require_free_port("127.0.0.1", port)


def test_a_configuration_that_cannot_be_read_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "my.toml").write_text("[corpus]\nurl = 3\n")
    for name, message in (("nope.toml", "cannot read the configuration"), ("my.toml", "did you mean urls")):
        with pytest.raises(ConfigError, match=message):
            up(config=str(tmp_path / name), port=free_port(), say=said.append)
    assert not said


@pytest.mark.process
def test_a_child_that_dies_ends_the_rest_and_is_quoted(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PREFECT_HOME": str(tmp_path)}
    (tmp_path / "dies.py").write_text("print('the disk is on fire'); raise SystemExit(3)")
    seen: list[psutil.Process] = []

    def live_and_die() -> None:
        with Children(name="test", environment=environment, directory=tmp_path) as children:
            children.start("server", "http.server", "0", "--bind", "127.0.0.1")
            seen.extend(web_servers(psutil.Process()))
            children.start("broken", "dies")
            children.wait()

    with pytest.raises(FunctokError, match=r"broken.*status 3:\n.*the disk is on fire"):
        live_and_die()
    [server] = seen
    assert not server.is_running()
    assert not list(tmp_path.glob("functok-*.json"))


def web_servers(parent: psutil.Process) -> list[psutil.Process]:
    def found() -> list[psutil.Process]:
        # A process that has just begun has no command line for a moment.
        return [child for child in parent.children() if "http.server" in child.cmdline()]

    return list(eventually(found, 10, "a web server"))


@pytest.mark.process
def test_what_a_killed_parent_left_is_stopped_by_the_next(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PREFECT_HOME": str(tmp_path)}
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom infra.children import Children\n"
        "with Children(name='test', environment=dict(os.environ), directory=Path(sys.argv[1])) as children:\n"
        "    children.start('server', 'http.server', '0', '--bind', '127.0.0.1')\n"
        "    print('started', flush=True)\n    children.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, cwd=PROJECT, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    [server] = web_servers(psutil.Process(parent.pid))
    with (
        pytest.raises(ConfigError, match="already running"),
        Children(name="test", environment=environment, directory=tmp_path),
    ):
        pass
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert server.is_running()
    with Children(name="test", environment=environment, directory=tmp_path):
        assert not server.is_running()


def test_a_database_url_that_prefect_cannot_use_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigError, match="cannot use the database") as caught:
        server_environment("127.0.0.1", 4200, root=None, config=None, database_url="mysql://u:hunter2@db/x")
    assert "hunter2" not in str(caught.value)


def test_the_environment_is_private_and_beats_for_the_watch(tmp_path: Path) -> None:
    environment = server_environment("127.0.0.1", 4321, root="s3://b/p", config=None, database_url=None)
    assert environment["DO_NOT_TRACK"] == "1"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert environment["FUNCTOK_ROOT"] == "s3://b/p"
