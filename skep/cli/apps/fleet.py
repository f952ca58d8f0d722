"""``skep fleet``: fleetctl's commands on services, with units as the names of services and their tasks.

A unit ``web@2.service`` is the second task of the service ``web``, and ``web.service`` the service itself.  Units of a
stack have the stack's services, so ``shop_web`` is the unit ``web.service`` of the stack ``shop``.

Source: coreos/fleet, fleetctl/list_units.go, list_machines.go, journal.go.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from skep.cli import options, passthrough
from skep.cli.apps.imports import processes_option, stack_name_of, text_of
from skep.cli.apps.service import turn
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import Cell, OutputOptions, Shown, shows, table
from skep.cli.running import errors_shown, run_requests
from skep.cli.stack.stack import deploy
from skep.errors import InvalidArgument, NotFound
from skep.imports import fleet as fleet_units
from skep.model.task_end import printable
from skep.model.values.stacks import stack_of

_INSTEAD: Final = {
    "cat": "skep service inspect --pretty SERVICE",
    "destroy": "skep service rm SERVICE",
    "fd-forward": "skep port-forward SERVICE PORT",
    "list-unit-files": "skep service ls",
    "load": "skep import fleet FILE...",
    "ssh": "skep exec SERVICE COMMAND",
    "status": "skep explain SERVICE",
    "submit": "skep import fleet FILE...",
    "unload": "skep fleet stop UNIT",
    "verify": "skep stack plan -c FILE",
}
"""Commands for fleetctl's other commands."""
_STATES: Final = {
    "running": ("active", "running"),
    "complete": ("inactive", "dead"),
    "shutdown": ("inactive", "dead"),
    "remove": ("inactive", "dead"),
    "failed": ("failed", "failed"),
    "rejected": ("failed", "failed"),
    "orphaned": ("failed", "failed"),
    "new": ("inactive", "dead"),
    "pending": ("inactive", "dead"),
}
"""Active and sub state of systemd for each state of a task.  All other states are before the start."""
_STARTING: Final = ("activating", "start-pre")
_COLORS: Final = {"active": "green", "failed": "red", "activating": "yellow"}
_ID_CHARACTERS = 8
"""Characters of a machine's id that fleetctl shows."""


class UnitName(NamedTuple):
    """A unit's name in parts.  ``instance`` is None without ``@``, and empty for a template (``web@.service``)."""

    prefix: str
    instance: str | None

    @classmethod
    def parse(cls, text: str) -> "UnitName":
        """Read a unit's name or the path of its file.  ``.service`` may be missing, as in fleetctl."""
        prefix, at, instance = Path(text).name.removesuffix(".service").partition("@")
        return cls(prefix, instance if at else None)


class _Fleet(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if other := _INSTEAD.get(cmd_name):
            raise click.UsageError(f"No such command '{cmd_name}'. Run {other}.", ctx)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Fleet)
def fleet() -> None:
    """Run units with fleetctl's commands.

    A unit is a service, and web@2.service is the second task of the service web.

    \b
    Examples:
      skep fleet start web@1.service web@2.service db.service
      skep fleet list-units
      skep fleet journal -f db.service
    """


_stack = click.option(
    "--stack",
    default="",
    metavar="NAME",
    help="Stack of the units. Default: any, or the name of the directory.",
)
_names = click.argument("names", metavar="UNIT...", nargs=-1, required=True)


@fleet.command("list-units")
@_stack
@shows
@click.pass_obj
def list_units(host: HostOptions, stack: str, output: OutputOptions) -> None:
    """List units with their machines and states.

    \b
    Examples:
      skep fleet list-units
      skep fleet list-units --stack shop
    """

    async def fetch() -> Shown:
        async with host.client() as client:
            services, tasks, nodes = [
                await client.get(path, timeout_s=RESPONSE_TIMEOUT_S)
                for path in ("/services", "/tasks", "/nodes")
            ]
        rows = list(units_in(services, tasks, nodes, stack))
        head = ("UNIT", "MACHINE", "ACTIVE", "SUB")
        cells = [
            (one["Unit"], one["Machine"], Cell(one["Active"], _COLORS.get(one["Active"], "")), one["Sub"])
            for one in rows
        ]
        return Shown(data=rows, rows=rows, lines=lambda screen: table(head, cells, screen))

    output.show(fetch)


@fleet.command("list-machines")
@shows
@click.pass_obj
def list_machines(host: HostOptions, output: OutputOptions) -> None:
    """List machines with their addresses and metadata.

    Shows the nodes that are ready. Metadata are node labels.

    \b
    Example:
      skep fleet list-machines
    """

    async def fetch() -> Shown:
        async with host.client() as client:
            nodes = await client.get("/nodes", timeout_s=RESPONSE_TIMEOUT_S)
        rows = [
            {"Machine": node["ID"], "IP": _address(node), "Metadata": node["Spec"].get("Labels") or {}}
            for node in sorted(nodes, key=lambda one: str(one["ID"]))
            if node["Status"]["State"] == "ready"
        ]
        cells = [
            (f"{one['Machine'][:_ID_CHARACTERS]}...", one["IP"], _joined(one["Metadata"])) for one in rows
        ]
        head = ("MACHINE", "IP", "METADATA")
        return Shown(data=rows, rows=rows, lines=lambda screen: table(head, cells, screen))

    output.show(fetch)


@fleet.command()
@_stack
@processes_option
@options.timeout()
@_names
@click.pass_context
def start(ctx: click.Context, *, names: tuple[str, ...], stack: str, processes: bool, timeout: float) -> None:
    """Start units, from their files if they are new.

    Units that the cluster does not have are read from files and deployed as a stack. Settings that cannot be converted
    are listed on standard error. With --processes, units whose command is not docker run become plain processes, which
    the cluster has to allow.

    \b
    Examples:
      skep fleet start web@1.service web@2.service db.service --stack shop
      skep fleet start db.service
      skep fleet start --processes files.service
    """
    host: HostOptions = ctx.obj

    async def find() -> tuple[list[str], list[Path]]:
        services, tasks = await _services_and_tasks(host)
        new = [name for name in names if not _services_of(name, services, stack)]
        files = [Path(name) for name in new]
        if missing := [str(one) for one in files if not one.is_file()]:
            raise NotFound(
                f"there is neither a unit nor a file {missing[0]}. List units with skep fleet list-units."
            )
        return whole_services([one for one in names if one not in new], services, stack, tasks), files

    known, files = run_requests(find())
    if known:
        run_requests(turn(host, known, "start", timeout_s=timeout, waits=True))
    if not files:
        return
    with errors_shown(), tempfile.TemporaryDirectory() as folder:
        name = stack or stack_name_of(files[0])
        texts = {file.name: text_of(file) for file in files}
        made = fleet_units.imported(texts, name, has_processes=processes)
        for note in made.notes:
            click.echo(printable(str(note)), err=True)
        document = Path(folder) / "compose.yaml"
        document.write_text(made.text)
        deploy.main(["-c", str(document), "--timeout", f"{timeout}s", name], obj=host, standalone_mode=False)


@fleet.command()
@_stack
@options.timeout("2m", "Longest time to wait for tasks to stop.")
@_names
@click.pass_obj
def stop(host: HostOptions, names: tuple[str, ...], stack: str, timeout: float) -> None:
    """Stop units and keep their settings.

    \b
    Example:
      skep fleet stop web@1.service web@2.service
    """

    async def run() -> None:
        services, tasks = await _services_and_tasks(host)
        found = whole_services(names, services, stack, tasks)
        await turn(host, found, "stop", timeout_s=timeout, waits=True)

    run_requests(run())


@fleet.command()
@_stack
@click.option("-f", "--follow", is_flag=True, help="Show new lines as they are written.")
@click.option(
    "--lines", type=click.IntRange(0), default=10, metavar="N", help="Last lines to show. Default: 10."
)
@click.argument("name", metavar="UNIT")
@click.pass_obj
def journal(host: HostOptions, *, name: str, stack: str, follow: bool, lines: int) -> None:
    """Show the logs of a unit.

    \b
    Examples:
      skep fleet journal -f db.service
      skep fleet journal --lines 50 web@2.service
    """

    async def find() -> str:
        async with host.client() as client:
            services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
            found = _one_service(name, services, stack)
            instance = UnitName.parse(name).instance
            if not instance:
                return str(found["ID"])
            tasks = [
                one
                for one in await client.get("/tasks", timeout_s=RESPONSE_TIMEOUT_S)
                if one["ServiceID"] == found["ID"] and str(one.get("Slot")) == instance and one.get("NodeID")
            ]
            if not tasks:
                raise NotFound(f"{name} has no task on a machine. Run skep explain {found['Spec']['Name']}.")
            return str(max(tasks, key=lambda one: str(one["CreatedAt"]))["ID"])

    words = (*(("--follow",) if follow else ()), "--raw", "--tail", str(lines), run_requests(find()))
    passthrough.execute(host, ("service", "logs"), words)


# -- units and services ------------------------------------------------------------------------------------------------


def units_in(
    services: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    nodes: Sequence[Mapping[str, Any]],
    stack: str = "",
) -> Iterator[dict[str, str]]:
    """Yield the units of all services, or of a stack's, sorted by name.  The objects are as the API shows them.

    A replicated service has a unit per slot, with the state of the slot's newest task that should run, and a service
    without tasks has one unit that is inactive.
    """
    machines = {node["ID"]: f"{node['ID'][:_ID_CHARACTERS]}.../{_address(node)}" for node in nodes}
    for service in sorted(services, key=lambda one: str(one["Spec"]["Name"])):
        if stack and _stack_of(service) != stack:
            continue
        newest: dict[tuple[int, str], Mapping[str, Any]] = {}
        for task in _wanted(tasks):
            if task["ServiceID"] == service["ID"]:
                newest[task.get("Slot") or 0, "" if task.get("Slot") else task.get("NodeID", "")] = task
        prefix = _unit_of(service)
        if not newest:
            yield {"Unit": f"{prefix}.service", "Machine": "-", "Active": "inactive", "Sub": "dead"}
        has_instances = len({slot for slot, _ in newest}) > 1
        for (slot, _), task in sorted(newest.items()):
            active, sub = _STATES.get(task["Status"]["State"], _STARTING)
            yield {
                "Unit": f"{prefix}@{slot}.service" if has_instances else f"{prefix}.service",
                "Machine": machines.get(task.get("NodeID", ""), "-"),
                "Active": active,
                "Sub": sub,
            }


def whole_services(
    names: Sequence[str],
    services: Sequence[Mapping[str, Any]],
    stack: str,
    tasks: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Return the names of the services that the units make up.

    Raises:
        NotFound: No service, or several, have the unit's name, or the service has no such instance.
        InvalidArgument: Units are only some of a service's instances, which are its replicas.
    """
    found: dict[str, Mapping[str, Any]] = {}
    instances: dict[str, set[str]] = {}
    for name in names:
        service = _one_service(name, services, stack)
        found[service["Spec"]["Name"]] = service
        named = UnitName.parse(name).instance
        if named:
            _check_instance(name, named, service, tasks)
        instances.setdefault(service["Spec"]["Name"], set()).update({named} if named else {"all"})
    for name, service in found.items():
        replicas = (service["Spec"]["Mode"].get("Replicated") or {}).get("Replicas") or 1
        if "all" not in instances[name] and len(instances[name]) < replicas:
            raise InvalidArgument(
                f"{name} has {replicas} instances. Name all of them, or {_unit_of(service)}@.service, or change their "
                f"number with skep service scale {name}=N."
            )
    return list(found)


def _check_instance(
    name: str, instance: str, service: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]
) -> None:
    """Raise NotFound if the service has no such instance.  After a scaling, the slots may have gaps."""
    replicated, unit = service["Spec"]["Mode"].get("Replicated"), f"{_unit_of(service)}.service"
    if replicated is None:
        raise NotFound(f"there is no unit {name}: {service['Spec']['Name']} has no instances. Use {unit}.")
    slots = {one.get("Slot") for one in _wanted(tasks) if one["ServiceID"] == service["ID"]}
    slots.update(range(1, (replicated.get("Replicas") or 1) + 1))
    if instance not in map(str, slots):
        raise NotFound(f"there is no unit {name}. Use {unit}, or list units with skep fleet list-units.")


async def _services_and_tasks(
    host: HostOptions,
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    async with host.client() as client:
        services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
        return services, await client.get("/tasks", timeout_s=RESPONSE_TIMEOUT_S)


def _wanted(tasks: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the tasks that should run, or should have run to their end, the oldest first."""
    wanted = ("ready", "running", "complete")
    return sorted(
        (one for one in tasks if one["DesiredState"] in wanted), key=lambda one: str(one["CreatedAt"])
    )


def _one_service(name: str, services: Sequence[Mapping[str, Any]], stack: str) -> Mapping[str, Any]:
    found = _services_of(name, services, stack)
    if len(found) > 1:
        stacks = ", ".join(sorted(_stack_of(one) or one["Spec"]["Name"] for one in found))
        raise NotFound(f"several services have the unit {name}: {stacks}. Choose one with --stack.")
    if not found:
        raise NotFound(f"there is no unit {name}. List units with skep fleet list-units.")
    return found[0]


def _services_of(name: str, services: Sequence[Mapping[str, Any]], stack: str) -> list[Mapping[str, Any]]:
    prefix = UnitName.parse(name).prefix
    return [
        one
        for one in services
        if prefix in ((_unit_of(one),) if stack else (_unit_of(one), one["Spec"]["Name"]))
        and (not stack or _stack_of(one) == stack)
    ]


def _unit_of(service: Mapping[str, Any]) -> str:
    """Return the service's name without its stack."""
    stack = _stack_of(service)
    return str(service["Spec"]["Name"]).removeprefix(f"{stack}_" if stack else "")


def _stack_of(service: Mapping[str, Any]) -> str:
    return stack_of(service["Spec"].get("Labels") or {})


def _address(node: Mapping[str, Any]) -> str:
    return str(node["Status"].get("Addr") or "-")


def _joined(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items())) or "-"
