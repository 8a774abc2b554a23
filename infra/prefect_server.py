"""Prefect, private and on this machine: its settings, and `functok up`. The API of a run alone: `infra.run_api`."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from infra.addresses import without_credentials
from infra.config_file import load_config
from schemas.errors import ConfigError

PROJECT = Path(__file__).resolve().parent.parent
"""Where `prefect.yaml` lies."""

POOLS = ("functok-cpu", "functok-gpu")
"""The work pools that `prefect.yaml` deploys to; a worker of `functok up` serves each."""

SWEEP_SECONDS = 30.0
"""How often dead runs and schedules that never fire are looked for while the server runs."""

HEARTBEAT_SECONDS = 30
"""How often a run under `functok up` says that it is alive."""

_PRIVATE = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # the default (V2) interface calls an analytics host
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
}


def prefect_environment() -> dict[str, str]:
    """Set, where the user has not, what keeps Prefect private and offline; return the settings.

    Prefect reads its settings when it is imported, so this comes first: importing `flows` does it.
    """
    for name, value in _PRIVATE.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in _PRIVATE}


def is_loopback(host: str) -> bool:
    """Whether an address leads to this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_origins(port: int) -> list[str]:
    """The origins under which a browser on this machine sees the server."""
    return [f"http://{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]


def deployment_parameters(config: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A build step of `prefect.yaml`: the parameters of a deployment, from a configuration file.

    Args:
        config: The TOML file, relative to the project. `$FUNCTOK_CONFIG` overrides it, `$FUNCTOK_ROOT` its
            `storage.root`; `functok up --config … --root …` sets them.
        environment: Where these are looked up; the process' own if not given.

    Returns:
        `{"config": …}`, with the keys that the file sets; the form fills in the defaults.

    Raises:
        ConfigError: if the file is not a valid configuration.
    """
    from infra.config_file import load_config

    environment = os.environ if environment is None else environment
    chosen = Path(environment.get("FUNCTOK_CONFIG") or PROJECT / config)
    loaded = load_config(chosen, root=environment.get("FUNCTOK_ROOT") or None)
    return {"config": loaded.model_dump(mode="json", exclude_unset=True)}


def server_environment(
    host: str,
    port: int,
    *,
    root: str | None,
    config: str | None,
    database_url: str | None,
    debug: bool = False,
) -> dict[str, str]:
    """The environment of the server, its workers and the runs that they start.

    Args:
        host: Address that the server listens on.
        port: Port that the server listens on.
        root: Default storage root of the deployments.
        config: Configuration file that the deployments start from.
        database_url: `postgresql+asyncpg://…`; None leaves Prefect's own (SQLite in PREFECT_HOME).
        debug: Whether runs log what Prefect calls DEBUG, and the tracebacks of failures.

    Raises:
        ConfigError: if the database URL is not one that Prefect takes.
    """
    prefect_environment()
    api_host = f"[{host}]" if ":" in host else host
    environment = dict(os.environ) | {
        "PREFECT_API_URL": f"http://{api_host}:{port}/api",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "PREFECT_SERVER_LOGGING_LEVEL": os.environ.get("PREFECT_SERVER_LOGGING_LEVEL", "WARNING"),
        "PREFECT_CLI_PROMPT": "false",
        "PYTHONUNBUFFERED": "1",
        # A run finds its flow by the module's name, and people's PYTHONPATH may lead to packages of the same names.
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    # an interface address that the caller had set for another server would mislead this one's pages
    environment.pop("PREFECT_SERVER_UI_API_URL", None)
    if is_loopback(host):
        # Prefect lets any web page that a browser has open read and call the API.
        environment.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", ",".join(own_origins(port)))
    if debug:
        environment["PREFECT_LOGGING_LEVEL"] = "DEBUG"
    if root is not None:
        environment["FUNCTOK_ROOT"] = root if "://" in root else str(Path(root).resolve())
    if config := config or environment.get("FUNCTOK_CONFIG"):
        environment["FUNCTOK_CONFIG"] = str(Path(config).resolve())
    if database_url is not None:
        if not database_url.startswith(("postgresql+asyncpg://", "sqlite+aiosqlite://")):
            raise ConfigError(
                f"Prefect cannot use the database {without_credentials(database_url)}",
                hint="postgresql+asyncpg://user:password@host:5432/name, or sqlite+aiosqlite:///path",
            )
        environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database_url
    return environment


def up(
    root: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 4200,
    config: str | None = None,
    database_url: str | None = None,
    debug: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Bring up server, work pools, workers and every deployment of `prefect.yaml`, and wait.

    Returns after Ctrl-C or SIGTERM, when all children are gone. A second `up` after a crash stops what the
    first one left behind, and marks as crashed the runs that died with it. What people have set in the UI
    outlives restarts (`infra.deployments`). What server and workers print is kept in files that are named at
    start, and errors among it are told as they come.

    Args:
        root: Default `storage.root` of the deployments.
        host: Address to listen on. Prefect has no login: 127.0.0.1 unless a proxy guards it.
        port: Port to listen on.
        config: TOML file that the deployments' parameters start from (default: `configs/demo.toml`).
        database_url: A PostgreSQL URL for teams; also read from PREFECT_API_DATABASE_CONNECTION_URL.
        debug: Show the tracebacks of failed runs in their logs.
        say: Takes lines for people.

    Raises:
        ConfigError: if the port is taken, the configuration or a parameter is wrong, or a library's version lets no
            schedule fire.
        FunctokError: if a child dies or does not start; the message has its last lines.
    """
    from infra.children import Children, require_free_port

    require_working_scheduler()
    environment = server_environment(
        host, port, root=root, config=config, database_url=database_url, debug=debug
    )
    if given := environment.get("FUNCTOK_CONFIG"):
        # A child reads it, and would refuse it when the server is up.
        load_config(given, root=environment.get("FUNCTOK_ROOT"))
    if not (PROJECT / "prefect.yaml").is_file():
        raise ConfigError(f"{PROJECT} has no prefect.yaml", hint="run `functok up` from a source checkout")
    with Children(name=f"up-{port}", environment=environment, directory=PROJECT) as children:
        require_free_port(host, port)
        say(f"what the server and the workers print is in {children.logs}")
        workers = _start(children, host, port, say)
        children.wait(say, _watch(environment["PREFECT_API_URL"], workers, say), SWEEP_SECONDS)
        say("stopping …")
    say("stopped")


def require_working_scheduler() -> None:
    """Do nothing where the libraries and settings here let Prefect's scheduler work.

    With SQLAlchemy 2.1 each of its loops ends in an error: runs, retries and the UI work, and no schedule fires.

    Raises:
        ConfigError: if they do not.
    """
    from packaging.version import Version
    from prefect.settings import get_current_settings

    found = version("sqlalchemy")
    if Version(found).release >= (2, 1):
        raise ConfigError(
            f"with SQLAlchemy {found} Prefect {version('prefect')} never starts a scheduled run",
            hint='pip install "sqlalchemy<2.1"',
        )
    if not get_current_settings().server.services.scheduler.enabled:
        raise ConfigError(
            "Prefect's settings switch its scheduler off, and no schedule would ever start a run",
            hint="unset PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED, in the environment or in Prefect's profile",
        )


def _watch(api_url: str, workers: Sequence[str], say: Callable[[str], None]) -> Callable[[], None]:
    """What is done again and again while the server runs: mark dead runs as crashed, tell once of a silent schedule.

    Args:
        api_url: Prefect's API.
        workers: Names of the workers that run here.
        say: Takes lines for people.
    """
    from infra.prefect_api import crash_dead_runs, silent_schedules

    since = datetime.now(UTC)
    told: list[str] = []

    def look() -> None:
        for name in crash_dead_runs(api_url, "its process is gone", taken_by=workers):
            say(f"marked as crashed: {name}, whose process is gone")
        silent = silent_schedules(api_url, since)
        for line in silent:
            if line not in told:
                say(f"{line}: see the server's log, and start `functok up` again")
        told[:] = silent

    return look


def _start(children: Any, host: str, port: int, say: Callable[[str], None]) -> list[str]:
    """Start everything; returns the workers' names."""
    from infra.children import Stopped
    from infra.deployments import fill, wanted_of, with_every_stage
    from infra.prefect_api import crash_dead_runs, health, prepare, worker_name
    from infra.published import absolute, note_root
    from infra.storage import Storage

    api_url = children.environment["PREFECT_API_URL"]
    workers = {pool: worker_name(pool, port) for pool in POOLS}
    names = list(workers.values())
    try:
        say("starting Prefect's server …")
        children.start("server", "infra.web_server", "--host", host, "--port", str(port))
        children.until(lambda: health(api_url), "Prefect's server to answer", timeout=180)
        children.before_stop(lambda: crash_dead_runs(api_url, "functok up was stopped", gone_workers=names))
        for line in prepare(api_url, POOLS, gone_workers=names):
            say(line)
        told = _take_up_what_was_told(children.environment, say)
        say("deploying prefect.yaml …")
        content = with_every_stage(yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8")))
        (step,) = content["build"]
        default = str(step["infra.prefect_server.deployment_parameters"]["config"])
        parameters = deployment_parameters(default, environment=children.environment)

        def deploy(missing: Sequence[str]) -> None:
            chosen = [argument for name in missing for argument in ("--name", name)]
            with tempfile.TemporaryDirectory() as aside:
                file = Path(aside) / "prefect.yaml"
                file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
                where = ("--prefect-file", str(file))
                children.run("deploy", "prefect", "--no-prompt", "deploy", *where, *chosen, timeout=180)

        for line in fill(api_url, wanted_of(content, parameters), PROJECT, deploy, told):
            say(line)
        written = parameters["config"].get("storage", {})
        if "root" in written:
            note_root(Storage(absolute(written["root"], PROJECT), written.get("endpoint_url")), api_url)
        for pool, name in workers.items():
            arguments = ("--pool", pool, "--type", "process", "--name", name)
            children.start(f"worker of {pool}", "prefect", "worker", "start", *arguments)
        say(f"functok is up: {api_url.removesuffix('/api')} (Ctrl-C stops it)")
    except Stopped:
        pass
    return names


def _take_up_what_was_told(environment: dict[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Fill in the `--config` and `--root` that are not given now from the last start on this server.

    Otherwise a start without them would lead every deployment back to the demo.

    Returns:
        Those that hold, by the variable that carries them.

    Raises:
        ConfigError: if the configuration file of the last start is not here.
    """
    from infra.deployments import told_before

    before = told_before(environment["PREFECT_API_URL"])
    options = {"FUNCTOK_CONFIG": "--config", "FUNCTOK_ROOT": "--root"}
    for name, option in options.items():
        if environment.get(name) or not before.get(name):
            continue
        environment[name] = before[name]
        if name == "FUNCTOK_CONFIG" and not Path(before[name]).is_file():
            raise ConfigError(
                f"{before[name]}, the configuration that `functok up` was started with last, is not here",
                hint="name another one: functok up --config FILE",
            )
        say(f"goes on with {option} {without_credentials(before[name])}, as it was started with last")
    return {name: environment[name] for name in options if environment.get(name)}
