"""Looks up cluster networks: on a manager by asking its manager process, on a worker in its own tasks."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import quote

import msgspec
from aiohttp import web

from skep.aio.clock import Clock
from skep.api.access.identity import IDENTITY_HEADER, identity_of, packed
from skep.api.client.client import Response
from skep.api.formats import network_form
from skep.api.formats.networks import PREDEFINED_LABEL, SWARM, NetworkFacts, fits
from skep.api.http.server import Filters, flag
from skep.engine.containers.container import Container
from skep.errors import AlreadyExists, SkepError, Unavailable
from skep.model.network import Network
from skep.model.networks.tables import NetworkTable, TableEndpoint, TableService
from skep.model.task import AssignedTask, TaskStatus
from skep.model.values.ids import NetworkId, TaskId
from skep.node.cluster.cluster_reads import ClusterReads
from skep.node.routes.network_users import meant_by, networks_in_use, on_overlay

_MANAGER_WAIT_S = 5.0
"""Seconds for which a request waits while this node's manager starts."""
_FORWARDED_HEADERS = ("Content-Type", "X-Skep-Stale")
FROM_A_WORKER = (
    "Cannot create a multi-host network from a worker node. Please create the network from a manager node."
)


class ClusterMember(Protocol):
    """This node's membership of a cluster."""

    @property
    def is_manager(self) -> bool:
        """Whether this node is a manager."""

    @property
    def is_in_swarm(self) -> bool:
        """Whether this node is in a cluster."""

    def manager_refusal(self) -> str | None:
        """Return Docker's error if this node has no manager, or None if it has one or will soon have one."""


class Tasks(Protocol):
    """The cluster's tasks on this node."""

    def tasks(self) -> Mapping[TaskId, AssignedTask]:
        """Return the assigned tasks by id."""

    def statuses(self) -> Mapping[TaskId, TaskStatus]:
        """Return the observed status of each task by id."""


class Tables(Protocol):
    """The network tables of this node."""

    @property
    def tables(self) -> Mapping[NetworkId, NetworkTable]:
        """The last received table of each network."""


class ClusterNetworks(msgspec.Struct, frozen=True, kw_only=True):
    """Networks of scope swarm."""

    member: ClusterMember
    reads: ClusterReads
    tasks: Tasks
    tables: Tables
    containers: Callable[[], Collection[Container]]
    clock: Clock
    rng: Callable[[], float]

    def check_manager(self) -> None:
        """Check that this node is a manager.  Raises: Unavailable."""
        if not self.member.is_manager:
            raise Unavailable(self.member.manager_refusal() or FROM_A_WORKER)

    async def list_all(self, request: web.Request, filters: Filters) -> list[dict[str, Any]]:
        """Return the networks that match ``filters``.

        A worker that the cluster does not allow to read returns only the networks of its own tasks.
        """
        if not self.member.is_manager:
            with suppress(SkepError):  # not allowed, or no manager responds: list the networks of this node
                return list(msgspec.json.decode(await self.reads.body(request.raw_path)))
            attached = self._attached().values()
            return [network_form.flat_form(one) for one in attached if fits(_facts(one), filters)]
        response = await self.forward_to_manager(request)
        if response.status >= 300:
            raise response.error()
        return list(msgspec.json.decode(response.body))

    async def find(self, request: web.Request, word: str) -> dict[str, Any] | None:
        """Return a network in the form of ``inspect``, with this node's containers on it, or None."""
        if self.member.is_manager:
            found = await self._from_manager(request, word)
        else:
            found = self._from_tasks(word, is_verbose=flag(request, "verbose"))
        if found is None:
            return None
        if here := on_overlay(found["Id"], self.tasks.tasks(), self.containers()):
            found["Containers"] = here
        return found

    async def may_have(self, word: str) -> bool:
        """Return whether ``word`` may mean a cluster network.  A worker does not know all cluster networks."""
        if not self.member.is_manager:
            return self.member.is_in_swarm
        response = await self.request_manager("GET", f"/networks/{quote(word, safe='')}", b"", {})
        return response.status == 200 and PREDEFINED_LABEL not in (
            msgspec.json.decode(response.body)["Labels"] or ()
        )

    async def check_lacks(self, name: str) -> None:
        """Check that no cluster network has that name.  Raises: AlreadyExists."""
        response = await self.request_manager("GET", f"/networks/{quote(name, safe='')}", b"", {})
        if response.status == 200 and msgspec.json.decode(response.body)["Name"] == name:
            raise AlreadyExists(f"network with name {name} already exists")

    async def forward_to_manager(self, request: web.Request, body: bytes = b"") -> Response:
        """Return the manager's response to the same request.  Raises: Unavailable."""
        return await self.request_manager(request.method, request.path_qs, body, forwarded_headers(request))

    async def _from_manager(self, request: web.Request, word: str) -> dict[str, Any] | None:
        verbose = request.query.get("verbose", "")
        path = f"/networks/{quote(word, safe='')}?verbose={quote(verbose, safe='')}"
        response = await self.request_manager("GET", path, b"", forwarded_headers(request))
        if response.status == 404:
            return None
        if response.status >= 300:
            raise response.error()
        found: dict[str, Any] = msgspec.json.decode(response.body)
        if PREDEFINED_LABEL in (found["Labels"] or ()) and request.query.get("scope") != SWARM:
            return None  # this entry stands for a network that each node has itself
        return found

    def _from_tasks(self, word: str, *, is_verbose: bool) -> dict[str, Any] | None:
        network = meant_by(word, self._attached())
        if network is None:
            return None
        found = network_form.flat_form(network)
        table = self.tables.tables.get(network.id)
        if table is not None:
            found["Peers"] = _peers(table)
            if is_verbose:
                found["Services"] = _services(table)
        return found

    def _attached(self) -> dict[str, Network]:
        return networks_in_use(self.tasks.tasks(), self.tasks.statuses())

    async def request_manager(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Response:
        """Send a request to this node's manager and return the response.

        Waits for a manager that restarts.  Raises: Unavailable.
        """
        if (refusal := self.member.manager_refusal()) is not None:
            raise Unavailable(refusal)
        for attempts_left in (1, 0) if method == "GET" else (0,):
            await self.reads.own.wait_listening(self.clock, self.rng, _MANAGER_WAIT_S)
            try:
                return await self.reads.own.send(method, path, body, headers)
            except Unavailable:
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")


def forwarded_headers(request: web.Request) -> dict[str, str]:
    """Return the headers with which ``request`` is sent to a manager: the client's identity, and the client's headers
    that a manager reads.
    """
    headers = {name: request.headers[name] for name in _FORWARDED_HEADERS if name in request.headers}
    return {IDENTITY_HEADER: packed(identity_of(request)).decode(), **headers}


def _facts(network: Network) -> NetworkFacts:
    return NetworkFacts(
        id=network.id,
        name=network.spec.name,
        driver=network_form.known_driver(network).name,
        scope=SWARM,
        labels=network.spec.labels,
        is_used=True,
    )


def _peers(table: NetworkTable) -> list[dict[str, str]]:
    """Return ``Peers`` of ``docker network inspect``.  Nodes are shown by id, because a table has no names."""
    return [{"Name": node.id, "IP": node.underlay} for _, node in sorted(table.nodes.items())]


def _services(table: NetworkTable) -> dict[str, Any]:
    """Return ``Services`` of ``docker network inspect --verbose``.  Plain containers have an empty name."""
    shown: dict[str, Any] = {
        service.name: _entry(service, table) for _, service in sorted(table.services.items())
    }
    plain = [_line(one, table) for _, one in sorted(table.endpoints.items()) if not one.service_id]
    if plain:
        shown[""] = {"VIP": "<nil>", "Ports": [], "LocalLBIndex": 0, "Tasks": plain}
    return shown


def _entry(service: TableService, table: NetworkTable) -> dict[str, Any]:
    return {
        "VIP": service.virtual_ips[0] if service.virtual_ips else "<nil>",
        "Ports": [f"Target: {port.target}, Publish: {port.published}" for port in service.ports],
        "LocalLBIndex": 0,
        "Tasks": [
            _line(one, table) for _, one in sorted(table.endpoints.items()) if one.service_id == service.id
        ],
    }


def _line(endpoint: TableEndpoint, table: NetworkTable) -> dict[str, Any]:
    node = table.nodes.get(endpoint.node_id)
    return {
        "Name": endpoint.name,
        "EndpointID": network_form.endpoint_id(endpoint.task_id, table.head.id),
        "EndpointIP": endpoint.addresses[0] if endpoint.addresses else "",
        "Info": {"Host IP": node.underlay if node is not None else ""},
    }
