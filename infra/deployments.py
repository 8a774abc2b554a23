"""The deployments of `prefect.yaml`: made where they are not there, and otherwise left as people have set them.

`prefect deploy --all` writes every deployment anew: a schedule that was added in the UI is gone after a restart,
one that was switched off is on again. `functok up` therefore asks Prefect to deploy only what is missing. What is
there keeps its schedules, tags, limits and pause; where its code lies and what its form asks is brought up to date,
and a schedule that a newer `prefect.yaml` brings for the first time is added.

Parameters are settled value by value: one that nobody has touched follows `--config` and `--root`, one that was set
in the UI is kept, so that a changed share in the UI does not hold a deployment back at an old root. To tell the two
apart, fingerprints of what `functok up` has filled in are kept in a variable of the server (`functok_filled`), with
the `--config` and `--root` that it was told last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infra.addresses import without_credentials
from infra.manifest import content_key
from infra.prefect_api import client_of, keep_variable
from schemas.errors import ConfigError, FunctokError
from schemas.work import STAGES

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

FILLED = "functok_filled"
"""The variable: `values`, fingerprints of what was filled in; `schedules`, deployment name to the slugs that
`prefect.yaml` has brought; `told`, environment variable to what `functok up` was told last."""

_VALUE_DIGITS = 12
"""Digits of a fingerprint: a variable holds 5,000 characters, a large configuration has 100 values."""


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


def with_every_stage(content: Mapping[str, Any], stages: Sequence[str] = STAGES) -> dict[str, Any]:
    """A `prefect.yaml` with a deployment for each stage: one that it does not know is deployed as `features` is.

    So an experiment that somebody adds needs no entry there.
    """
    known = {entry["name"]: entry for entry in content["deployments"]}
    like = {name: value for name, value in known.get("features", {}).items() if name != "schedules"}
    added = [
        {**like, "name": stage, "entrypoint": f"flows.{stage}.{stage}", "description": f"The stage {stage}."}
        for stage in stages
        if stage not in known
    ]
    return {**content, "deployments": [*content["deployments"], *added]}


def wanted_of(content: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[Wanted]:
    """The deployments of a `prefect.yaml`.

    Args:
        content: The file's.
        parameters: What stands in for its template of parameters.

    Raises:
        ConfigError: if a schedule has no slug: without a name it could not be told from one made in the UI.
    """
    wanted = []
    for entry in content["deployments"]:
        schedules = entry.get("schedules") or []
        if not all(schedule.get("slug") for schedule in schedules):
            raise ConfigError(
                f"prefect.yaml: a schedule of the deployment {entry['name']} has no slug",
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
    api_url: str,
    wanted: Sequence[Wanted],
    directory: Path,
    deploy: Callable[[Sequence[str]], None],
    told: Mapping[str, str] | None = None,
) -> list[str]:
    """Deploy what is missing, and bring up to date what is there.

    Args:
        api_url: Prefect's API.
        wanted: The deployments.
        directory: Where the flows' code lies.
        deploy: Has Prefect deploy these names of `prefect.yaml` anew.
        told: What `told_before` shall find at the next start.

    Returns:
        A line for people about each thing that was done or kept.

    Raises:
        FunctokError: if Prefect refuses something.
    """
    with client_of(api_url) as client:
        missing = [entry.name for entry in wanted if _read(client, entry.name) is None]
    if missing:
        deploy(missing)
    lines = [f"deployed {', '.join(missing)}"] if missing else []
    # a line about values: the deployments that it is true of
    changes: defaultdict[str, list[str]] = defaultdict(list)
    with client_of(api_url) as client:
        filled = _read_filled(client)
        before, brought = set(filled.get("values", [])), dict(filled.get("schedules", {}))
        for entry in wanted:
            found = _read(client, entry.name)
            if found is None:
                raise FunctokError(
                    f"the deployment {entry.name} is not there after it was deployed",
                    hint="run `functok up` again; the log of the server says more",
                )
            if entry.name not in missing:
                settled = settle_values(values_of(found), values_of(entry), before)
                if refused := _refresh(client, found, entry, directory, settled.values):
                    page = f"{api_url.removesuffix('/api')}/deployments/deployment/{found.id}/edit"
                    lines.append(
                        f"the parameters of {found.name} do not fit this version of functok, and its runs will fail: "
                        f"{refused}; change them at {page}"
                    )
                for change in settled.said:
                    changes[change].append(entry.name)
                added = _add_schedules(client, found, entry, brought.get(entry.name))
                lines += [f"added the schedule {slug} to {entry.name}" for slug in added]
            brought[entry.name] = sorted({*brought.get(entry.name, []), *entry.schedules})
        values = sorted({value for entry in wanted for value in fingerprints(values_of(entry))})
        keep_variable(client, FILLED, {"values": values, "schedules": brought, "told": dict(told or {})})
    return lines + [f"{change} ({', '.join(names)})" for change, names in changes.items()]


def told_before(api_url: str) -> dict[str, str]:
    """The `$FUNCTOK_CONFIG` and `$FUNCTOK_ROOT` of the last start, where there were any."""
    with client_of(api_url) as client:
        return dict(_read_filled(client).get("told", {}))


def _read(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(f"{name}/{name}")
    except ObjectNotFound:
        return None


class Settled(NamedTuple):
    """The values of a deployment that shall hold, and a line about each that changes or is kept."""

    values: dict[str, Any]
    said: list[str]


def values_of(deployment: Wanted | DeploymentResponse) -> dict[str, Any]:
    """What both `prefect.yaml` and people in the UI may set of a deployment, and a restart may change."""
    return {
        "parameters": deployment.parameters,
        "description": {deployment.name: deployment.description or ""},
    }


def settle_values(found: Mapping[str, Any], wanted: Mapping[str, Any], filled: AbstractSet[str]) -> Settled:
    """Settle value by value what a deployment has, and what it would have if it were made now.

    Args:
        found: What it has: a tree of dictionaries; anything else is a value.
        wanted: What it would have.
        filled: Fingerprints of what `functok up` has filled in before: what else is there, people have set.

    Returns:
        The tree that shall hold, and what of it changes or is kept, for people.
    """
    there, new = dict(_leaves(found)), dict(_leaves(wanted))
    settled, said = dict(there), []
    for path in sorted({*there, *new}):
        name = ".".join(path[1:])
        if path not in there:
            if _fingerprint(path, new[path]) in filled:
                said.append(f"kept {name} unset, as it was set in the UI, where {_shown(new[path])} was told")
            else:
                settled[path] = new[path]
                said.append(f"set {name} to {_shown(new[path])}")
        elif path in new and there[path] == new[path]:
            continue
        elif _fingerprint(path, there[path]) in filled:
            if path in new:
                settled[path] = new[path]
                said.append(f"set {name} to {_shown(new[path])} where it was {_shown(there[path])}")
            else:
                del settled[path]
                said.append(f"unset {name}, which was {_shown(there[path])}")
        elif path in new:
            said.append(
                f"kept {name} at {_shown(there[path])}, which people set, where {_shown(new[path])} was told"
            )
    return Settled(_tree(settled), said)


def fingerprints(tree: Mapping[str, Any]) -> set[str]:
    """A fingerprint of each value of a tree and its place."""
    return {_fingerprint(*leaf) for leaf in _leaves(tree)}


def _shown(value: Any, length: int = 120) -> str:
    text = repr(_without_secrets(value))
    return text if len(text) <= length else f"{text[:length]}…"


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {name: _without_secrets(inner) for name, inner in value.items()}
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def _leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _tree(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*above, name), value in leaves.items():
        place = tree
        for folder in above:
            inner = place.get(folder)
            if not isinstance(inner, dict):
                # an empty section that has been filled since
                inner = place[folder] = {}
            place = inner
        place.setdefault(name, value)
    return tree


def _fingerprint(path: Sequence[str], value: Any) -> str:
    return content_key(path=list(path), value=value)[:_VALUE_DIGITS]


def _refresh(
    client: SyncPrefectClient,
    found: DeploymentResponse,
    entry: Wanted,
    directory: Path,
    settled: Mapping[str, Any],
) -> str:
    """Bring up to date where a deployment's code lies, what its form asks, and the settled values; no more.

    Returns:
        Why its parameters do not fit this version of functok, if they don't.
    """
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow: Flow[Any, Any] = load_flow_from_entrypoint(entry.entrypoint)
    values: dict[str, Any] = {
        "entrypoint": entry.entrypoint,
        "description": settled["description"][entry.name],
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(directory)}}],
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "parameters": settled.get("parameters", {}),
        "enforce_parameter_schema": True,
    }
    if all(getattr(found, name, None) == value for name, value in values.items()):
        # An update, even of nothing, deletes the runs that are already scheduled.
        return ""
    try:
        client.update_deployment(found.id, DeploymentUpdate(**values))
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 409:
            raise
        # Without the check they can be mended in the form of this version; a run refuses them before any work.
        values["enforce_parameter_schema"] = False
        client.update_deployment(found.id, DeploymentUpdate(**values))
        return str(error.response.json().get("detail", error))
    return ""


def _add_schedules(
    client: SyncPrefectClient, found: DeploymentResponse, entry: Wanted, brought: Sequence[str] | None
) -> list[str]:
    """Add the schedules that the file brings for the first time; one that was deleted in the UI stays deleted."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import construct_schedule

    # A deployment from before the record was kept has had all of the file's schedules of that time.
    there = {schedule.slug for schedule in found.schedules}
    new = [] if brought is None else [slug for slug in entry.schedules if slug not in {*brought, *there}]
    for slug in new:
        schedule = entry.schedules[slug]
        timing = {name: schedule[name] for name in {*schedule} & {"cron", "interval", "rrule", "timezone"}}
        created = DeploymentScheduleCreate(
            schedule=construct_schedule(**timing), active=schedule.get("active", True), slug=slug
        )
        client.create_deployment_schedules(found.id, [created])
    return new


def _read_filled(client: SyncPrefectClient) -> dict[str, Any]:
    variable = client.read_variable_by_name(FILLED)
    return dict(variable.value) if variable is not None and isinstance(variable.value, dict) else {}
