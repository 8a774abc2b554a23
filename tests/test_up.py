"""`functok up` for real: a server, its deployments, a run through a worker, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from s3 import free_port
from tiny import save_tokenizer, texts, write_jsonl

from infra.children import Children, require_free_port
from infra.errors import ConfigError, FunctokError
from infra.prefect_server import PROJECT, server_environment, up
from schemas.work import STAGES

FLOWS = {"reproduce", *STAGES}


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
    save_tokenizer(folder / "model")
    write_jsonl(folder / "corpus.jsonl", texts(20))
    (folder / "tiny.toml").write_text(
        f'[corpus]\nurls = ["{folder}/corpus.jsonl"]\n[model]\nname = "{folder}/model"\n'
        "[dask]\nworkers = 1\n[storage]\nroot = 'not/this/one'\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return inherited | {
        "PREFECT_HOME": str(prefect_database.parent),
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


@pytest.mark.server
def test_up_serves_deployments_runs_them_and_leaves_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "up.log"
    with brought_up(environment, port, log) as process:
        eventually(
            lambda: "functok is up" in log.read_text() or process.poll() is not None, 300, "`functok up`"
        )
        assert process.poll() is None, log.read_text()
        assert f"http://127.0.0.1:{port}" in log.read_text()

        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60) as api:
            deployments = {entry["name"]: entry for entry in post(api, "/deployments/filter", {})}
            assert deployments.keys() == FLOWS
            root = environment["FUNCTOK_TEST_ROOT"]
            for deployment in deployments.values():
                assert deployment["parameters"]["config"]["storage"]["root"] == root
                assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
                assert not any(schedule["active"] for schedule in deployment["schedules"])
                assert (
                    "corpus" in deployment["parameter_openapi_schema"]["definitions"]["Config"]["properties"]
                )
            [automation] = post(api, "/automations/filter", {})
            assert automation["trigger"]["posture"] == "Proactive"
            assert automation["trigger"]["within"] == 90

            create = f"/deployments/{deployments['tokenize']['id']}/create_flow_run"
            wrong = deployments["tokenize"]["parameters"]["config"] | {"function_tokens": {"share": 4}}
            refused = answer(api, create, {"parameters": {"config": wrong}})
            assert refused.status_code == 409
            assert "share" in refused.text

            run = post(api, create, {})
            ended = eventually(
                lambda: (
                    # 503, while SQLite is locked, has no state
                    (state := api.get(f"/flow_runs/{run['id']}").json()).get("state_type")
                    in {"COMPLETED", "FAILED", "CRASHED"}
                    and state
                ),
                300,
                "the run's end",
            )
            logs = post(api, "/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
            assert ended["state_type"] == "COMPLETED", [entry["message"] for entry in logs]
        assert list(Path(root, "tokens").rglob("manifest.json"))
        [named] = [line for line in log.read_text().splitlines() if line.startswith("what the server")]
        logs_folder = Path(named.split(" is in ")[1])
        assert "tokenize" in (logs_folder / "worker-of-functok-cpu.log").read_text()

        second = subprocess.run(
            [sys.executable, "-m", "functok", "up", "--port", str(port)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert second.returncode == 1
        assert "already running" in second.stderr
        assert "Traceback" not in second.stderr

        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert "stopped" in log.read_text()


def deployments_of(api: httpx.Client) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in post(api, "/deployments/filter", {})}


def runs_of(api: httpx.Client, deployment: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = {"deployments": {"id": {"any_": [deployment["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return list(post(api, "/flow_runs/filter", wanted))


def by_itself(api: httpx.Client, deployment: dict[str, Any], schedule: str) -> dict[str, Any] | None:
    """A run that a schedule has started."""
    for run in runs_of(api, deployment):
        if run["auto_scheduled"] and run["start_time"] and run["created_by"]["id"] == schedule:
            return run
    return None


@pytest.mark.server
def test_schedules_fire_and_what_people_set_outlives_kill_9_and_dead_runs_are_seen(
    environment: dict[str, str], tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "up.log"
    gone = subprocess.Popen(["true"])
    gone.wait()

    def is_up(process: subprocess.Popen[bytes]) -> None:
        eventually(lambda: "functok is up" in log.read_text() or process.poll() is not None, 300, "`up`")
        assert process.poll() is None, log.read_text()

    api = httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60)
    with brought_up(environment, port, log) as process:
        is_up(process)
        found = deployments_of(api)
        tokenize, report = found["tokenize"], found["report"]
        # As the UI makes them.
        [each_minute] = post(
            api,
            f"/deployments/{report['id']}/schedules",
            [{"active": True, "schedule": {"cron": "* * * * *", "timezone": "UTC", "day_or": True}}],
        )
        [often] = post(
            api,
            f"/deployments/{tokenize['id']}/schedules",
            [{"active": True, "schedule": {"interval": 5, "anchor_date": "2026-01-01T00:00:00Z"}}],
        )
        dead = post(api, "/flow_runs/", {"flow_id": tokenize["flow_id"], "state": {"type": "RUNNING"}})
        label = {"functok.process": f"{socket.gethostname()}:{gone.pid}"}
        api.patch(f"/flow_runs/{dead['id']}/labels", json=label).raise_for_status()
        assert eventually(lambda: by_itself(api, tokenize, often["id"]), 120, "a run of the interval")
        assert eventually(lambda: by_itself(api, report, each_minute["id"]), 180, "a run of the cron")
        eventually(
            lambda: api.get(f"/flow_runs/{dead['id']}").json().get("state_name") == "Crashed",
            60,
            "a dead run's state while the server runs",
        )
        assert f"marked as crashed: {dead['name']}" in log.read_text()

        reproduce = found["reproduce"]
        [nightly] = reproduce["schedules"]
        api.patch(f"/deployments/{reproduce['id']}/schedules/{nightly['id']}", json={"active": True})
        [hourly] = tokenize["schedules"]
        api.delete(f"/deployments/{tokenize['id']}/schedules/{hourly['id']}").raise_for_status()
        changed = tokenize["parameters"]["config"] | {"function_tokens": {"share": 0.3}}
        own = {"parameters": {"config": changed}, "tags": ["mine"], "paused": True, "concurrency_limit": 3}
        api.patch(f"/deployments/{tokenize['id']}", json=own).raise_for_status()
        api.delete(f"/deployments/{found['growth']['id']}").raise_for_status()
        process.kill()
        process.wait()

    elsewhere = environment | {"FUNCTOK_TEST_ROOT": f"{environment['FUNCTOK_TEST_ROOT']}2"}
    with brought_up(elsewhere, port, log) as process:
        is_up(process)
        assert "kept the parameters that were set in the UI: tokenize" in log.read_text()
        assert "deployed growth" in log.read_text()
        found = deployments_of(api)
        assert found.keys() == FLOWS
        assert found["tokenize"]["parameters"]["config"] == changed
        assert found["tokenize"]["tags"] == ["mine"]
        assert found["tokenize"]["paused"] is True
        assert found["tokenize"]["global_concurrency_limit"]["limit"] == 3
        assert [schedule["id"] for schedule in found["tokenize"]["schedules"]] == [often["id"]]
        assert [schedule["id"] for schedule in found["report"]["schedules"]] == [each_minute["id"]]
        assert [schedule["active"] for schedule in found["reproduce"]["schedules"]] == [True]
        for name in ("report", "growth"):
            root = found[name]["parameters"]["config"]["storage"]["root"]
            assert root == elsewhere["FUNCTOK_TEST_ROOT"], "what nobody touched follows --root"

        api.delete(f"/deployments/{found['report']['id']}/schedules/{each_minute['id']}").raise_for_status()
        pending = post(api, "/flow_runs/", {"flow_id": tokenize["flow_id"], "state": {"type": "PENDING"}})
        taken_by = {"prefect.worker.name": f"functok-cpu of {socket.gethostname()}:{port}"}
        api.patch(f"/flow_runs/{pending['id']}/labels", json=taken_by).raise_for_status()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    database = Path(environment["PREFECT_HOME"]) / "prefect.db"
    with sqlite3.connect(database) as connection:
        [state] = connection.execute(
            "SELECT state_name FROM flow_run WHERE id = ?", [pending["id"]]
        ).fetchall()
    assert state == ("Crashed",)


def test_a_version_with_which_no_schedule_fires_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"sqlalchemy": "2.1.0", "prefect": "3.8.8"}
    monkeypatch.setattr("infra.prefect_server.version", versions.__getitem__)
    with pytest.raises(
        ConfigError, match=r"SQLAlchemy 2\.1\.0 .*never starts a scheduled run.*sqlalchemy<2\.1"
    ):
        up(port=free_port())


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


def answer(api: httpx.Client, path: str, body: Any) -> httpx.Response:
    """What the server answers once its SQLite is not locked: with 503 it asks its clients to come again."""
    return eventually(
        lambda: (answered := api.post(path, json=body)).status_code != 503 and answered,
        60,
        f"an answer to {path} other than 503",
    )


def post(api: httpx.Client, path: str, body: Any) -> Any:
    return answer(api, path, body).raise_for_status().json()


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
    lines = ran.stderr.strip().splitlines()
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
    return [child for child in parent.children() if "http.server" in child.cmdline()]


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
