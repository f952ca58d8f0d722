"""``metrics-addr``: serves the node's page for Prometheus and the list of nodes to scrape, by plain HTTP as in Docker.

Every client that reaches the address can read the page.  It shows no secrets or environments, and nothing can be
changed there.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import structlog
from aiohttp import web
from yarl import URL

from skep.aio.connections.admission import Newcomers, admit_transport
from skep.api.http.connection import Connection
from skep.api.http.server import json_response
from skep.api.http.tables import RouteTable
from skep.api.telemetry.exposition import CONTENT_TYPE
from skep.configuration.configuration import Configuration
from skep.errors import FailedPrecondition, SkepError
from skep.model.networks.addresses import is_address
from skep.node.telemetry.metrics import NodeMetrics

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_AT_ONCE = 4
"""Limit for the pages that are produced at the same time."""
_IDLE_S = 75.0
"""Seconds for which an idle connection stays open.  Longer than the usual interval of scrapers, a minute."""
_PRIVATE = (".internal", ".local", ".localhost", ".home.arpa", ".test")
"""Suffixes of names that nobody can register."""


class MetricsLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits for open connections."""

    connections: int = 64
    """Limit for all connections.  A scraper needs one."""
    connections_per_address: int = 32


LIMITS = MetricsLimits()


@asynccontextmanager
async def serving_metrics(
    configuration: Configuration, metrics: NodeMetrics, limits: MetricsLimits = LIMITS
) -> AsyncIterator[None]:
    """Serve on ``metrics-addr`` during the block, if it is set.

    Raises: FailedPrecondition: cannot listen on the address.
    """
    addr, hosts = configuration.metrics_addr, configuration.metrics_hosts
    if addr is None:
        yield
        return
    host, port = addr
    places = asyncio.Semaphore(_AT_ONCE)

    async def page(_request: web.Request) -> web.Response:
        async with places:
            return web.Response(body=await metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def discovery(_request: web.Request) -> web.StreamResponse:
        try:
            return json_response(targets(await metrics.nodes(), port))
        except SkepError as error:
            return web.Response(status=503, text=f"{error}\n")

    clients = _Clients(hosts, limits)
    app = web.Application(middlewares=[clients.note])
    app.router.add_get("/metrics", page)
    app.router.add_get("/sd", discovery)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=_IDLE_S)
    await runner.setup()
    server = runner.server
    assert server is not None, "set up just now"

    accept = partial(clients.accept, server)
    try:
        async with _listening(partial(Connection, accept), host, port):
            yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _listening(connection: Callable[[], asyncio.Protocol], host: str, port: int) -> AsyncIterator[None]:
    """Listen during the block.  Raises: FailedPrecondition."""
    try:
        listening = await asyncio.get_running_loop().create_server(connection, host or None, port)
    except OSError as error:
        raise FailedPrecondition(
            f"metrics-addr {host}:{port} cannot be used: {error.strerror}. Choose another address"
        ) from error
    log.info("metrics served", addr=f"{host}:{port}")
    try:
        yield
    finally:
        listening.close()


_table = RouteTable[NodeMetrics]()


def metrics_routes(metrics: NodeMetrics) -> list[web.RouteDef]:
    """Return the route ``/metrics`` for the API's hosts.  Docker Engine has it on ``metrics-addr`` only."""
    return _table.bound(metrics)


@_table.get("/metrics")
async def _show(metrics: NodeMetrics, request: web.Request) -> web.StreamResponse:
    return web.Response(body=await metrics.text(), headers={"Content-Type": CONTENT_TYPE})


class _Clients:
    """The connections of one listener.

    ``hosts`` are further names of this machine that requests may have in ``Host``.
    """

    def __init__(self, hosts: Collection[str], limits: MetricsLimits) -> None:
        self._hosts = hosts
        self._busy: set[asyncio.BaseTransport | None] = set()
        """Connections with a request in progress."""
        self._open: Newcomers[asyncio.Transport] = Newcomers(
            "metrics connections",
            limits.connections,
            limits.connections_per_address,
            lambda one: one.abort(),
            may_leave=lambda one: one not in self._busy,
        )

    def accept(self, server: web.Server, client: Connection) -> None:
        """Let ``server`` serve a new connection.  Close it if all open connections have requests in progress."""
        if admit_transport(self._open, client.transport):
            client.give_to(server())
        else:
            client.abort()

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Keep a connection open while its request is in progress, and refuse foreign host names."""
        transport = request.transport
        self._busy.add(transport)
        try:
            if why := _foreign_host(request.headers.getall("Host", []), self._hosts):
                return web.Response(status=403, text=f"{why}\n")
            return await handler(request)
        finally:
            self._busy.discard(transport)


def _foreign_host(hosts: Sequence[str], own: Collection[str]) -> str:
    """Return why a request is refused for its ``Host``, or an empty text if it is accepted.

    An attacker's web page could read the responses if its host name resolves to this machine (DNS rebinding).  The
    browser then sends that name in ``Host``.  Names that nobody can register are not a risk, so only other names must
    be configured.

    Source: RFC 6761, RFC 6762, RFC 8375 (special-use names); ICANN reserved ``.internal`` in 2024.
    """
    if not hosts:
        return ""  # HTTP/1.0, which no browser sends
    try:
        name = URL.build(scheme="http", authority=hosts[0]).host if len(hosts) == 1 else None
    except ValueError:
        name = None
    if name is None:
        return "a request names one host"
    name = name.lower().rstrip(".")
    if "." not in name or is_address(name) or name.endswith(_PRIVATE) or name in own:
        return ""
    return f"metrics are not served as {name[:200]!r}: add the name to metrics-hosts, or use an address"


def targets(nodes: list[Mapping[str, Any]], port: int) -> list[Mapping[str, Any]]:
    """Return the targets for ``http_sd_configs``: all nodes, including nodes that are down, so that an alert can notice
    those.

    Source: https://prometheus.io/docs/prometheus/latest/http_sd/
    """
    return [_target(node, address, port) for node in nodes if (address := _address(node))]


def _address(node: Mapping[str, Any]) -> str:
    """Return the node's address, or an empty text before its first session.

    The caller leaves such nodes out, because a target with only a port would mean the machine that Prometheus runs on.
    """
    return str((node.get("Status") or {}).get("Addr") or "")


def _target(node: Mapping[str, Any], address: str, port: int) -> Mapping[str, Any]:
    spec, manager = node["Spec"], node.get("ManagerStatus") or {}
    labels = {
        "id": node["ID"],
        "name": str(node["Description"].get("Hostname") or ""),
        "role": str(spec.get("Role") or ""),
        "leader": str(bool(manager.get("Leader"))).lower(),
        "availability": str(spec.get("Availability") or ""),
        "state": str(node["Status"].get("State") or ""),
        **{f"label_{_plain(key)}": str(value) for key, value in (spec.get("Labels") or {}).items()},
    }
    host = f"[{address}]" if ":" in address else address
    return {
        "targets": [f"{host}:{port}"],
        "labels": {f"__meta_skep_node_{name}": value for name, value in labels.items()},
    }


def _plain(key: str) -> str:
    """Return ``key`` as a Prometheus label name, with ``_`` in place of invalid characters."""
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in key)
