"""A read-only view of the catalog in the HTTP interface of Consul: catalog, health, and blocking queries.

It serves what consul-template, Traefik's provider and Prometheus' discovery request.  Everything that would change
something is refused.

Source: Consul's API documentation (catalog, health, features/blocking), and hashicorp/consul, api/*.go.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any, Final

import msgspec
from aiohttp import web

from skep.aio.slots import Slots
from skep.catalog.following import KnownCatalog
from skep.errors import ResourceExhausted, Unavailable, reason_of
from skep.model.catalog import CatalogInstance, CatalogService
from skep.model.networks.addresses import is_address, joined
from skep.model.values.times import SECOND_NS, duration_ns

DATACENTER: Final = "dc1"
"""Consul's own default name."""
WAIT_S: Final = 300.0
"""Default wait of a blocking query, as Consul has it."""
WAIT_S_MAX: Final = 600.0
"""Longest wait of a blocking query, as Consul has it."""
WAITING_MAX: Final = 512
"""Largest number of blocking queries at one time.  consul-template sends one for each service."""
_INDEX: Final = re.compile(r"[0-9]{1,19}")


class ConsulView:
    """Answers Consul's requests from the known catalog."""

    def __init__(self, known: KnownCatalog) -> None:
        self._known = known
        self.queries = Slots(WAITING_MAX, 0, "blocking queries wait")
        """Blocking queries that wait."""

    def application(self, *, is_loopback: bool) -> web.Application:
        """Return the application.

        Args:
            is_loopback: Whether only programs of this machine reach it.  Then requests of web pages are refused, which
                reach loopback by a name of their own (DNS rebinding).
        """
        app = web.Application(middlewares=[_checked(is_loopback=is_loopback)])
        get = app.router.add_get
        get("/v1/catalog/services", self._services)
        get("/v1/catalog/service/{name}", self._service)
        get("/v1/catalog/nodes", self._nodes)
        get("/v1/catalog/node/{name}", self._node)
        get("/v1/catalog/datacenters", self._datacenters)
        get("/v1/health/service/{name}", self._health)
        get("/v1/health/checks/{name}", self._checks)
        get("/v1/health/state/{state}", self._state)
        get("/v1/agent/self", self._self)
        get("/v1/status/leader", self._leader)
        get("/v1/kv/{key:.*}", self._key)
        return app

    # -- requests -------------------------------------------------------------------------------------------------

    async def _services(self, request: web.Request) -> web.Response:
        await self._wait(request)
        return self._answer({name: list(one.tags) for name, one in self._known.services.items()})

    async def _service(self, request: web.Request) -> web.Response:
        await self._wait(request)
        return self._answer([self._catalog_entry(*pair) for pair in self._instances(request)])

    async def _health(self, request: web.Request) -> web.Response:
        # Instances that do not serve are not in the catalog, so ``passing`` changes nothing.
        await self._wait(request)
        return self._answer([self._health_entry(*pair) for pair in self._instances(request)])

    async def _checks(self, request: web.Request) -> web.Response:
        await self._wait(request)
        return self._answer([_service_check(*pair) for pair in self._instances(request)])

    async def _state(self, request: web.Request) -> web.Response:
        """Answer the query by which Traefik notices instances: the names and tags of services may stay the same."""
        await self._wait(request)
        services = self._known.services.values() if request.match_info["state"] in ("any", "passing") else ()
        return self._answer([_service_check(one, each) for one in services for each in one.instances])

    async def _nodes(self, request: web.Request) -> web.Response:
        await self._wait(request)
        return self._answer([self._node_entry(*pair) for pair in sorted(self._addresses().items())])

    async def _node(self, request: web.Request) -> web.Response:
        await self._wait(request)
        name = request.match_info["name"]
        address = self._addresses().get(name)
        if address is None:
            return self._answer(None)
        own = {
            one.id: self._service_entry(service, one)
            for service in self._known.services.values()
            for one in service.instances
            if one.node == name
        }
        return self._answer({"Node": self._node_entry(name, address), "Services": own})

    async def _datacenters(self, _: web.Request) -> web.Response:
        return self._answer([DATACENTER])

    async def _self(self, _: web.Request) -> web.Response:
        return self._answer({"Config": {"Datacenter": DATACENTER, "NodeName": "skep", "Server": True}})

    async def _leader(self, _: web.Request) -> web.Response:
        return self._answer("127.0.0.1:8300")

    async def _key(self, _: web.Request) -> web.Response:
        return self._answer(None, status=404)  # consul-template's functions for keys then have no value

    # -- blocking queries -----------------------------------------------------------------------------------------

    async def _wait(self, request: web.Request) -> None:
        """Wait as a blocking query demands.  Raises: web.HTTPException."""
        query = request.query
        if query.get("filter"):
            raise web.HTTPBadRequest(text="filter is not supported: use the parameter tag")
        if query.get("dc", DATACENTER) != DATACENTER:
            raise web.HTTPInternalServerError(text="No path to datacenter")
        if not _INDEX.fullmatch(query.get("index", "0")):
            raise web.HTTPBadRequest(text="Invalid index")
        index = int(query.get("index", "0"))
        # An index of the future is one of an earlier run of this view.  Consul returns at once as well.
        if not index or index > self._known.index:
            return
        try:
            async with self.queries.hold():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_wait_s(query.get("wait", ""))):
                        await self._known.wait_changed(index)
        except ResourceExhausted as error:
            raise web.HTTPTooManyRequests(text=str(error)) from error

    def _answer(self, value: Any, status: int = 200) -> web.Response:
        headers = {
            "X-Consul-Index": str(self._known.index),
            "X-Consul-KnownLeader": "true",
            "X-Consul-LastContact": "0",
        }
        body = msgspec.json.encode(value)
        return web.Response(body=body, status=status, headers=headers, content_type="application/json")

    # -- entries --------------------------------------------------------------------------------------------------

    def _addresses(self) -> Mapping[str, str]:
        """Return the addresses of nodes, and of machines with registrations, by their names."""
        outside = {
            one.node: one.node_address
            for service in self._known.services.values()
            for one in service.instances
            if one.is_registered
        }
        return {**outside, **self._known.nodes}

    def _instances(self, request: web.Request) -> Iterator[tuple[CatalogService, CatalogInstance]]:
        service = self._known.services.get(request.match_info["name"])
        wanted = request.query.getall("tag", ())
        for one in service.instances if service is not None else ():
            if service is not None and has_tags(one.tags, filter(None, wanted)):
                yield service, one

    def _node_entry(self, name: str, address: str) -> dict[str, Any]:
        return {
            "ID": "",
            "Node": name,
            "Address": address,
            "Datacenter": DATACENTER,
            "TaggedAddresses": {"lan": address, "wan": address},
            "Meta": {},
            **self._indexes(),
        }

    def _service_entry(self, service: CatalogService, one: CatalogInstance) -> dict[str, Any]:
        return {
            "ID": one.id,
            "Service": service.name,
            "Tags": list(one.tags),
            "Address": one.address,
            "Port": one.port,
            "Meta": _meta(service),
            "Weights": _weights(one),
            "EnableTagOverride": False,
            "Datacenter": DATACENTER,
            **self._indexes(),
        }

    def _catalog_entry(self, service: CatalogService, one: CatalogInstance) -> dict[str, Any]:
        return {
            **self._node_entry(one.node, one.node_address),
            "NodeMeta": {},
            "ServiceID": one.id,
            "ServiceName": service.name,
            "ServiceAddress": one.address,
            "ServicePort": one.port,
            "ServiceTags": list(one.tags),
            "ServiceMeta": _meta(service),
            "ServiceWeights": _weights(one),
            "ServiceEnableTagOverride": False,
        }

    def _health_entry(self, service: CatalogService, one: CatalogInstance) -> dict[str, Any]:
        node = {"Node": one.node, "CheckID": "serfHealth", "Name": "Node", "Status": "passing", "Output": ""}
        return {
            "Node": self._node_entry(one.node, one.node_address),
            "Service": self._service_entry(service, one),
            "Checks": [{**node, "ServiceID": "", "ServiceName": ""}, _service_check(service, one)],
        }

    def _indexes(self) -> dict[str, int]:
        return {"CreateIndex": self._known.first_index, "ModifyIndex": self._known.index}


def has_tags(tags: Iterable[str], wanted: Iterable[str]) -> bool:
    """Return whether ``tags`` has every one of ``wanted``, in any case, as Consul compares them."""
    return {one.lower() for one in wanted} <= {one.lower() for one in tags}


def _meta(service: CatalogService) -> dict[str, str]:
    return {"stack": service.stack} if service.stack else {}


def _weights(one: CatalogInstance) -> dict[str, int]:
    return {"Passing": one.weight, "Warning": one.weight}


def _service_check(service: CatalogService, one: CatalogInstance) -> dict[str, Any]:
    return {
        "Node": one.node,
        "CheckID": f"service:{one.id}",
        "Name": "Service",
        "Status": "passing",
        "Output": "",
        "ServiceID": one.id,
        "ServiceName": service.name,
        "ServiceTags": list(one.tags),
    }


def _wait_s(word: str) -> float:
    """Return the seconds of Go's duration.  Raises: web.HTTPBadRequest."""
    if not word:
        return WAIT_S
    ns = duration_ns(word)
    if ns is None:
        raise web.HTTPBadRequest(text="Invalid wait time")
    return min(ns / SECOND_NS, WAIT_S_MAX) or WAIT_S


def _checked(*, is_loopback: bool) -> Any:
    """Return the middleware that refuses changes, and requests of web pages on loopback."""

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method != "GET":
            raise web.HTTPMethodNotAllowed(request.method, ("GET",), text="this view is read-only")
        if is_loopback and ("Origin" in request.headers or not _is_local(request.headers.get("Host", ""))):
            raise web.HTTPForbidden(text="this view is for programs of this machine")
        response: web.StreamResponse = await handler(request)
        return response

    return check


def _is_local(host: str) -> bool:
    """Return whether the ``Host`` header is an address, or localhost, which no web site can be."""
    name = re.sub(r":[0-9]+$", "", host).strip("[]")
    return name == "localhost" or is_address(name)


@asynccontextmanager
async def serving_consul(view: ConsulView, host: str, port: int) -> AsyncIterator[int]:
    """Serve during the block, and yield the port.  Raises: Unavailable: the address is taken."""
    app = view.application(is_loopback=ip_address(host).is_loopback)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {joined(host, port)}: {reason_of(error)}. Choose another port."
            ) from error
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
