"""``skep stack ls``, ``services`` and ``ps``: list services and tasks of stacks, whichever command has deployed these.

The options, and the fields for ``--format``, are the same as in docker's commands.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import click

from skep.api.client.requests import Filters, Requests, filters_of
from skep.cli.apps.service import is_job
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import age
from skep.cli.output import Cell, OutputOptions, Screen, Shown, shows, table
from skep.cli.see.status import COLORS, completion, health_of, worst_health
from skep.cli.visibility import empty_text
from skep.errors import NotFound
from skep.model.service import HealthState
from skep.model.values.stacks import STACK_LABEL

_NO_STACKS = "No stacks. Deploy one with skep stack deploy -c compose.yaml NAME."
_PROBLEMS = ("failed", "rejected", "orphaned")
_MODES = {
    "Global": "global",
    "ReplicatedJob": "replicated job",
    "GlobalJob": "global job",
    "Replicated": "replicated",
}
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show only IDs.")
_filter = click.option(
    "-f", "--filter", "words", multiple=True, metavar="KEY=VALUE", help="Filter as in docker."
)

Objects = Sequence[Mapping[str, Any]]


@click.command()
@shows
@click.pass_obj
def ls(host: HostOptions, output: OutputOptions) -> None:
    """List stacks with their services and tasks.

    \b
    Examples:
      skep stack ls
      skep stack ls --format '{{.Name}} {{.Services}}'
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            filters = {"label": [STACK_LABEL]}
            found = await client.get(
                "/services", filters=filters, timeout_s=RESPONSE_TIMEOUT_S, status="true", health="true"
            )
            empty = "" if found else await empty_text(client, _NO_STACKS, "None of your stacks exists")
        return stacks(found, empty)

    output.show(fetch)


def stacks(services: Objects, empty: str = _NO_STACKS) -> Shown:
    """Return the list of stacks, found by the labels of their services.  ``empty``: the text without stacks."""
    rows: dict[str, dict[str, Any]] = {}
    done: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for service in services:
        name = service["Spec"]["Labels"][STACK_LABEL]
        row = rows.setdefault(
            name, {"Name": name, "Services": 0, "Running": 0, "Desired": 0, "State": HealthState.HEALTHY}
        )
        running, desired = _counts(service)
        row["Services"] += 1
        row["Running"] += running
        row["Desired"] += desired
        completed, total = completion(service)
        done[name] += completed + (0 if is_job(service["Spec"]) else running)
        wanted[name] += total or desired
        row["State"] = worst_health((row["State"], health_of(service).state))
        row["IsHealthy"] = row["State"] is HealthState.HEALTHY
    listed = [rows[name] for name in sorted(rows)]
    cells = [
        (
            str(row["Name"]),
            str(row["Services"]),
            Cell(f"{done[row['Name']]}/{wanted[row['Name']]}", COLORS[row["State"]]),
        )
        for row in listed
    ]
    head = ("NAME", "SERVICES", "TASKS")
    return Shown(data=listed, rows=listed, lines=lambda screen: table(head, cells, screen, empty=empty))


@click.command()
@_quiet
@_filter
@click.argument("name", metavar="STACK")
@shows
@click.pass_obj
def services(
    host: HostOptions, name: str, words: tuple[str, ...], *, quiet: bool, output: OutputOptions
) -> None:
    """List the services of a stack.

    \b
    Examples:
      skep stack services shop
      skep stack services --filter name=shop_web -o json shop
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            return services_listed(await _services(client, name, words), is_quiet=quiet)

    output.show(fetch)


async def _services(client: Requests, stack: str, words: Sequence[str] = ()) -> Objects:
    """Return the services of a stack.  Raises: NotFound: the stack has no services."""
    filters = _filters(stack, words)
    found: Objects = await client.get(
        "/services", filters=filters, timeout_s=RESPONSE_TIMEOUT_S, status="true", health="true"
    )
    if not found and not words:
        raise NotFound(f"stack {stack} has no services. List stacks with skep stack ls.")
    return found


def _filters(stack: str, words: Sequence[str]) -> Filters:
    filters = filters_of(words)
    filters.setdefault("label", []).append(f"{STACK_LABEL}={stack}")
    return filters


def services_listed(found: Objects, *, is_quiet: bool = False) -> Shown:
    """Return the list of a stack's services, by name."""
    ordered = sorted(found, key=lambda service: str(service["Spec"]["Name"]))
    rows = [_service_row(service) for service in ordered]

    def lines(screen: Screen) -> Iterator[str]:
        if is_quiet:
            return iter([row["ID"] for row in rows])
        more = ("ID",) if screen.is_wide else ()
        cells = [
            (
                row["Name"],
                row["Mode"],
                Cell(_replicas(service), COLORS[health_of(service).state]),
                *((row["ID"],) if screen.is_wide else ()),
                row["Ports"],
                row["Image"],
            )
            for row, service in zip(rows, ordered, strict=True)
        ]
        return table(("NAME", "MODE", "REPLICAS", *more, "PORTS", "IMAGE"), cells, screen)

    return Shown(data=rows, rows=rows, lines=lines)


def _service_row(service: Mapping[str, Any]) -> dict[str, str]:
    spec = service["Spec"]
    running, desired = _counts(service)
    mode = spec.get("Mode") or {}
    is_job = any(mode.get(kind) is not None for kind in ("ReplicatedJob", "GlobalJob"))
    return {
        "ID": service["ID"],
        "Name": spec["Name"],
        "Mode": next((word for key, word in _MODES.items() if mode.get(key) is not None), "replicated"),
        "Replicas": _replicas(service) if is_job else f"{running}/{desired}",  # as in docker
        "Image": _image(spec["TaskTemplate"]),
        "Ports": ", ".join(
            f"*:{port['PublishedPort']}->{port['TargetPort']}/{port.get('Protocol', 'tcp')}"
            for port in (service.get("Endpoint") or {}).get("Ports") or ()
            if port.get("PublishedPort")
        ),
    }


def _replicas(service: Mapping[str, Any]) -> str:
    """Return the tasks that run, and those that are complete if the service has such tasks."""
    (running, desired), (completed, total) = _counts(service), completion(service)
    return f"{running}/{desired}" + (f" ({completed}/{total} completed)" if total else "")


def _counts(service: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of running and of desired tasks."""
    status = service.get("ServiceStatus") or {}
    return int(status.get("RunningTasks") or 0), int(status.get("DesiredTasks") or 0)


def _image(template: Mapping[str, Any]) -> str:
    """Return the image without the digest."""
    return str((template.get("ContainerSpec") or {}).get("Image", "")).partition("@")[0]


@click.command()
@_quiet
@_filter
@click.option("--no-trunc", is_flag=True, help="Same as -o wide.")
@click.option("--no-resolve", is_flag=True, help="Show IDs of nodes and services instead of names.")
@click.argument("name", metavar="STACK")
@shows
@click.pass_obj
def ps(
    host: HostOptions,
    name: str,
    words: tuple[str, ...],
    *,
    quiet: bool,
    no_trunc: bool,
    no_resolve: bool,
    output: OutputOptions,
) -> None:
    """List the tasks of a stack.

    \b
    Examples:
      skep stack ps shop
      skep stack ps --filter desired-state=running --format '{{.Name}} {{.Node}}' shop
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            found = await _services(client, name)
            tasks = await client.get("/tasks", filters=_filters(name, words), timeout_s=RESPONSE_TIMEOUT_S)
            nodes = await client.get("/nodes", timeout_s=RESPONSE_TIMEOUT_S)
        hostnames = {one["ID"]: one["Description"].get("Hostname") or one["ID"] for one in nodes}
        names = {one["ID"]: one["Spec"]["Name"] for one in found}
        if no_resolve:
            hostnames, names = {}, {}
        jobs = {one["ID"] for one in found if "ReplicatedJob" in one["Spec"]["Mode"]}
        rows = task_rows(tasks, names, hostnames, time.time(), jobs)
        return Shown(
            data=rows,
            rows=rows,
            lines=lambda screen: _task_lines(rows, screen, is_whole=no_trunc, is_quiet=quiet),
        )

    output.show(fetch)


def task_rows(
    tasks: Objects,
    services: Mapping[str, str],
    hostnames: Mapping[str, str],
    now: float,
    jobs: Collection[str] = (),
) -> list[dict[str, str]]:
    """Return the tasks by name, the latest of a slot first.

    Args:
        services, hostnames: names by id.
        now: seconds since the epoch.
        jobs: ids of the replicated jobs.  Their slots begin at 0, which the API omits.
    """
    rows = []
    for task in sorted(tasks, key=lambda task: str(task["CreatedAt"]), reverse=True):
        status, node = task["Status"], task.get("NodeID", "")
        slot = task.get("Slot", 0 if task["ServiceID"] in jobs else None)
        where = hostnames.get(node, node) or task["ID"] if slot is None else slot
        rows.append(
            {
                "ID": task["ID"],
                "Name": f"{services.get(task['ServiceID'], task['ServiceID'])}.{where}",
                "Image": _image(task["Spec"]),
                "Node": hostnames.get(node, node),
                "DesiredState": task["DesiredState"].capitalize(),
                "CurrentState": f"{status['State'].capitalize()} {age(status['Timestamp'], now)} ago",
                "Error": status.get("Err", ""),
                "Ports": ", ".join(
                    f"*:{port['PublishedPort']}->{port['TargetPort']}/{port.get('Protocol', 'tcp')}"
                    for port in (status.get("PortStatus") or {}).get("Ports") or ()
                ),
            }
        )
    return sorted(rows, key=lambda row: _by_number(row["Name"]))


def _by_number(name: str) -> tuple[str, int, str]:
    service, _, slot = name.rpartition(".")
    return service, int(slot) if slot.isdigit() else 0, slot


def _task_lines(
    rows: Sequence[Mapping[str, str]], screen: Screen, *, is_whole: bool, is_quiet: bool
) -> Iterator[str]:
    if is_quiet:
        return iter([row["ID"] for row in rows])
    is_wide = screen.is_wide or is_whole
    seen: Counter[str] = Counter()
    cells = []
    for row in rows:
        is_earlier = (
            seen[row["Name"]] > 0
        )  # an earlier task of the same slot, which docker marks the same way
        seen[row["Name"]] += 1
        state = row["CurrentState"]
        cells.append(
            (
                f"\\_ {row['Name']}" if is_earlier else row["Name"],
                row["Node"],
                row["DesiredState"],
                Cell(state, "red" if state.partition(" ")[0].lower() in _PROBLEMS else ""),
                *((row["ID"], row["Image"], row["Ports"]) if is_wide else ()),
                row["Error"],
            )
        )
    more = ("ID", "IMAGE", "PORTS") if is_wide else ()
    return table(("NAME", "NODE", "DESIRED STATE", "CURRENT STATE", *more, "ERROR"), cells, screen)
