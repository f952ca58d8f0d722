"""``/networks`` of a node: networks of the cluster, the node and the machine's Docker Engine in one list.

The kind of network decides which process answers a request.  Cluster networks belong to the managers, and a worker has
only those used by its own tasks.  Networks of the node belong to the Docker Engine if there is one, except the gateway
bridge.

Source: moby 20.10, api/server/router/network/network_routes.go, daemon/network.go, libnetwork/controller.go.
"""

import asyncio
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import msgspec
import structlog
from aiohttp import web

from skep.api.client.client import ApiClient, Response
from skep.api.errors import Forbidden
from skep.api.formats.bodies import decode_body
from skep.api.formats.filters import is_prunable, until_of
from skep.api.formats.networks import (
    BUILTIN,
    LOCAL,
    PRUNE_FILTERS,
    SWARM,
    ConnectBody,
    NetworkBody,
    check_form,
    check_list_filters,
    check_name,
    fits,
    ipam_status,
    known_to,
)
from skep.api.http.server import Filters, Routes, api_version, json_response, read_body
from skep.api.http.versions import ApiVersion
from skep.dataplane.local.networks import LocalNetworks
from skep.dataplane.local.objects import GATEWAY, LocalNetwork, facts_of, find, flat_form
from skep.engine.containers.create import endpoint_request
from skep.engine.containers.request import read_connect
from skep.engine.engine import Engine
from skep.engine.events import NamedNetwork
from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SkepError,
    Unavailable,
    Unimplemented,
)
from skep.linux.network.routes import read_routes
from skep.model.options.labels import LABEL_SERVICE_NAME
from skep.node.routes.cluster_networks import FROM_A_WORKER, ClusterNetworks, forwarded_headers
from skep.node.routes.network_users import on_bridge, on_builtin, on_gateway

log = structlog.get_logger()

_NAMES_ARE_UNIQUE = ApiVersion("1.44")
"""From this API version on, ``CheckDuplicate`` is implied.

With earlier versions, a cluster network may have the same name as a node's network.
"""


class NetworkSources(msgspec.Struct, frozen=True, kw_only=True):
    """The sources of the routes' data."""

    cluster: ClusterNetworks
    local: LocalNetworks
    engine: Engine | None
    """This node's engine, or None on a node without containers."""
    docker: ApiClient | None
    """The machine's Docker Engine, or None."""


def network_routes(sources: NetworkSources) -> Routes:
    """Return the routes to list, inspect, create, remove, connect, disconnect and prune networks."""
    node = _NodeNetworks(sources)
    table = Routes()
    table.get("/networks")(node.list_all)
    table.get("/networks/{name}")(node.inspect)
    table.post("/networks/create")(node.create)
    table.post("/networks/prune")(node.prune)
    table.post("/networks/{name}/connect")(node.connect)
    table.post("/networks/{name}/disconnect")(node.connect)
    table.post("/networks/{name}/update")(node.update)
    table.delete("/networks/{name}")(node.remove)
    return table


class _NodeNetworks:
    def __init__(self, sources: NetworkSources) -> None:
        self._sources = sources
        self._local = sources.local
        self._cluster = sources.cluster

    # --- reading ----------------------------------------------------------------------------------------------

    async def list_all(self, request: web.Request) -> web.StreamResponse:
        filters = Filters.of(request)
        check_list_filters(filters)
        shown = await self._cluster.list_all(request, filters)
        engines = await self._engine_list(request)
        names = {one["Name"] for one in engines}
        shown += engines
        for network in self._own():
            used = bool(self._users_of(network))
            if network.name not in names and fits(facts_of(network, is_used=used), filters):
                shown.append(flat_form(network, {}))
        version = api_version(request)
        return json_response([known_to(version, one) for one in shown])

    async def inspect(self, request: web.Request) -> web.StreamResponse:
        word, scope = request.match_info["name"], request.query.get("scope", "")
        version = api_version(request)
        own = find(self._own(), word) if scope in ("", LOCAL) else None
        if own is not None and word in (own.id, own.name):
            if not scope:
                await self._check_unambiguous(request, own, word)
            return json_response(known_to(version, self._shown(own)))
        if scope in ("", SWARM) and (found := await self._cluster.find(request, word)) is not None:
            return json_response(known_to(version, found))
        if scope in ("", LOCAL) and self._sources.docker is not None:
            response = await self._sources.docker.send("GET", request.path_qs)
            if response.status != 404:
                return _forwarded(response)
        if own is not None:
            return json_response(known_to(version, self._shown(own)))
        raise NotFound(f"network {word} not found")

    # --- changing ---------------------------------------------------------------------------------------------

    async def create(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request)
        body = decode_body(raw, NetworkBody)
        conflict = f"network with name {body.name} already exists"
        is_taken = body.name not in BUILTIN and any(one.name == body.name for one in self._own())
        if body.is_of_cluster and self._cluster.member.is_manager:
            may_share = api_version(request) < _NAMES_ARE_UNIQUE and not body.check_duplicate
            if is_taken and not may_share:
                raise AlreadyExists(conflict)
            await self._check_engine_lacks(request, body.name)
            response = await self._cluster.forward_to_manager(request, raw)
            if is_taken and response.status == 201:
                id = msgspec.json.decode(response.body)["Id"]
                return json_response({"Id": id, "Warning": conflict}, 201)
            return _forwarded(response)
        if is_taken:
            raise AlreadyExists(conflict)
        if self._cluster.member.is_manager and body.name:
            await self._cluster.check_lacks(body.name)
        check_name(body.name)
        check_form(body)
        if body.is_of_cluster:
            if self._cluster.member.is_in_swarm:
                raise Forbidden(FROM_A_WORKER)
            raise Unavailable(self._cluster.member.manager_refusal() or FROM_A_WORKER)
        if body.name == GATEWAY:
            return self._created(await self._local.make_gateway(body))
        if self._sources.docker is not None:
            return _forwarded(await self._forward_to_engine(request, raw))
        if not body.name:
            raise InvalidArgument("invalid name: ")
        if body.config_only:
            return self._created(self._local.add_configuration(body))
        if self._sources.engine is None:
            raise Unimplemented(
                "this node does not run containers, so it has no networks for them:  create an overlay network "
                "(--driver overlay), or give skep a Docker Engine (--engine-socket)"
            )
        routes = [one for one, _ in await asyncio.to_thread(read_routes)]
        devices = [name for _, name in socket.if_nameindex()]
        return self._created(await self._local.add(body, routes, devices))

    async def remove(self, request: web.Request) -> web.StreamResponse:
        word = request.match_info["name"]
        own = find(self._own(), word)
        if word in BUILTIN or (own is not None and own.name in BUILTIN):
            raise Forbidden(
                f"{own.name if own is not None else word} is a pre-defined network and cannot be removed"
            )
        if own is not None and word in (own.id, own.name):
            await self._check_unambiguous(request, own, word)
            return await self._remove_own(own)
        if await self._cluster.find(request, word) is not None:
            self._cluster.check_manager()
            return _forwarded(await self._cluster.forward_to_manager(request))
        if self._sources.docker is not None:
            response = await self._forward_to_engine(request)
            if response.status != 404 or own is None:
                return _forwarded(response)
        if own is None:
            raise NotFound(f"network {word} not found")
        return await self._remove_own(own)

    async def prune(self, request: web.Request) -> web.StreamResponse:
        """Remove unused bridge networks.  The gateway bridge always counts as used."""
        filters = Filters.of(request)
        filters.refuse_unknown(*PRUNE_FILTERS)
        until_ns = until_of(filters, self._cluster.clock.now_ns())
        removed: list[str] = []
        managers = [self._cluster.forward_to_manager] if self._cluster.member.is_manager else []
        for forward in (*managers, *([self._forward_to_engine] if self._sources.docker is not None else [])):
            response = await forward(request)
            if response.status >= 300:
                raise response.error()
            removed += msgspec.json.decode(response.body).get("NetworksDeleted") or []
        for network in self._local.bridges() if self._sources.docker is None else ():
            is_selected = is_prunable(network.created_at, network.labels, filters, until_ns)
            if is_selected and not self._users_of(network):
                with suppress(Forbidden):  # a container is just starting on it
                    await self._remove_own(network)
                    removed.append(network.name)
        return json_response({"NetworksDeleted": removed or None})

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Connect or disconnect a plain container.  Refused for containers of tasks."""
        raw = await read_body(request)
        body = decode_body(raw, ConnectBody)
        name = request.match_info["name"]
        if not body.container:
            raise InvalidArgument('invalid name or ID supplied: ""')
        is_own = await self._is_own_container(body.container)
        is_disconnect = request.path.endswith("/disconnect")
        own = find(self._own(), name)
        if own is not None and own.name == GATEWAY:
            raise Forbidden(
                f"{GATEWAY} connects every container to the outside: containers are not (dis)connected by hand"
            )
        if is_own and self._sources.engine is not None:
            return await self._connect_own(self._sources.engine, own, raw, name, is_disconnect=is_disconnect)
        found = await self._cluster.find(request, name) if own is None else None
        if found is None:
            return _forwarded(await self._forward_to_engine(request, raw))
        if is_disconnect:
            raise FailedPrecondition(f"container {body.container} is not connected to network {name}")
        if not found["Attachable"]:
            raise Forbidden(
                f"Could not attach to network {name}: "
                f"rpc error: code = PermissionDenied desc = network {name} not manually attachable"
            )
        raise Unimplemented(
            f"Could not attach to network {name}: the Docker Engine of this machine is not part of the cluster: "
            "run the container on that network from its start (docker run --network), or as a service"
        )

    async def _connect_own(
        self, engine: Engine, own: LocalNetwork | None, raw: bytes, name: str, *, is_disconnect: bool
    ) -> web.Response:
        body = read_connect(raw)
        if own is not None and own.name in BUILTIN:
            name = own.name
        elif own is not None and name != own.name:
            name = own.id  # its record must not depend on which other ids begin with the same digits
        if is_disconnect:
            await engine.networks.disconnect(body.container, name, own.id if own is not None else "")
        else:
            await engine.networks.connect(body.container, endpoint_request(name, body.endpoint_config))
        return web.Response()

    async def update(self, request: web.Request) -> web.StreamResponse:
        self._cluster.check_manager()
        return _forwarded(await self._cluster.forward_to_manager(request, await read_body(request)))

    async def _check_unambiguous(self, request: web.Request, own: LocalNetwork, word: str) -> None:
        """Check that ``word`` is not also the name of a cluster network.  Raises: InvalidArgument.

        Source: moby 20.10, api/server/router/network/network_routes.go (getNetwork).
        """
        if word != own.name or own.name in (*BUILTIN, GATEWAY):
            return
        try:
            found = await self._cluster.find(request, word)
        except SkepError:  # no manager answers, and the node's own networks do not need one
            return
        if found is not None and found["Name"] == word and found["Id"] != own.id:
            raise InvalidArgument(f"2 matches found based on name: network {word} is ambiguous")

    # --- the engine's, and the node's own ---------------------------------------------------------------------

    async def _engine_list(self, request: web.Request) -> list[dict[str, Any]]:
        if self._sources.docker is None:
            return []
        try:
            return list(await self._sources.docker.request("GET", request.path, query=dict(request.query)))
        except SkepError as error:
            log.info("networks of the engine are missing", reason=str(error))
            return []

    async def _forward_to_engine(self, request: web.Request, body: bytes = b"") -> Response:
        """Forward a request to the Docker Engine.

        Raises: NotFound: there is no engine, so the network does not exist.
        """
        if self._sources.docker is None:
            raise NotFound(f"network {request.match_info.get('name', '')} not found")
        return await self._sources.docker.send(
            request.method, request.path_qs, body, forwarded_headers(request)
        )

    async def _check_engine_lacks(self, request: web.Request, name: str) -> None:
        if self._sources.docker is None or not name or name in BUILTIN:
            return
        try:
            found = await self._sources.docker.get(f"/networks/{quote(name, safe='')}")
        except SkepError:
            return
        if found["Name"] == name:
            raise AlreadyExists(f"network with name {name} already exists")

    async def _is_own_container(self, word: str) -> bool:
        """Return whether ``word`` means a plain container of this node's engine, and not of the Docker Engine.

        Raises: NotFound: no such container; FailedPrecondition: it belongs to a task.
        """
        engine, docker = self._sources.engine, self._sources.docker
        if docker is not None and (engine is None or not engine.has(word)):
            await docker.get(f"/containers/{quote(word, safe='')}/json")
            return False
        if engine is None:
            raise NotFound(f"No such container: {word}")
        container = engine.get(word)
        if container.plain is not None:
            return True
        service = container.labels.get(LABEL_SERVICE_NAME, "")
        raise FailedPrecondition(
            f"container {container.name} belongs to a task of service {service}: its networks are the service's "
            f"(docker service update --network-add, --network-rm)"
        )

    def _own(self) -> list[LocalNetwork]:
        own = (
            []
            if self._sources.docker is not None
            else [*self._local.predefined(), *self._local.configurations(), *self._local.bridges()]
        )
        gateway = self._local.gateway() if self._cluster.member.is_in_swarm else None
        return [*own, gateway] if gateway is not None else own

    def _shown(self, network: LocalNetwork) -> dict[str, Any]:
        if network.name == "bridge" and (gateway := self._local.gateway()) is not None:
            network = msgspec.structs.replace(network, configs=gateway.configs)
        users = self._users_of(network)
        shown = flat_form(network, users)
        held = [one[name] for one in users.values() for name in ("IPv4Address", "IPv6Address") if one[name]]
        return {**shown, "Status": ipam_status(shown["IPAM"]["Config"], held)}

    def _users_of(self, network: LocalNetwork) -> dict[str, Any]:
        """Return the containers on a network, by id."""
        containers = self._sources.engine.list() if self._sources.engine is not None else ()
        if network.name == GATEWAY:
            return on_gateway(network, self._local.gateway_users(), containers)
        if network.name in BUILTIN:
            return on_builtin(network, containers)
        return on_bridge(network.id, containers)

    async def _remove_own(self, network: LocalNetwork) -> web.Response:
        if network.name == GATEWAY:
            self._local.remove_gateway()
        elif network.is_configuration:
            self._local.remove_configuration(network.id)
        else:
            if users := self._users_of(network):
                named = ", ".join(f"{one['Name']} {id[:12]}" for id, one in sorted(users.items()))
                raise Forbidden(
                    f"error while removing network: network {network.name} id {network.id} has active endpoints "
                    f"(container {named})"
                )
            await self._local.remove_bridge(network.id)
        self._publish("destroy", network)
        return web.Response(status=204)

    def _created(self, network: LocalNetwork) -> web.StreamResponse:
        self._publish("create", network)
        return json_response({"Id": network.id, "Warning": ""}, 201)

    def _publish(self, action: str, network: LocalNetwork) -> None:
        if self._sources.engine is not None:
            named = NamedNetwork(network.id, network.name, network.driver)
            self._sources.engine.events.publish_network(action, named)


def _forwarded(response: Response) -> web.Response:
    headers = {"Content-Type": response.content_type} if response.body else {}
    return web.Response(status=response.status, body=response.body or None, headers=headers)
