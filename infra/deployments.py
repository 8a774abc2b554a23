"""The deployments of `prefect.yaml`: made where they are not there, and otherwise left as people have set them.

`prefect deploy --all` writes every deployment anew: a schedule that was added in the UI is gone after a restart,
one that was switched off is on again. `functok up` therefore asks Prefect to deploy only what is missing. What is
there keeps its schedules, parameters, tags, limits and pause; where its code lies is brought up to date, and a
schedule that a newer `prefect.yaml` brings for the first time is added. What `functok up` itself has filled in is
remembered in a variable of the server (`functok_filled`), so that parameters which nobody has touched follow
`--config` and `--root`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from infra.errors import ConfigError, FunctokError
from infra.manifest import content_key

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

FILLED = "functok_filled"
"""The variable: deployment name to the key of its parameters and the slugs of its schedules, as they came from
`prefect.yaml`."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One deployment as `prefect.yaml` describes it.

    Attributes:
        name: Its name, and that of its flow.
        entrypoint: The flow, as `module.function`.
        description: For people.
        parameters: What its runs get unless told otherwise.
        schedules: Slug to schedule, as the file has it.
    """

    name: str
    entrypoint: str
    description: str
    parameters: dict[str, Any]
    schedules: dict[str, dict[str, Any]]


def read_deployments(file: Path, parameters: Mapping[str, Any]) -> list[Wanted]:
    """The deployments of a `prefect.yaml`.

    Args:
        file: The file.
        parameters: What stands in for the file's template of parameters.

    Raises:
        ConfigError: if a schedule has no slug: without a name it could not be told from one made in the UI.
    """
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    wanted = []
    for entry in content["deployments"]:
        schedules = entry.get("schedules") or []
        if not all(schedule.get("slug") for schedule in schedules):
            raise ConfigError(
                f"{file}: a schedule of the deployment {entry['name']} has no slug",
                hint="give it a name: slug: nightly",
            )
        wanted.append(
            Wanted(
                name=entry["name"],
                entrypoint=entry["entrypoint"],
                description=entry.get("description", ""),
                parameters=dict(parameters),
                schedules={schedule["slug"]: schedule for schedule in schedules},
            )
        )
    return wanted


def fill(
    api_url: str, wanted: Sequence[Wanted], directory: Path, deploy: Callable[[Sequence[str]], None]
) -> list[str]:
    """Deploy what is missing, and bring up to date what is there.

    Args:
        api_url: Prefect's API.
        wanted: The deployments.
        directory: Where the flows' code lies.
        deploy: Has Prefect deploy these names of `prefect.yaml` anew.

    Returns:
        A line for people about each thing that was done or kept.

    Raises:
        FunctokError: if Prefect refuses something.
    """
    missing = asyncio.run(_missing(api_url, wanted))
    if missing:
        deploy(missing)
    return asyncio.run(_settle(api_url, wanted, missing, directory))


async def _missing(api_url: str, wanted: Sequence[Wanted]) -> list[str]:
    from prefect.client.orchestration import PrefectClient

    async with PrefectClient(api_url) as client:
        return [entry.name for entry in wanted if await _read(client, entry.name) is None]


async def _read(client: PrefectClient, name: str) -> DeploymentResponse | None:
    from prefect.exceptions import ObjectNotFound

    try:
        return await client.read_deployment_by_name(f"{name}/{name}")
    except ObjectNotFound:
        return None


async def _settle(api_url: str, wanted: Sequence[Wanted], made: Sequence[str], directory: Path) -> list[str]:
    from prefect.client.orchestration import PrefectClient

    lines = [f"deployed {', '.join(made)}"] if made else []
    follows: list[str] = []
    keeps: list[str] = []
    async with PrefectClient(api_url) as client:
        filled = await _read_filled(client)
        for entry in wanted:
            found = await _read(client, entry.name)
            if found is None:
                raise FunctokError(
                    f"the deployment {entry.name} is not there after it was deployed",
                    hint="run `functok up` again; the log of the server says more",
                )
            key, known = content_key(parameters=entry.parameters), filled.get(entry.name, {})
            is_current = content_key(parameters=found.parameters) == key
            if entry.name not in made:
                # What was there before anybody kept a record may have been changed since: it is kept.
                is_untouched = known.get("parameters") == content_key(parameters=found.parameters)
                await _refresh(
                    client, found, entry, directory, set_parameters=is_untouched and not is_current
                )
                added = await _add_schedules(client, found, entry, known.get("schedules"))
                lines += [f"added the schedule {slug} to {entry.name}" for slug in added]
                if not is_current:
                    (follows if is_untouched else keeps).append(entry.name)
            kept = entry.name in keeps
            filled[entry.name] = {
                "parameters": known.get("parameters", "") if kept else key,
                "schedules": sorted({*known.get("schedules", []), *entry.schedules}),
            }
        await _write_filled(client, filled)
    if follows:
        lines.append(f"set the parameters of {', '.join(follows)}")
    if keeps:
        lines.append(
            f"kept the parameters that were set in the UI: {', '.join(keeps)} "
            "(a deployment that is deleted there is made anew at the next start)"
        )
    return lines


async def _refresh(
    client: PrefectClient, found: DeploymentResponse, entry: Wanted, directory: Path, *, set_parameters: bool
) -> None:
    """Bring up to date where a deployment's code lies and what its parameters mean, and no more."""
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Flow[Any, Any] = load_flow_from_entrypoint(entry.entrypoint)
    values: dict[str, Any] = {
        "entrypoint": entry.entrypoint,
        "description": entry.description,
        "pull_steps": [
            {"prefect.deployments.steps.set_working_directory": {"directory": str(directory)}},
        ],
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
    }
    if set_parameters:
        values["parameters"] = entry.parameters
    if all(getattr(found, name, None) == value for name, value in values.items()):
        # An update, even of nothing, deletes the runs that are already scheduled.
        return
    try:
        await client.update_deployment(found.id, DeploymentUpdate(**values))
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:
            raise
        raise FunctokError(
            f"the parameters that were set for the deployment {entry.name} do not fit this version of functok: "
            f"{error.response.json().get('detail', error)}",
            hint="change them in the UI of the version that they were set with, or delete the deployment there",
        ) from error


async def _add_schedules(
    client: PrefectClient, found: DeploymentResponse, entry: Wanted, brought: Sequence[str] | None
) -> list[str]:
    """Add the schedules that the file brings for the first time; one that was deleted in the UI stays deleted."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import construct_schedule

    # A deployment from before the record was kept has had all of the file's schedules of that time.
    there = {schedule.slug for schedule in found.schedules}
    new = [] if brought is None else [slug for slug in entry.schedules if slug not in {*brought, *there}]
    for slug in new:
        schedule = entry.schedules[slug]
        timing = {
            name: schedule[name] for name in ("cron", "interval", "rrule", "timezone") if name in schedule
        }
        await client.create_deployment_schedules(
            found.id,
            [
                DeploymentScheduleCreate(
                    schedule=construct_schedule(**timing), active=schedule.get("active", True), slug=slug
                )
            ],
        )
    return new


async def _read_filled(client: PrefectClient) -> dict[str, dict[str, Any]]:
    variable = await client.read_variable_by_name(FILLED)
    return dict(variable.value) if variable is not None and isinstance(variable.value, dict) else {}


async def _write_filled(client: PrefectClient, filled: Mapping[str, Any]) -> None:
    from prefect.client.schemas.actions import VariableCreate, VariableUpdate

    if await client.read_variable_by_name(FILLED) is None:
        await client.create_variable(VariableCreate(name=FILLED, value=dict(filled)))
    else:
        await client.update_variable(VariableUpdate(name=FILLED, value=dict(filled)))
