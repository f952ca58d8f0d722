"""``skep catalog``, ``skep balance`` and ``skep register``: where services are reached, for other programs.

The commands run until Ctrl+C or SIGTERM, with the rights of the user that started them.
"""

import asyncio
import importlib.util
import re
import signal
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import click
import msgspec

from skep.aio.clock import SystemClock
from skep.cli import options
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests, say
from skep.cli.visibility import empty_text
from skep.model.catalog import TTL_S_MAX, TTL_S_MIN, CatalogAnswer, ServiceCatalog, ServiceRegistration
from skep.model.networks.addresses import PORT_MAX, is_address, joined
from skep.model.task_end import printable
from skep.model.values.unknown import leniently

if TYPE_CHECKING:
    from skep.catalog.following import KnownCatalog

LOOPBACK = "127.0.0.1"
_NONE_REACHED = "No service is reached anywhere."

_INSTANCE = re.compile(r"[^A-Za-z0-9-]+")


@click.group()
def catalog() -> None:
    """Show where services are reached.

    The catalog has the services of the cluster with their nodes and ports, and the ones of skep register.

    \b
    Examples:
      skep catalog ls
      skep catalog serve --consul 8500 --dns 8600
    """


@catalog.command("ls")
@shows
@click.pass_obj
def list_catalog(host: HostOptions, output: OutputOptions) -> None:
    """List services with their addresses.

    A service with published ports is reached at its nodes, and another one at its tasks' overlay addresses.

    \b
    Example:
      skep catalog ls
    """

    async def fetch() -> Shown:
        async with host.requests() as client:
            found = await client.get("/skep/catalog", timeout_s=RESPONSE_TIMEOUT_S)
            catalog = leniently(msgspec.json.encode(found), CatalogAnswer).catalog or ServiceCatalog()
            empty = (
                ""
                if catalog.services
                else await empty_text(client, _NONE_REACHED, "No services of your stacks")
            )
        return shown_catalog(catalog, empty)

    output.show(fetch)


def shown_catalog(found: ServiceCatalog, empty: str = _NONE_REACHED) -> Shown:
    """Return a line for each address of each service.  ``empty``: the text without one."""
    rows = [
        {
            "Service": service.name,
            "Address": joined(one.address, one.port) if one.port else one.address,
            "Node": "" if one.is_registered else one.node,
            "Instance": one.id,
            "Tags": ", ".join(one.tags),
        }
        for service in found.services
        for one in service.instances
    ]

    def lines(screen: Screen) -> Iterator[str]:
        cells = [
            tuple(printable(row[name]) for name in ("Service", "Address", "Node", "Instance")) for row in rows
        ]
        yield from table(("SERVICE", "ADDRESS", "NODE", "INSTANCE"), cells, screen, empty=empty)

    return Shown(data=msgspec.to_builtins(found), rows=rows, lines=lines)


@catalog.command()
@click.option("--consul", default="", metavar="[ADDRESS:]PORT", help="Serve Consul's HTTP interface.")
@click.option("--dns", default="", metavar="[ADDRESS:]PORT", help="Serve NAME.service.consul over DNS.")
@click.option("--etcd", default="", metavar="[ADDRESS:]PORT", help="Serve etcd's v3 interface.")
@click.pass_obj
def serve(host: HostOptions, consul: str, dns: str, etcd: str) -> None:
    """Serve the catalog to programs that know Consul or etcd.

    All interfaces are read-only, and listen on 127.0.0.1 unless you specify ADDRESS. Whoever reaches them reads what
    you may read.

    While no manager responds, they serve the last known catalog.

    \b
    Examples:
      skep catalog serve --consul 8500 --dns 8600
      skep catalog serve --etcd 10.0.0.1:2379
    """
    places = {
        name: _place(name, word) for name, word in (("consul", consul), ("dns", dns), ("etcd", etcd)) if word
    }
    if not places:
        raise click.UsageError("Use at least one of --consul, --dns and --etcd.")
    if "etcd" in places and importlib.util.find_spec("hpack") is None:
        raise click.ClickException(
            "--etcd needs the Python packages of a node, which this installation does not have. "
            "Run pip install 'skep-orchestrator[server]'."
        )
    run_requests(_until_stopped(_serve(host, places)))


def _place(option: str, word: str) -> tuple[str, int]:
    """Return address and port of an option.  Raises: click.UsageError."""
    address, _, digits = word.rpartition(":")
    address = address.strip("[]") or LOOPBACK
    is_port = digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= PORT_MAX
    if not is_port or not is_address(address):
        raise click.UsageError(f"--{option}: expected [ADDRESS:]PORT with an IP address, not {word!r}.")
    return address, int(digits)


async def _serve(host: HostOptions, places: Mapping[str, tuple[str, int]]) -> None:
    from skep.catalog.following import CatalogReader, first_index_at

    clock = SystemClock()
    first_index = first_index_at(clock.now_ns())
    async with host.requests() as client, AsyncExitStack() as stack:
        reader = CatalogReader(client, clock, say, first_index=first_index)
        known = await stack.enter_async_context(reader.following())
        for name, (address, port) in places.items():
            bound = await stack.enter_async_context(_served(name, known, address, port))
            click.echo(f"{name} at {joined(address, bound)}")
            if not ip_address(address).is_loopback:
                say(f"{joined(address, bound)} is open to every machine that reaches it.")
        await asyncio.Event().wait()


def _served(name: str, known: "KnownCatalog", address: str, port: int) -> AbstractAsyncContextManager[int]:
    """Return a block in which an interface is served, which yields the port."""
    match name:
        case "consul":
            from skep.catalog.consul import ConsulView, serving_consul

            return serving_consul(ConsulView(known), address, port)
        case "dns":
            from skep.catalog.names import DnsView, serving_names, weighted_shuffle

            return serving_names(DnsView(known, weighted_shuffle(Random().random)), address, port)
        case _:
            from skep.catalog.etcd import EtcdView, serving_keys

            return serving_keys(EtcdView(known), address, port)


@click.command()
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default="/etc/haproxy/haproxy.cfg",
    show_default=True,
    metavar="FILE",
    help="Configuration to write.",
)
@click.option(
    "--socket",
    default="/run/haproxy/admin.sock",
    show_default=True,
    metavar="FILE",
    help="HAProxy's socket, by which a reload keeps the ports.",
)
@click.option(
    "--user", default="haproxy", show_default=True, metavar="NAME", help="User of HAProxy's workers."
)
@click.option(
    "--reload",
    default="systemctl reload-or-restart haproxy",
    show_default=True,
    metavar="COMMAND",
    help="Command that reloads HAProxy.",
)
@click.argument("listeners", metavar="SERVICE=[ADDRESS:]PORT[/http]...", nargs=-1, required=True)
@click.pass_obj
def balance(host: HostOptions, /, listeners: Sequence[str], path: Path, **places: str) -> None:
    """Balance this machine's connections over services.

    Writes HAProxy's configuration and reloads it whenever the catalog changes. Open connections continue.

    Programs on this machine reach each SERVICE at ADDRESS:PORT, by default on 127.0.0.1. While all managers are away,
    HAProxy keeps the last known servers, and checks them itself.

    \b
    Examples:
      skep balance web=8080/http db=5432
      skep balance web=0.0.0.0:80/http --file /etc/haproxy/skep.cfg --reload 'systemctl reload haproxy'
    """
    from skep.catalog.balancing import Balancer, HaproxyFiles
    from skep.catalog.following import CatalogReader
    from skep.catalog.haproxy import BalancedPort

    async def run() -> None:
        clock = SystemClock()
        chosen = [BalancedPort.of(word) for word in listeners]
        balancer = Balancer(chosen, HaproxyFiles(file=path, **places), clock, say)
        balancer.require_own_file()
        async with host.requests() as client, asyncio.TaskGroup() as group:
            reader = CatalogReader(client, clock, say)
            group.create_task(reader.run(), name="catalog")
            group.create_task(balancer.run(reader.known), name="balancer")

    run_requests(_until_stopped(run()))


def _address(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not is_address(value):
        raise click.BadParameter(f"{value!r} is not an IP address. Use one that other machines reach.")
    return value


@click.command()
@click.option(
    "--address",
    required=True,
    callback=_address,
    metavar="IP",
    help="Address at which others reach the service.",
)
@click.option("--port", required=True, type=click.IntRange(1, 65535), metavar="PORT", help="Its port.")
@click.option(
    "--instance", default="", metavar="NAME", help="Name of this instance. Default: from the address."
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag for readers. Repeat for several.")
@click.option("--stack", default="", metavar="STACK", help="Stack whose users see and change it.")
@click.option("--http", "http", default="", metavar="PATH", help="Check by HTTP instead of a connection.")
@click.option(
    "--interval",
    type=options.Duration(least_s=0.1),
    default="2s",
    show_default=True,
    metavar="DURATION",
    help="Time between two checks.",
)
@click.option(
    "--timeout",
    type=options.Duration(least_s=0.1),
    default="2s",
    show_default=True,
    metavar="DURATION",
    help="Longest time of a check.",
)
@click.option(
    "--rise",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="NUMBER",
    help="Passes in a row until it is added.",
)
@click.option(
    "--fall",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="NUMBER",
    help="Failures in a row until it is removed.",
)
@click.option(
    "--ttl",
    type=options.Duration(least_s=TTL_S_MIN, most_s=TTL_S_MAX),
    default="30s",
    show_default=True,
    metavar="DURATION",
    help="Lease, after which a silent machine is removed.",
)
@click.argument("service")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def register(host: HostOptions, /, service: str, command: Sequence[str], **wanted: Any) -> None:
    """Register a service of this machine in the catalog.

    Use it on machines outside of the cluster. The service is in the catalog while its check passes. The check is a
    connection to its port, an HTTP request with --http, or COMMAND, which has to exit with 0.

    If this machine is lost, the registration ends with its lease.

    \b
    Examples:
      skep register postgres --address 192.0.2.7 --port 5432
      skep register api --address 192.0.2.7 --port 8080 --http /health
      skep register postgres --address 192.0.2.7 --port 5432 -- pg_isready --quiet
    """
    if command and wanted["http"]:
        raise click.UsageError("Use either --http or COMMAND.")
    run_requests(_until_stopped(_register(host, service, command, **wanted)))


async def _register(
    host: HostOptions,
    service: str,
    command: Sequence[str],
    *,
    http: str,
    interval: float,
    timeout: float,
    rise: int,
    fall: int,
    ttl: float,
    **wanted: Any,
) -> None:
    from skep.catalog.registering import CheckRules, ServiceRegistrar, command_check, http_check, tcp_check

    address, port = wanted["address"], wanted["port"]
    instance = wanted.pop("instance") or _INSTANCE.sub("-", f"{address}-{port}").strip("-")
    registration = ServiceRegistration(service=service, instance=instance, ttl=round(ttl), **wanted)
    if command:
        check = command_check(command, timeout)
    elif http:
        check = http_check(address, port, http)
    else:
        check = tcp_check(address, port)
    rules = CheckRules(interval_s=interval, timeout_s=timeout, rise=rise, fall=fall)
    async with host.requests() as client:
        await ServiceRegistrar(client, registration, check, rules, SystemClock(), say).run()


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` until SIGTERM or Ctrl+C, which let it clean up."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await work
