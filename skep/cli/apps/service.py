"""``skep service``: docker's commands, and wait, stop, start, history, diff and rollback."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal
from urllib.parse import quote

import click
import msgspec

from skep.api.client.requests import Requests
from skep.api.client.updates import update
from skep.cli import options, passthrough
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import age
from skep.cli.output import OutputOptions, Shown, shows, table
from skep.cli.running import do_each, run_requests
from skep.cli.stack.stack_screens import ProgressPrinter, differing, max_failures
from skep.errors import FailedPrecondition, InvalidArgument, NotFound
from skep.model.door.routes import HTTP, has_routes, is_http_label, label_class, routes_of
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.schedules import CRON, stop_labels, without_stop
from skep.model.service import ServiceSpec
from skep.model.values.unknown import leniently
from skep.stack.progress import FAILURES_MAX
from skep.stack.revisions import numbered, pair_of
from skep.stack.waiting import wait_for


@click.group(cls=passthrough.WithDockers)
def service() -> None:
    """Manage services.

    \b
    Examples:
      skep service ls
      skep service wait web
      skep service stop web
    """


@service.command()
@click.argument("name", metavar="SERVICE")
@shows
@click.pass_obj
def history(host: HostOptions, name: str, output: OutputOptions) -> None:
    """List the revisions of a service.

    Shows the author, the time and the changes of each spec. The last ten revisions are kept until you remove the
    service.

    \b
    Example:
      skep service history web
    """

    async def fetch() -> Shown:
        found = [*(await _revisions(host, name)).values()]
        rows = [{field: one[field] for field in ("Number", "By", "At", "Changes")} for one in found]
        now = time.time()
        cells = [
            (
                f"{one['Number']}{' (now)' if one is found[-1] else ''}",
                f"{age(one['At'], now)} ago" if one["At"] else "",
                one["By"],
                "; ".join(one["Changes"]),
            )
            for one in found
        ]
        head = ("REVISION", "WRITTEN", "BY", "CHANGES")
        return Shown(data=rows, rows=rows, lines=lambda screen: table(head, cells, screen))

    output.show(fetch)


@service.command()
@click.argument("name", metavar="SERVICE")
@options.two_revisions
@shows
@click.pass_obj
def diff(host: HostOptions, name: str, first: int | None, second: int | None, output: OutputOptions) -> None:
    """Compare two revisions of a service.

    Without numbers, compares the last two revisions. With one number, compares it with the last revision.

    \b
    Examples:
      skep service diff web
      skep service diff web 2 3
    """

    async def fetch() -> Shown:
        pair = pair_of(name, await _revisions(host, name), first, second, kind="service")
        specs = (leniently(msgspec.json.encode(one["Spec"]), ServiceSpec) for one in pair)
        return differing(*specs)

    output.show(fetch)


@service.command()
@click.option(
    "--to", type=click.IntRange(1), metavar="N", help="Revision. Default: the spec before the last change."
)
@options.timeout()
@options.detach
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.argument("name", metavar="SERVICE")
@click.pass_obj
def rollback(
    host: HostOptions, *, to: int | None, timeout: float, detach: bool, quiet: bool, name: str
) -> None:
    """Return a service to an earlier spec and wait until it runs.

    The rollback to a numbered revision is an update. It needs the rights for that spec and becomes a new revision.
    The number of replicas that autoscaling chose is kept.

    \b
    Examples:
      skep service rollback web
      skep service rollback --to 3 web
    """

    async def run() -> bool:
        """Return whether the service is a job with a schedule, whose next run has the spec."""
        async with host.requests() as client:
            if to is None:
                await return_to_previous(client, name)
            else:
                wanted = numbered(await _revisions(host, name), to)["Spec"]

                def changed(found: Mapping[str, Any]) -> Any:
                    return returned_to(wanted, found["Spec"])

                await update(client, "services", name, changed, timeout_s=RESPONSE_TIMEOUT_S)
            found = await client.get(f"/services/{quote(name, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)
            return CRON in (found["Spec"].get("Labels") or {})

    if run_requests(run()):
        click.echo(f"{name}: its next run has this spec", err=True)
    elif not detach:
        run_requests(_wait(host, (name,), timeout, FAILURES_MAX, is_quiet=quiet))


async def return_to_previous(client: Requests, name: str) -> None:
    """Swap the current and the previous spec of a service.

    Raises: FailedPrecondition: the leader, or another user, has rolled back or updated the service meanwhile.  A second
        swap would return to the spec that it was rolled back from.
    """
    seen: list[Any] = []

    def changed(found: Mapping[str, Any]) -> Any:
        seen.append(found.get("PreviousSpec"))
        if seen[-1] != seen[0]:
            raise FailedPrecondition(
                f"{name} was rolled back or updated meanwhile, and was not changed again. Run skep service diff {name}."
            )
        return found["Spec"]

    query = {"rollback": "previous"}
    await update(client, "services", name, changed, timeout_s=RESPONSE_TIMEOUT_S, query=query)


def returned_to(wanted: Mapping[str, Any], present: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the earlier spec ``wanted`` with what belongs to the service now: a stop, the autoscaled number, and the
    number of forced updates, which would replace tasks again or start a run of a job.

    Both specs are as the API shows them, because they may have fields of a newer version.
    """
    before, now = wanted.get("Labels") or {}, present.get("Labels") or {}
    labels = {**without_stop(before), **stop_labels(now)}
    mode = present["Mode"] if AUTOSCALE in before and AUTOSCALE in now else wanted["Mode"]
    template = dict(wanted.get("TaskTemplate") or {})
    template["ForceUpdate"] = (present.get("TaskTemplate") or {}).get("ForceUpdate", 0)
    return {**wanted, "Labels": labels, "Mode": mode, "TaskTemplate": template}


async def _revisions(host: HostOptions, name: str) -> Mapping[int, Mapping[str, Any]]:
    """Return the revisions of a service by number, the present one last."""
    async with host.client() as client:
        found = await client.get(
            f"/skep/services/{quote(name, safe='')}/revisions", timeout_s=RESPONSE_TIMEOUT_S
        )
        return {one["Number"]: one for one in found}


@service.command()
@options.timeout()
@max_failures
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def wait(host: HostOptions, names: tuple[str, ...], timeout: float, max_failures: int) -> None:
    """Wait until services are in their desired state.

    Returns when all tasks run, or the job is complete.

    Exit code 1: an update was paused or rolled back, tasks keep failing, or the timeout is over. The error has the
    reason.

    \b
    Example:
      docker service update --detach --image web:2 web && skep service wait web
    """
    run_requests(_wait(host, names, timeout, max_failures))


@service.command()
@options.timeout("2m", "Longest time to wait for tasks to stop.")
@options.detach
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def stop(host: HostOptions, names: tuple[str, ...], timeout: float, detach: bool) -> None:
    """Stop services and keep their settings.

    All tasks stop. The number of replicas, ports, addresses and data stay. Updates and rollbacks do not start a stopped
    service. For a job with a schedule, no new run starts.

    \b
    Example:
      skep service stop web db
    """
    run_requests(turn(host, names, "stop", timeout_s=timeout, waits=not detach))


@service.command()
@options.timeout()
@options.detach
@click.argument("names", metavar="SERVICE...", nargs=-1, required=True)
@click.pass_obj
def start(host: HostOptions, names: tuple[str, ...], timeout: float, detach: bool) -> None:
    """Start stopped services and wait until they run.

    \b
    Example:
      skep service start db web
    """
    run_requests(turn(host, names, "start", timeout_s=timeout, waits=not detach))


@service.command()
@click.option(
    "--port", type=click.IntRange(1, 65535), metavar="N", help="Port of the containers. Default: 80."
)
@options.timeout()
@options.detach
@click.argument("name", metavar="SERVICE")
@click.argument("address", metavar="HOST[/PATH]")
@click.pass_obj
def expose(
    host: HostOptions, *, name: str, address: str, port: int | None, timeout: float, detach: bool
) -> None:
    """Expose a service at an HTTP route of the front door.

    Replaces the tasks one after the other if they are not on the front door's network yet.

    \b
    Examples:
      skep service expose web app.example.com
      skep service expose --port 8080 api app.example.com/api
    """

    async def run() -> None:
        async with host.requests() as client:
            await update(
                client,
                "services",
                quote(name, safe=""),
                lambda found: exposed(found["Spec"], address, port),
                timeout_s=RESPONSE_TIMEOUT_S,
            )

    run_requests(run())
    if not detach:
        run_requests(_wait(host, (name,), timeout, FAILURES_MAX))
    click.echo(f"{name} is exposed at {address}", err=True)


def exposed(spec: Mapping[str, Any], address: str, port: int | None) -> Mapping[str, Any]:
    """Return the spec with one more route.  The first one also replaces the tasks, which get the network with it.

    Raises: InvalidArgument: another route of the service would lead to another port.
    """
    labels = dict(spec.get("Labels") or {})
    before = {one.address: one.options.port for one in routes_of(labels)}
    template = spec["TaskTemplate"]
    if not has_routes(labels):
        template = {**template, "ForceUpdate": template.get("ForceUpdate", 0) + 1}
    routes = [one for one in labels.get(HTTP, "").split(",") if one]
    labels[HTTP] = ",".join(dict.fromkeys((*routes, address)))
    if port is not None:
        labels[f"{HTTP}.port"] = str(port)
    for one in routes_of(labels):
        if before.get(one.address, one.options.port) != one.options.port and one.address != address.lower():
            raise InvalidArgument(
                f"the route {one.address} leads to port {before[one.address]}, and would lead to {port}. Run docker "
                f"service update --label-add {HTTP}.NAME={address} --label-add {HTTP}.NAME.port={port} {spec['Name']}."
            )
    return {**spec, "Labels": labels, "TaskTemplate": template}


@service.command()
@click.argument("name", metavar="SERVICE")
@click.argument("address", metavar="[HOST[/PATH]]", default="")
@click.pass_obj
def hide(host: HostOptions, name: str, address: str) -> None:
    """Hide a service from the front door.

    Removes one route, or all routes with their options.

    \b
    Examples:
      skep service hide web app.example.com
      skep service hide web
    """

    async def run() -> None:
        async with host.requests() as client:
            await update(
                client,
                "services",
                quote(name, safe=""),
                lambda found: hidden(found["Spec"], address),
                timeout_s=RESPONSE_TIMEOUT_S,
            )

    run_requests(run())
    click.echo(f"{name} is hidden", err=True)


def hidden(spec: Mapping[str, Any], address: str) -> Mapping[str, Any]:
    """Return the spec without the route, or without all routes.  Raises: NotFound: it has no such route."""
    labels = dict(spec.get("Labels") or {})
    routes = [one.strip() for one in labels.get(HTTP, "").split(",")]
    kept = [
        one for one in routes if one and address and one.rstrip("/").lower() != address.rstrip("/").lower()
    ]
    if address and kept == [one for one in routes if one]:
        raise NotFound(
            f"the label {HTTP} of the service has no route {address}. Run skep door status to see its routes"
        )
    if kept or (address and any(label_class(one) == f"{HTTP}.NAME" for one in labels)):
        labels = {one: value for one, value in labels.items() if one != HTTP}
        if kept:
            labels[HTTP] = ",".join(kept)
    else:
        labels = {one: value for one, value in labels.items() if not is_http_label(one)}
    return {**spec, "Labels": labels}


async def turn(
    host: HostOptions, names: Sequence[str], verb: Literal["stop", "start"], *, timeout_s: float, waits: bool
) -> None:
    """Stop or start services, and wait until they have done so.  All of them are requested before the wait.

    Raises:
        Unavailable: Not all were done in ``timeout_s`` seconds.
        SkepError: A request was refused.
    """
    waited = []
    async with host.client() as client:
        for name in names:  # Before the first change, because a mistyped name should change nothing.
            await client.get(f"/services/{quote(name, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)

        async def request(name: str) -> None:
            found = await client.post(
                f"/skep/services/{quote(name, safe='')}/{verb}", timeout_s=RESPONSE_TIMEOUT_S
            )
            if is_job(found["Spec"]):
                has_schedule = CRON in (found["Spec"].get("Labels") or {})
                text = _SCHEDULES[verb] if has_schedule else _WITHOUT_SCHEDULE
                click.echo(f"{found['Spec']['Name']}: {text}", err=True)
            else:
                waited.append(name)

        await do_each(names, request)
    if waits and waited:
        await _wait(host, tuple(waited), timeout_s, FAILURES_MAX)


_SCHEDULES: Mapping[str, str] = {
    "stop": "no new run starts until the job is started again",
    "start": "its schedule counts again",
}
_WITHOUT_SCHEDULE: Final = "a job without a schedule was not stopped (skep job run starts a new run)"


def is_job(spec: Mapping[str, Any]) -> bool:
    """Return whether the spec of a service, as the API shows it, is a job's."""
    return not {"ReplicatedJob", "GlobalJob"}.isdisjoint(spec.get("Mode") or {})


async def _wait(
    host: HostOptions, names: tuple[str, ...], timeout_s: float, failures_max: int, *, is_quiet: bool = False
) -> None:
    show = (lambda *_: None) if is_quiet else ProgressPrinter().show
    async with host.client() as client:
        await wait_for(client, names, show, timeout_s, failures_max)
