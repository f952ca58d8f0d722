"""``/networks`` of a node: the cluster's, its own, and those of the Docker Engine beside it, as one list.

What a request is about decides who answers it.  Networks of the cluster are the managers'; a worker knows only those
that its own tasks use.  Networks of the node are the engine's where there is one, but for the gateway bridge.

Source: moby 20.10, api/server/router/network/network_routes.go, daemon/network.go, libnetwork/controller.go.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol
from urllib.parse import quote

import msgspec
import structlog
from aiohttp import web

from skep.aio.clock import Clock
from skep.api import network_form
from skep.api.bodies import decode_body
from skep.api.errors import Forbidden
from skep.api.networks import (
    BUILTIN,
    LOCAL,
    PREDEFINED_LABEL,
    PRUNE_FILTERS,
    SWARM,
    ConnectBody,
    Facts,
    NetworkBody,
    check_form,
    check_list_filters,
    check_name,
    fits,
)
from skep.api.server import Filters, Routes, json_answer, read_body
from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SkepError,
    Unavailable,
    Unimplemented,
)
from skep.model.ids import TaskId
from skep.model.network import Network
from skep.model.task import AssignedTask, TaskStatus
from skep.node.local_api import Answer, LocalApi
from skep.node.network.local.keeper import LocalNetworks
from skep.node.network.local.objects import GATEWAY, LocalNetwork, facts_of, find, flat_form
from skep.node.oci.container import Container
from skep.node.routes.network_users import meant_by, networks_in_use, on_gateway, on_overlay

log = structlog.get_logger()

_MANAGER_WAIT_S = 5.0
_PASSED_ON = ("Content-Type", "X-Skep-Stale")
_FROM_A_WORKER = (
    "Cannot create a multi-host network from a worker node. Please create the network from a manager node."
)


class Member(Protocol):
    """This node's place in a swarm."""

    @property
    def is_manager(self) -> bool: ...

    @property
    def is_in_swarm(self) -> bool: ...

    def manager_refusal(self) -> str | None:
        """Why no manager of this node answers; None: one does, or will in a moment."""


class Tasks(Protocol):
    """What runs here for the cluster."""

    def tasks(self) -> Mapping[TaskId, AssignedTask]: ...

    def statuses(self) -> Mapping[TaskId, TaskStatus]: ...


class NetworkParts(msgspec.Struct, frozen=True, kw_only=True):
    """What the routes ask.  ``engine``: None where there is none."""

    member: Member
    manager: LocalApi
    engine: LocalApi | None
    local: LocalNetworks
    tasks: Tasks
    containers: Callable[[], Collection[Container]]
    container: Callable[[str], Container]
    """By id, name or prefix.  Raises: NotFound."""
    clock: Clock
    chance: Callable[[], float]


def network_routes(parts: NetworkParts) -> Routes:
    """List, inspect, create, remove, connect, disconnect, prune."""
    node = _NodeNetworks(parts)
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
    def __init__(self, parts: NetworkParts) -> None:
        self._parts = parts
        self._local = parts.local

    # --- reading ----------------------------------------------------------------------------------------------

    async def list_all(self, request: web.Request) -> web.StreamResponse:
        filters = Filters.of(request)
        check_list_filters(filters)
        shown = await self._cluster_list(request, filters)
        engines = await self._engine_list(request)
        names = {one["Name"] for one in engines}
        shown += engines
        for network in self._own():
            used = network.name == GATEWAY and bool(self._local.gateway_users())
            if network.name not in names and fits(facts_of(network, is_used=used), filters):
                shown.append(flat_form(network, {}))
        return json_answer(shown)

    async def inspect(self, request: web.Request) -> web.StreamResponse:
        word, scope = request.match_info["name"], request.query.get("scope", "")
        own = find(self._own(), word) if scope in ("", LOCAL) else None
        if own is not None and word in (own.id, own.name):
            return json_answer(self._shown(own))
        if scope in ("", SWARM) and (found := await self._cluster_network(request, word)) is not None:
            return json_answer(found)
        if scope in ("", LOCAL) and self._parts.engine is not None:
            answer = await self._parts.engine.ask("GET", request.path_qs)
            if answer.status != 404:
                return _passed(answer)
        if own is not None:
            return json_answer(self._shown(own))
        raise NotFound(f"network {word} not found")

    # --- changing ---------------------------------------------------------------------------------------------

    async def create(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request)
        body = decode_body(raw, NetworkBody)
        if body.name and any(one.name == body.name for one in self._own() if one.name not in BUILTIN):
            raise AlreadyExists(f"network with name {body.name} already exists")
        if body.is_of_cluster and self._parts.member.is_manager:
            await self._check_engine_lacks(request, body.name)
            return _passed(await self._ask_manager(request, raw))
        if self._parts.member.is_manager and body.name:
            await self._check_cluster_lacks(body.name)
        check_name(body.name)
        check_form(body)
        if body.is_of_cluster:
            if self._parts.member.is_in_swarm:
                raise Forbidden(_FROM_A_WORKER)
            raise Unavailable(self._parts.member.manager_refusal() or _FROM_A_WORKER)
        if body.name == GATEWAY:
            return _created(await self._local.make_gateway(body))
        if self._parts.engine is not None:
            return _passed(await self._ask_engine(request, raw))
        if not body.name:
            raise InvalidArgument("invalid name: ")
        if body.config_only:
            return _created(self._local.add_configuration(body))
        raise Unimplemented(
            "this node has no networks of its own for plain containers, since it runs none: create an overlay network "
            "(--driver overlay), or give skep a Docker Engine (--engine-socket)"
        )

    async def remove(self, request: web.Request) -> web.StreamResponse:
        word = request.match_info["name"]
        own = find(self._own(), word)
        if word in BUILTIN or (own is not None and own.name in BUILTIN):
            raise Forbidden(
                f"{own.name if own is not None else word} is a pre-defined network and cannot be removed"
            )
        if own is not None and word in (own.id, own.name):
            return self._remove_own(own)
        if await self._cluster_network(request, word) is not None:
            self._check_manager()
            return _passed(await self._ask_manager(request))
        if self._parts.engine is not None:
            answer = await self._ask_engine(request)
            if answer.status != 404 or own is None:
                return _passed(answer)
        if own is None:
            raise NotFound(f"network {word} not found")
        return self._remove_own(own)

    async def prune(self, request: web.Request) -> web.StreamResponse:
        """Of the node's own, none goes: the gateway bridge is every container's way out."""
        Filters.of(request).refuse_unknown(*PRUNE_FILTERS)
        removed: list[str] = []
        sides = [self._ask_manager] if self._parts.member.is_manager else []
        for ask in (*sides, *([self._ask_engine] if self._parts.engine is not None else [])):
            answer = await ask(request)
            if answer.status >= 300:
                raise answer.error()
            removed += msgspec.json.decode(answer.body).get("NetworksDeleted") or []
        return json_answer({"NetworksDeleted": removed or None})

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """``connect`` and ``disconnect``: of the engine's containers to its networks; others are told why not."""
        raw = await read_body(request)
        wished = decode_body(raw, ConnectBody)
        name = request.match_info["name"]
        if not wished.container:
            raise InvalidArgument('invalid name or ID supplied: ""')
        await self._check_plain(wished.container)
        is_cut = request.path.endswith("/disconnect")
        own = find(self._own(), name)
        if own is not None and own.name == GATEWAY:
            raise Forbidden(
                f"{GATEWAY} is every container's way out: none is connected or disconnected by hand"
            )
        found = await self._cluster_network(request, name) if own is None else None
        if found is None:
            return _passed(await self._ask_engine(request, raw))
        if is_cut:
            raise FailedPrecondition(f"container {wished.container} is not connected to network {name}")
        if not found["Attachable"]:
            raise Forbidden(
                f"Could not attach to network {name}: "
                f"rpc error: code = PermissionDenied desc = network {name} not manually attachable"
            )
        raise Unimplemented(
            f"Could not attach to network {name}: the Docker Engine of this machine takes no part in the cluster: "
            "run the container as a service, or on a docker node"
        )

    async def update(self, request: web.Request) -> web.StreamResponse:
        self._check_manager()
        return _passed(await self._ask_manager(request, await read_body(request)))

    # --- the cluster's ----------------------------------------------------------------------------------------

    def _check_manager(self) -> None:
        if not self._parts.member.is_manager:
            raise Unavailable(self._parts.member.manager_refusal() or _FROM_A_WORKER)

    async def _cluster_list(self, request: web.Request, filters: Filters) -> list[dict[str, Any]]:
        if not self._parts.member.is_manager:
            known = self._attached().values()
            return [network_form.flat_form(one) for one in known if fits(_facts(one), filters)]
        answer = await self._ask_manager(request)
        if answer.status >= 300:
            raise answer.error()
        return list(msgspec.json.decode(answer.body))

    async def _cluster_network(self, request: web.Request, word: str) -> dict[str, Any] | None:
        """What the managers, or on a worker its own tasks, know of a network; with this node's containers on it."""
        tasks, containers = self._parts.tasks.tasks(), self._parts.containers()
        if self._parts.member.is_manager:
            query = {key: value for key, value in request.query.items() if key == "verbose"}
            path = f"/networks/{quote(word, safe='')}"
            headers = _headers(request)
            suffix = "?" + "&".join(f"{key}={quote(value)}" for key, value in query.items()) if query else ""
            answer = await self._asked_manager("GET", path + suffix, b"", headers)
            if answer.status == 404:
                return None
            if answer.status >= 300:
                raise answer.error()
            found: dict[str, Any] = msgspec.json.decode(answer.body)
            if PREDEFINED_LABEL in (found["Labels"] or ()) and request.query.get("scope") != SWARM:
                return None  # it stands for a network that each node has for itself
        else:
            network = meant_by(word, self._attached())
            if network is None:
                return None
            found = network_form.flat_form(network)
        if here := on_overlay(found["Id"], tasks, containers):
            found["Containers"] = here
        return found

    async def _check_cluster_lacks(self, name: str) -> None:
        answer = await self._asked_manager("GET", f"/networks/{quote(name, safe='')}", b"", {})
        if answer.status == 200 and msgspec.json.decode(answer.body)["Name"] == name:
            raise AlreadyExists(f"network with name {name} already exists")

    def _attached(self) -> dict[str, Network]:
        return networks_in_use(self._parts.tasks.tasks(), self._parts.tasks.statuses())

    async def _ask_manager(self, request: web.Request, body: bytes = b"") -> Answer:
        return await self._asked_manager(request.method, request.path_qs, body, _headers(request))

    async def _asked_manager(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """What the manager answers; one that restarts is waited for.  Raises: Unavailable."""
        if (refusal := self._parts.member.manager_refusal()) is not None:
            raise Unavailable(refusal)
        manager = self._parts.manager
        for attempts_left in (1, 0) if method == "GET" else (0,):
            await manager.wait_listening(self._parts.clock, self._parts.chance, _MANAGER_WAIT_S)
            try:
                return await manager.ask(method, path, body, headers)
            except Unavailable:
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    # --- the engine's, and the node's own ---------------------------------------------------------------------

    async def _engine_list(self, request: web.Request) -> list[dict[str, Any]]:
        if self._parts.engine is None:
            return []
        try:
            return list(await self._parts.engine.get(request.path, dict(request.query)))
        except SkepError as error:
            log.info("networks of the engine are missing", reason=str(error))
            return []

    async def _ask_engine(self, request: web.Request, body: bytes = b"") -> Answer:
        """Raises: NotFound: there is no engine, so there is no such network."""
        if self._parts.engine is None:
            raise NotFound(f"network {request.match_info.get('name', '')} not found")
        return await self._parts.engine.ask(request.method, request.path_qs, body, _headers(request))

    async def _check_engine_lacks(self, request: web.Request, name: str) -> None:
        if self._parts.engine is None or not name or name in BUILTIN:
            return
        try:
            found = await self._parts.engine.get(f"/networks/{quote(name, safe='')}")
        except SkepError:
            return
        if found["Name"] == name:
            raise AlreadyExists(f"network with name {name} already exists")

    async def _check_plain(self, word: str) -> None:
        """Raises: NotFound: no such container; FailedPrecondition: a task's."""
        try:
            container = self._parts.container(word)
        except NotFound:
            if self._parts.engine is None:
                raise NotFound(f"No such container: {word}") from None
            await self._parts.engine.get(f"/containers/{quote(word, safe='')}/json")
            return
        service = container.labels.get("com.docker.swarm.service.name", "")
        raise FailedPrecondition(
            f"container {container.name} belongs to a task of service {service}: its networks are the service's "
            f"(docker service update --network-add, --network-rm)"
        )

    def _own(self) -> list[LocalNetwork]:
        own = (
            []
            if self._parts.engine is not None
            else [*self._local.predefined(), *self._local.configurations()]
        )
        gateway = self._local.gateway() if self._parts.member.is_in_swarm else None
        return [*own, gateway] if gateway is not None else own

    def _shown(self, network: LocalNetwork) -> dict[str, Any]:
        if network.name != GATEWAY:
            return flat_form(network, {})
        users = on_gateway(network, self._local.gateway_users(), self._parts.containers())
        return flat_form(network, users)

    def _remove_own(self, network: LocalNetwork) -> web.Response:
        if network.name == GATEWAY:
            self._local.remove_gateway()
        else:
            self._local.remove_configuration(network.id)
        return web.Response(status=204)


def _facts(network: Network) -> Facts:
    return Facts(
        id=network.id,
        name=network.spec.name,
        driver=network_form.known_driver(network).name,
        scope=SWARM,
        labels=network.spec.labels,
        is_used=True,
    )


def _headers(request: web.Request) -> dict[str, str]:
    return {name: request.headers[name] for name in _PASSED_ON if name in request.headers}


def _passed(answer: Answer) -> web.Response:
    headers = {"Content-Type": answer.content_type} if answer.body else {}
    return web.Response(status=answer.status, body=answer.body or None, headers=headers)


def _created(network: LocalNetwork) -> web.StreamResponse:
    return json_answer({"Id": network.id, "Warning": ""}, 201)
