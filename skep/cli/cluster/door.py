"""``skep door``: the HTTP proxies of the cluster, and the routes to services."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_network
from shlex import quote
from typing import Any, Final

import click

from skep.api.client.requests import Requests
from skep.cli import passthrough
from skep.cli.cluster.certificate import (
    acme,
    authority_options,
    authority_problem,
    certificate_rows,
    set_authority,
    taken_authority,
)
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests
from skep.cli.stack.stack_builds import named_by_content
from skep.cli.stack.stack_files import GivenFiles
from skep.errors import NotFound, PermissionDenied, SkepError, Unavailable
from skep.imports.document import escaped
from skep.imports.traefik import converted, is_for_traefik
from skep.model.door.routes import routes_of
from skep.model.door.settings import (
    ACCESS_LOG,
    DIRECTORY,
    DOOR,
    NAME,
    PROXY_PROTOCOL,
    TRUSTED,
    is_door,
)
from skep.model.door.traffic import BOUNDS_MS, UNREADABLE
from skep.model.options.certificates import LETS_ENCRYPT
from skep.model.permissions.access import are_of_stacks
from skep.model.task_end import printable
from skep.model.values.counts import counted

SUBNET: Final = "10.254.0.0/16"
"""Default addresses.  Each service with routes has one, and each of its tasks, so Docker's /24 would soon be full."""
_FIGURES: Final = ("RequestsPerSecond", "ErrorPercent", "LatencyP50", "LatencyP95", "LatencyP99")
_TITLES: Final = ("ROUTE", "SERVICE", "PORT", "TASKS", "STATE", "REQ/S", "ERRORS", "P50", "P95", "P99")
_NOTES_MAX: Final = 3
"""Most problems of routes in ``skep status``, which shows nodes and services below."""
_ERRORS_PERCENT_MAX: Final = 1.0
"""Failed requests of a hundred that are a problem.  The dashboard marks the same ones."""
GRACE_S: Final = 30
"""Seconds in which HAProxy ends open requests when its task is stopped."""
FIRST_CONFIGURATION: Final = (
    "global",
    f"  stats socket {DIRECTORY}/admin.sock mode 600 level admin expose-fd listeners",
    "defaults",
    "  mode http",
    "  timeout client 10s",
    "  timeout connect 1s",
    "  timeout server 10s",
    "frontend http",
    "  bind :80",
    "  http-request return status 503",
)
DOCKERFILE: Final = f"""\
FROM {{base}}
RUN apt-get update && apt-get install --yes --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
RUN mkdir -p {DIRECTORY} && printf '%s\\n' {" ".join(f"'{line}'" for line in FIRST_CONFIGURATION)} \
>{DIRECTORY}/haproxy.cfg
STOPSIGNAL SIGUSR1
CMD ["haproxy", "-W", "-S", "{DIRECTORY}/master.sock", "-f", "{DIRECTORY}/haproxy.cfg"]
"""
"""The image: HAProxy with a configuration that answers 503 until the node has written its own."""
BASE: Final = "debian:12"
"""Debian 12 and later have HAProxy 2.6 or later."""


@click.group()
def door() -> None:
    """Manage the front door, the cluster's HTTP proxies.

    \b
    Examples:
      skep door up
      skep service expose web app.example.com
      skep door status
    """


door.add_command(acme)


@door.command()
@click.option("--image", default="", metavar="IMAGE", help="Image with HAProxy. Default: build one.")
@click.option("--base", default=BASE, show_default=True, metavar="IMAGE", help="Debian image to build from.")
@click.option("--subnet", default=SUBNET, show_default=True, metavar="CIDR", help="Addresses of the network.")
@click.option(
    "--constraint", "constraints", multiple=True, metavar="TEXT", help="Nodes with a proxy. Default: all."
)
@click.option(
    "--trusted-proxies", "trusted", default="", metavar="CIDR,...", help="Keep their X-Forwarded-For."
)
@click.option("--proxy-protocol", is_flag=True, help="Expect the PROXY protocol from clients.")
@click.option("--no-access-log", is_flag=True, help="Do not log requests.")
@click.option(
    "--email", default="", metavar="EMAIL", help="Order certificates with this account (skep door acme)."
)
@authority_options
@click.pass_obj
def up(
    options: HostOptions,
    /,
    image: str,
    base: str,
    subnet: str,
    email: str,
    **wanted: Any,
) -> None:
    """Create or update the front door.

    Builds an image with HAProxy, and runs it on each node at port 80. Run the command again to change options or to
    update HAProxy.

    \b
    Examples:
      skep door up
      skep door up --email ops@example.com --agree-tos
      skep door up --constraint node.labels.edge==true --trusted-proxies 10.0.0.0/8
    """
    try:
        ip_network(subnet)
    except ValueError as error:
        raise click.UsageError(f"--subnet: {error}") from None
    authority = taken_authority(wanted)
    if not email and (authority["agree_tos"] or authority["roots"] or authority["directory"] != LETS_ENCRYPT):
        raise click.UsageError("The account of an authority needs --email EMAIL.")
    run_requests(require_administrator(options))
    if email:  # before the image is built, because the authority may refuse
        run_requests(set_authority(options, email, **authority))
    image = image or _built(_docker(options), base)
    run_requests(_bring_up(options, subnet, image, wanted))


async def require_administrator(options: HostOptions) -> None:
    """Refuse other users before an image is built.  Raises: PermissionDenied; Unavailable: it is not a manager."""
    async with options.requests() as client:
        access = await client.get("/skep/access")
    if "admin" not in access["Roles"]:
        raise PermissionDenied(
            f"{access['Name']} may not create the front door: only administrators may do this. "
            "Run skep user whoami to see your roles."
        )


def _docker(options: HostOptions) -> list[str]:
    return [passthrough.find_docker(), *options.endpoint().docker_flags]


def _built(docker: Sequence[str], base: str) -> str:
    """Build the image, and return its name.  Raises: click.ClickException."""
    command = [*docker, "build", "--tag", f"{NAME}:latest", "-"]
    text = DOCKERFILE.replace("{base}", base)
    done = subprocess.run(command, input=text.encode(), stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        raise click.ClickException(
            f"The image could not be built from {base}. Choose another one with --base, or an image with --image."
        )
    return named_by_content(docker, f"{NAME}:latest")


async def _bring_up(options: HostOptions, subnet: str, image: str, wanted: Mapping[str, Any]) -> None:
    async with options.requests() as client:
        if not [one for one in await client.get("/networks") if is_door(one.get("Labels") or {})]:
            await client.post(
                "/networks/create",
                {
                    "Name": NAME,
                    "Driver": "overlay",
                    "Labels": {DOOR: "true"},
                    "IPAM": {"Driver": "default", "Config": [{"Subnet": subnet}]},
                },
            )
        spec = service_spec(image, **wanted)
        try:
            found = await client.get(f"/services/{NAME}")
        except NotFound:
            await client.post("/services/create", spec)
            click.echo("front door created")
            return
        version = str(found["Version"]["Index"])
        await client.post(f"/services/{found['ID']}/update", spec, version=version)
        click.echo("front door updated")


def service_spec(
    image: str, *, constraints: Sequence[str], trusted: str, proxy_protocol: bool, no_access_log: bool
) -> dict[str, Any]:
    """Return the spec of the proxies, in the API's form."""
    labels = {DOOR: "true"}
    if trusted:
        labels[TRUSTED] = trusted
    if proxy_protocol:
        labels[PROXY_PROTOCOL] = "true"
    if no_access_log:
        labels[ACCESS_LOG] = "false"
    return {
        "Name": NAME,
        "Labels": labels,
        "Mode": {"Global": {}},
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": image,
                "StopGracePeriod": GRACE_S * 1_000_000_000,
                "Mounts": [{"Type": "volume", "Source": NAME, "Target": DIRECTORY}],
            },
            "Networks": [{"Target": NAME}],
            "Placement": {"Constraints": [*constraints]},
        },
        "EndpointSpec": {
            "Ports": [
                {"Protocol": "tcp", "TargetPort": port, "PublishedPort": port, "PublishMode": "host"}
                for port in (80, 443)
            ]
        },
    }


@door.command()
@click.pass_obj
def down(options: HostOptions) -> None:
    """Remove the front door.

    Routes stay as labels of their services, and work again after skep door up. The network stays while services with
    routes use it.

    \b
    Example:
      skep door down
    """

    async def remove() -> None:
        async with options.requests() as client:
            with suppress(NotFound):
                await client.delete(f"/services/{NAME}")

    run_requests(remove())
    click.echo("front door removed")


@door.command()
@shows
@click.pass_obj
def status(options: HostOptions, output: OutputOptions) -> None:
    """Show routes and certificates, and why they do not work.

    Only administrators see certificates.

    \b
    Example:
      skep door status
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            routes = await client.get("/skep/door", timeout_s=RESPONSE_TIMEOUT_S)
            return shown_routes(routes, await proxies_sentence(client), await certificates_of(client))

    output.show(fetch)


@door.command()
@click.option(
    "-c",
    "--compose-file",
    "files",
    multiple=True,
    metavar="FILE",
    help="Compose file to read instead of the cluster. Repeat to override.",
)
@shows
@click.pass_obj
def traefik(options: HostOptions, output: OutputOptions, files: tuple[str, ...]) -> None:
    """Show routes for services with labels of Traefik.

    Shows the labels of the front door that have the same effect, and the labels of Traefik that have none. Nothing is
    changed.

    \b
    Examples:
      skep door traefik
      skep door traefik -c compose.yaml
    """

    async def fetch() -> Shown:
        if files:
            return shown_conversions(labels_in(files), is_file=True)
        async with options.requests() as client:
            services = await client.get("/services")
        labels = {str(one["Spec"]["Name"]): one["Spec"].get("Labels") or {} for one in services}
        return shown_conversions(labels)

    output.show(fetch)


def labels_in(files: tuple[str, ...]) -> dict[str, Mapping[str, str]]:
    """Return the labels of services in Compose files.  Raises: FileProblems, InvalidArgument."""
    given = GivenFiles(files=files, env_files=(), profiles=(), directory=None, name="traefik")
    stack, _ = given.read()
    found = {}
    for name, one in stack.services.items():
        container = one.spec.task_template.container_spec
        # Without Swarm, Traefik reads the labels of containers.
        found[name] = (
            one.spec.labels if is_for_traefik(one.spec.labels) or container is None else container.labels
        )
    return found


def shown_conversions(services: Mapping[str, Mapping[str, str]], *, is_file: bool = False) -> Shown:
    """Return what the front door can do of the labels for Traefik.

    Args:
        services: Labels by the name of the service.
        is_file: Whether the services are in a file, where the reader adds the labels.
    """
    found = converted(services)

    def lines(_: Screen) -> Iterator[str]:
        if not found:
            yield "No service has labels of Traefik."
        for name, one in found.items():
            yield printable(f"{name}:" if one.labels else f"{name}: no route")
            for label, value in one.labels.items():
                yield printable(f"  {label}={escaped(value) if is_file else value}")
            for title, notes in (("not converted", one.refused), ("different", one.differences)):
                for note in notes:
                    yield printable(f"  {title}: {note}")
            if one.labels and not is_file:
                added = " ".join(
                    f"--label-add {quote(f'{label}={value}')}" for label, value in one.labels.items()
                )
                yield printable(f"  docker service update --force {added} {name}")
        routes = [route for one in found.values() for route in routes_of(one.labels)]
        if is_file and routes:
            yield "Write these labels below deploy.labels of each service."
        if any(route.options.tls != "off" for route in routes):
            yield "Hosts are served without TLS until they have a certificate: skep door acme."

    rows = [
        {
            "Service": name,
            "Labels": dict(one.labels),
            "NotConverted": [{"Label": note.path, "Reason": note.text} for note in one.refused],
            "Different": [{"Label": note.path, "Reason": note.text} for note in one.differences],
        }
        for name, one in found.items()
    ]
    return Shown(data=rows, rows=rows, lines=lines)


async def traffic_of(client: Requests) -> Sequence[Mapping[str, Any]]:
    """Return the routes with their recent requests, or nothing if the manager cannot list them."""
    try:
        found: Sequence[Mapping[str, Any]] = await client.get("/skep/door", timeout_s=RESPONSE_TIMEOUT_S)
    except SkepError:  # also a manager of an earlier version
        return ()
    return found


def door_problems(routes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the problems of routes as sentences."""
    found = []
    for one in routes:
        if problem := one.get("Problem"):
            route = f"Route {one['Route']} of" if one["Route"] != UNREADABLE else "A route of"
            found.append(f"{route} {one['Service']} does not work: {problem}")
        elif (one.get("ErrorPercent") or 0) > _ERRORS_PERCENT_MAX:
            found.append(
                f"Route {one['Route']} of {one['Service']}: {one['ErrorPercent']:.3g}% of the requests in the last "
                "minute failed"
            )
    return found


def route_notes(routes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the first problems of routes, and the number of further ones."""
    found = door_problems(routes)
    more = [f"and {len(found) - _NOTES_MAX} more routes: skep doctor door"] if len(found) > _NOTES_MAX else []
    return [*found[:_NOTES_MAX], *more]


def traffic_cells(one: Mapping[str, Any] | None) -> tuple[str, str, str, str, str]:
    """Return requests per second, failed ones and three latencies of a route as short texts."""
    if one is None or one.get("RequestsPerSecond") is None:
        return "-", "-", "-", "-", "-"
    return (
        f"{one['RequestsPerSecond']:.4g}",
        f"{one['ErrorPercent']:.3g}%",
        _milliseconds(one.get("LatencyP50")),
        _milliseconds(one.get("LatencyP95")),
        _milliseconds(one.get("LatencyP99")),
    )


def _milliseconds(value: float | None) -> str:
    """Return a latency.  The last bucket of the counters has no upper bound."""
    if value is None:
        return "-"
    if value >= BOUNDS_MS[-1]:
        return f">{BOUNDS_MS[-1] / 1000:g}s"
    return f"{value:.3g}ms" if value < 1000 else f"{value / 1000:.3g}s"


async def certificates_of(client: Requests) -> Mapping[str, Any] | None:
    """Return the certificates, or None for users who may not list them."""
    try:
        return dict(await client.get("/skep/certificates"))
    except PermissionDenied:
        return None


async def proxies_sentence(client: Requests) -> str:
    """Return the sentence about the front door's tasks.  Users of a stack do not see them."""
    proxies = await client.get("/services", filters={"label": [f"{DOOR}=true"]})
    if proxies:
        wanted = {"service": [one["ID"] for one in proxies], "desired-state": ["running"]}
        tasks = await client.get("/tasks", filters=wanted)
        count = sum(one["Status"]["State"] == "running" for one in tasks)
        if not count:
            return f"No proxy runs. Run skep explain {min(str(one['Spec']['Name']) for one in proxies)}."
        return f"{counted(count, 'proxy runs', 'proxies run')}."
    with suppress(Unavailable):  # workers answer as to a viewer of all stacks, and know no users
        if are_of_stacks((await client.get("/skep/access"))["Roles"]):
            return "The front door belongs to no stack, so you see only the routes of your stacks."
    return "There is no front door. Create it with skep door up."


def shown_routes(
    routes: Sequence[Mapping[str, Any]], proxies: str, certificates: Mapping[str, Any] | None = None
) -> Shown:
    """Return the lists of routes and certificates.  Lines below each list say what does not work.

    Args:
        routes: Response of ``GET /skep/door``.
        proxies: Sentence about the front door's tasks.
        certificates: Response of ``GET /skep/certificates``, or None to leave them out.
    """
    rows = [_row(one) for one in sorted(routes, key=lambda one: one["Service"])]

    def lines(screen: Screen) -> Iterator[str]:
        yield proxies
        cells = [
            (
                *(printable(str(row[name])) for name in ("Route", "Service", "Port", "Tasks", "State")),
                *traffic_cells(row),
            )
            for row in rows
        ]
        empty = "No routes. Add one with skep service expose NAME HOST."
        yield from table(_TITLES, cells, screen, empty=empty)
        for row in rows:
            if row["Problem"]:
                yield printable(f"{row['Route']}: {row['Problem']}")
        if certificates is not None and certificates["Certificates"]:
            yield ""
            yield from _certificate_lines(certificates, screen)

    data = {"Routes": rows, "Certificates": certificates["Certificates"] if certificates is not None else []}
    return Shown(data=data, rows=rows, lines=lines)


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: one.get(name, "") for name in ("Route", "Service", "Port", "Tasks", "State", "Problem")}
    return row | {name: one.get(name) for name in _FIGURES}


def _certificate_lines(found: Mapping[str, Any], screen: Screen) -> Iterator[str]:
    rows = certificate_rows(found)
    cells = [
        tuple(printable(row[name]) for name in ("Name", "From", "Expires", "State", "NextAttempt"))
        for row in rows
    ]
    yield from table(("CERTIFICATE", "FROM", "EXPIRES", "STATE", "NEXT ATTEMPT"), cells, screen)
    for row in rows:
        if row["Error"] != "-":
            yield printable(f"{row['Name']}: {row['Error']}")
    yield from authority_problem(found.get("Authority"))
