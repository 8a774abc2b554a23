"""What `functok up` asks of Prefect's API: work pools, the watch over heartbeats, and runs that died unseen.

A run whose worker and engine are both killed stays Running for ever (measured: FIELD_NOTES). Two things mend
it: an automation marks as crashed a run whose heartbeat stays away, and at start and stop `crash_dead_runs`
does so for runs of this machine whose process is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import Flow
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.events.schemas.automations import AutomationCore

AUTOMATION = "functok: crash runs whose heartbeat stopped"
MISSED_SECONDS = 90
"""Silence after which a run counts as crashed: three heartbeats."""

PENDING_SECONDS = 300
"""A run that a worker took and that did not start within this time died on the way."""

PROCESS = "functok.process"
"""The label of a run that names its machine and process."""

WORKER = "prefect.worker.name"
"""The label that a worker gives a run which it has taken."""


def health(api_url: str, seconds: float = 2.0) -> bool:
    """Whether the API answers within some seconds."""
    import httpx

    try:
        return httpx.get(f"{api_url}/health", timeout=seconds).status_code == 200
    except httpx.HTTPError:
        return False


def prepare(api_url: str, pools: Sequence[str], gone_workers: Sequence[str] = ()) -> list[str]:
    """Create the work pools and the automation where they are not there, and settle runs that died.

    Args:
        api_url: Prefect's API.
        pools: The work pools.
        gone_workers: Names of workers that do not run now: what they had taken and not begun is lost.

    Returns:
        A line for people about each thing that was done.
    """
    return asyncio.run(_prepare(api_url, pools, gone_workers))


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

    async def settle() -> list[str]:
        from prefect.client.orchestration import PrefectClient

        async with PrefectClient(api_url) as client:
            return await _crash_dead_runs(client, reason, gone_workers, taken_by)

    return asyncio.run(settle())


def note_process(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of flows: note machine and process on the run, so that its death can be seen.

    Prefect's process workers note a number without its machine, and nobody notes it for a run without a worker.
    """
    if flow_run.parent_task_run_id is None:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, {PROCESS: f"{socket.gethostname()}:{os.getpid()}"})


async def _prepare(api_url: str, pools: Sequence[str], gone_workers: Sequence[str]) -> list[str]:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    done: list[str] = []
    async with PrefectClient(api_url) as client:
        for pool in pools:
            wanted = WorkPoolCreate(
                name=pool,
                type=ProcessWorker.type,
                base_job_template=ProcessWorker.get_default_base_job_template(),
            )
            try:
                await client.create_work_pool(wanted)
                done.append(f"created the work pool {pool}")
            except ObjectAlreadyExists:
                continue
        wanted_automation = _automation()
        existing = await client.read_automations_by_name(AUTOMATION)
        if existing:
            await client.update_automation(existing[0].id, wanted_automation)
        else:
            await client.create_automation(wanted_automation)
        done += [
            f"marked as crashed: {name}, which died while the server was down"
            for name in await _crash_dead_runs(
                client, "its process died while Prefect's server was down", gone_workers, ()
            )
        ]
    return done


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


async def _crash_dead_runs(
    client: PrefectClient, reason: str, gone_workers: Sequence[str], taken_by: Sequence[str]
) -> list[str]:
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    unfinished = await _runs_in(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    untold = {run.work_pool_name for run in unfinished if run.work_pool_name and WORKER not in run.labels}
    ours = {pool for pool in untold if await _is_served_by(client, pool, {*gone_workers, *taken_by})}
    dead = {run.id: run for run in unfinished if _died_here(run, gone_workers, taken_by, ours)}
    grown = True
    while grown:
        parents = await _parents(client, [run for run in unfinished if run.id not in dead])
        orphans = {run.id: run for run in unfinished if parents.get(run.id) in dead and run.id not in dead}
        dead |= orphans
        grown = bool(orphans)
    for run in dead.values():
        await client.set_flow_run_state(run.id, Crashed(message=reason), force=True)
    return [run.name for run in dead.values()]


async def _runs_in(client: PrefectClient, states: Iterable[str]) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType

    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))))
    found: list[FlowRun] = []
    while page := await client.read_flow_runs(flow_run_filter=wanted, limit=200, offset=len(found)):
        found += page
    return found


async def _parents(client: PrefectClient, runs: Sequence[FlowRun]) -> dict[UUID, UUID]:
    """Subflow run to the flow run that called it."""
    parents: dict[UUID, UUID] = {}
    for run in runs:
        if run.parent_task_run_id is not None:
            caller = await client.read_task_run(run.parent_task_run_id)
            if caller.flow_run_id is not None:
                parents[run.id] = caller.flow_run_id
    return parents


async def _is_served_by(client: PrefectClient, pool: str, workers: set[str]) -> bool:
    """Whether nobody but these workers can have taken a run from the pool."""
    found = await client.read_workers_for_work_pool(pool)
    return all(worker.name in workers for worker in found if worker.status == "ONLINE")


def _died_here(
    run: FlowRun, gone_workers: Sequence[str], taken_by: Sequence[str], ours: Collection[str]
) -> bool:
    """Whether the run's process was on this machine and is gone, or never came to life.

    A worker takes a run before it puts its name on it: a run without a name is ours where nobody else serves its pool.
    """
    host, separator, process = str(run.labels.get(PROCESS, "")).rpartition(":")
    if separator:
        return host == socket.gethostname() and not _lives(int(process), run)
    if run.state is None or not run.state.is_pending():
        return False
    pid, worker = run.infrastructure_pid or "", run.labels.get(WORKER)
    if pid.isdigit() and _lives(int(pid), run):
        return False
    is_taken_here = run.work_pool_name in ours if worker is None else worker in {*gone_workers, *taken_by}
    if is_taken_here and not taken_by:
        return True
    is_overdue = (datetime.now(UTC) - run.state.timestamp).total_seconds() > PENDING_SECONDS
    return is_overdue and (is_taken_here or pid.isdigit())


def _lives(pid: int, run: FlowRun) -> bool:
    """Whether the process runs; another one may have its number since."""
    try:
        born = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    return run.start_time is None or born <= run.start_time.timestamp()
