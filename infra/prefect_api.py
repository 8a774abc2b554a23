"""What `functok up` asks of Prefect's API: work pools, the watch over heartbeats, and runs that died unseen.

A run whose worker and engine are both killed stays Running for ever (measured: FIELD_NOTES). Two things mend
it: an automation marks as crashed a run whose heartbeat stays away, and at start and stop `crash_dead_runs`
does so for runs of this machine whose process is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from uuid import UUID

    import httpx
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.client.schemas.schedules import SCHEDULE_TYPES
    from prefect.events.schemas.automations import AutomationCore

T = TypeVar("T")

AUTOMATION = "functok: crash runs whose heartbeat stopped"
MISSED_SECONDS = 90
"""Silence after which a run counts as crashed: three heartbeats."""

PENDING_SECONDS = 300
"""A run that a worker took and that did not start within this time died on the way."""

SCHEDULING = timedelta(minutes=3)
"""How long an active schedule may have no planned run: Prefect's scheduler looks once a minute."""

PROCESS = "functok.process"
"""The label of a run that names its machine and process."""

WORKER = "prefect.worker.name"
"""The label that a worker gives a run which it has taken."""


def answer(url: str, seconds: float = 2.0) -> httpx.Response | None:
    """What a server answers within some seconds; None where it does not, or not with status 200."""
    import httpx

    try:
        found = httpx.get(url, timeout=seconds)
    except httpx.HTTPError:
        return None
    return found if found.status_code == 200 else None


def health(api_url: str) -> bool:
    """Whether the API answers."""
    return answer(f"{api_url}/health") is not None


def server_version(api_url: str) -> str | None:
    """The version of Prefect that answers there, if one does."""
    found = answer(f"{api_url}/admin/version")
    try:
        return None if found is None else str(found.json())
    except ValueError:
        return None


def client_of(api_url: str | None = None) -> SyncPrefectClient:
    """A client of a server, a context; of that of PREFECT_API_URL if none is given."""
    from prefect.client.orchestration import SyncPrefectClient, get_client

    return get_client(sync_client=True) if api_url is None else SyncPrefectClient(api_url)


def keep_variable(client: SyncPrefectClient, name: str, value: dict[str, Any]) -> None:
    """Set a variable of the server, whether or not it is there."""
    from prefect.client.schemas.actions import VariableCreate, VariableUpdate
    from prefect.exceptions import ObjectAlreadyExists

    try:
        client.create_variable(VariableCreate(name=name, value=value))
    except ObjectAlreadyExists:
        client.update_variable(VariableUpdate(name=name, value=value))


def prepare(api_url: str, pools: Sequence[str], gone_workers: Sequence[str] = ()) -> list[str]:
    """Create the work pools and the automation where they are not there, and settle runs that died.

    Args:
        api_url: Prefect's API.
        pools: The work pools.
        gone_workers: Names of workers that do not run now: what they had taken and not begun is lost.

    Returns:
        A line for people about each thing that was done.
    """
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    done: list[str] = []
    with client_of(api_url) as client:
        for pool in pools:
            template = ProcessWorker.get_default_base_job_template()
            try:
                client.create_work_pool(
                    WorkPoolCreate(name=pool, type=ProcessWorker.type, base_job_template=template)
                )
                done.append(f"created the work pool {pool}")
            except ObjectAlreadyExists:
                continue
        if existing := client.read_automations_by_name(AUTOMATION):
            client.update_automation(existing[0].id, _automation())
        else:
            client.create_automation(_automation())
    dead = crash_dead_runs(
        api_url, "its process died while Prefect's server was down", gone_workers=gone_workers
    )
    return done + [f"marked as crashed: {name}, which died while the server was down" for name in dead]


def crash_dead_runs(
    api_url: str, reason: str, *, gone_workers: Sequence[str] = (), taken_by: Sequence[str] = ()
) -> list[str]:
    """Mark as crashed the unfinished runs of this machine whose process is gone, and their subflows.

    A run that a worker has taken and not begun (Pending, Submitting) holds its deployment's one place. It is lost at
    once where its worker is gone, and where its worker lives, after `PENDING_SECONDS`.

    Args:
        api_url: Prefect's API.
        reason: What the state's message says.
        gone_workers: Names of workers that do not run any more.
        taken_by: Names of this machine's workers that do run.

    Returns:
        The names of the runs that were marked.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    with client_of(api_url) as client:
        unfinished = _runs_in(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
        gone, alive, ours = set(gone_workers), set(taken_by), set[str]()
        for pool in {run.work_pool_name for run in unfinished if run.work_pool_name}:
            workers = client.read_workers_for_work_pool(pool)
            online = {worker.name for worker in workers if worker.status == "ONLINE"}
            # Those of a `functok up` that was killed and began again at another port.
            gone |= {worker.name for worker in workers if _is_here(worker.name)} - online - alive
            if online <= gone | alive:
                ours.add(pool)
        dead = {run.id: run for run in unfinished if _died_here(run, gone, alive, ours)}
        parents = _parents(client, [run for run in unfinished if run.id not in dead])
        while orphans := {
            run.id: run for run in unfinished if parents.get(run.id) in dead and run.id not in dead
        }:
            dead |= orphans
        for run in dead.values():
            client.set_flow_run_state(run.id, Crashed(message=reason), force=True)
    return [run.name for run in dead.values()]


def silent_schedules(api_url: str, since: datetime, grace: timedelta = SCHEDULING) -> list[str]:
    """The active schedules of which Prefect's scheduler has planned no run, though one is due.

    Args:
        api_url: Prefect's API.
        since: When the server was started.
        grace: How long the scheduler may take after that, and after a change.

    Returns:
        A line for people about each.
    """
    from prefect.client.schemas.objects import StateType

    begun = datetime.now(UTC) - grace
    silent = []
    with client_of(api_url) as client:
        for deployment in _all_pages(client.read_deployments):
            # An update of the deployment deletes what was planned.
            settled = not deployment.paused and max(since, deployment.updated or since) <= begun
            active = [
                schedule
                for schedule in deployment.schedules
                if settled and schedule.active and (schedule.updated or since) <= begun
            ]
            if not active:
                continue
            runs = _runs_in(client, [StateType.SCHEDULED], deployment=deployment.id)
            planned = {run.created_by.id for run in runs if run.created_by is not None}
            silent += [
                f"the schedule {schedule.slug or schedule.id} of {deployment.name} is active, and Prefect's "
                "scheduler has planned no run of it"
                for schedule in active
                if schedule.id not in planned and _has_a_next_date(schedule.schedule)
            ]
    return silent


def note_process(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of flows: note machine and process on the run, so that its death can be seen.

    Prefect's process workers note a number without its machine, and nobody notes it for a run without a worker.
    """
    if flow_run.parent_task_run_id is None:
        with client_of() as client:
            client.update_flow_run_labels(flow_run.id, {PROCESS: f"{socket.gethostname()}:{os.getpid()}"})


def _automation() -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    ends = ("Completed", "Failed", "Cancelled", "Crashed")
    return AutomationCore(
        name=AUTOMATION,
        description="A run that sends no heartbeat for 90 s and has not ended was killed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=MISSED_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"no heartbeat for {MISSED_SECONDS} s: its process was killed",
            )
        ],
    )


def _has_a_next_date(schedule: SCHEDULE_TYPES) -> bool:
    """Whether a schedule goes on, as Prefect's scheduler reckons."""
    from prefect.server.schemas.schedules import SCHEDULE_TYPES as SCHEDULES
    from pydantic import TypeAdapter

    its = TypeAdapter[Any](SCHEDULES).validate_python(schedule.model_dump())
    return bool(asyncio.run(its.get_dates(n=1, start=datetime.now(UTC))))


def _runs_in(
    client: SyncPrefectClient, states: Iterable[str], deployment: UUID | None = None
) -> list[FlowRun]:
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )

    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))))
    of = None if deployment is None else DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return _all_pages(partial(client.read_flow_runs, flow_run_filter=wanted, deployment_filter=of))


def _all_pages(read: Callable[..., list[T]]) -> list[T]:
    found: list[T] = []
    while page := read(limit=200, offset=len(found)):
        found += page
    return found


def _parents(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> dict[UUID, UUID]:
    """Subflow run to the flow run that called it."""
    parents: dict[UUID, UUID] = {}
    for run in runs:
        if run.parent_task_run_id is not None:
            caller = client.read_task_run(run.parent_task_run_id)
            if caller.flow_run_id is not None:
                parents[run.id] = caller.flow_run_id
    return parents


def worker_name(pool: str, port: int) -> str:
    """The name of the worker that `functok up` has for a pool: it says on which machine the worker is."""
    return f"{pool} of {socket.gethostname()}:{port}"


def _is_here(worker: str) -> bool:
    _, separator, place = worker.rpartition(" of ")
    return bool(separator) and place.rpartition(":")[0] == socket.gethostname()


def _died_here(run: FlowRun, gone: Collection[str], alive: Collection[str], ours: Collection[str]) -> bool:
    """Whether the run's process was on this machine and is gone, or never came to life.

    Args:
        run: An unfinished run.
        gone: Names of this machine's workers that do not run any more.
        alive: Names of this machine's workers that do run.
        ours: Pools that no other worker serves. A worker takes a run before it puts its name on it, so a run
            without a name is ours where nobody else can have taken it.
    """
    host, separator, process = str(run.labels.get(PROCESS, "")).rpartition(":")
    if separator:
        return host == socket.gethostname() and not _lives(int(process), run)
    if run.state is None or run.parent_task_run_id is not None:
        # A subflow shares its caller's fate.
        return False
    worker = run.labels.get(WORKER)
    if not (run.work_pool_name in ours if worker is None else worker in gone or worker in alive):
        # The number of a process of another machine says nothing here.
        return False
    pid = run.infrastructure_pid or ""
    if pid.isdigit() and _lives(int(pid), run):
        return False
    if worker in gone or not alive:
        return True
    if not run.state.is_pending():
        # Running with no process noted yet, or Cancelling before there was one.
        return pid.isdigit()
    return (datetime.now(UTC) - run.state.timestamp).total_seconds() > PENDING_SECONDS


def _lives(pid: int, run: FlowRun) -> bool:
    """Whether the process runs; another one may have its number since."""
    import psutil

    try:
        born = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    return run.start_time is None or born <= run.start_time.timestamp()
