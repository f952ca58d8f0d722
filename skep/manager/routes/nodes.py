"""``/nodes``: the machines of the cluster.

Source: moby 20.10, daemon/cluster/{nodes,filters}.go; swarmkit, manager/controlapi/node.go.
"""

from enum import Enum
from functools import partial
from typing import TypeVar

from aiohttp import web

from skep.api.errors import Untranslated
from skep.api.http.server import (
    Filters,
    Routes,
    flag,
    json_list_response,
    json_response,
    known_list_response,
    read_json,
)
from skep.manager.control import nodes as control
from skep.manager.routes.access import current_view, manager_of, version_parameter
from skep.manager.routes.guard.strict_freezes import unfrozen
from skep.manager.routes.representations import has_labels, problems_of, shown_node
from skep.model.node import Availability, Node, NodeRole
from skep.model.options.labels import drains_now
from skep.store.interface import View

E = TypeVar("E", bound=Enum)

routes = Routes()


class _Membership(Enum):
    """Membership of a node.  All nodes are accepted, without manual approval."""

    ACCEPTED = "accepted"
    PENDING = "pending"


@routes.get("/nodes")
async def list_nodes(request: web.Request) -> web.StreamResponse:
    """List the nodes that match the filters, in order of id."""
    filters = Filters.of(request)
    filters.refuse_unknown("name", "id", "label", "role", "membership", "node.label")
    view = await current_view(request)
    problems = problems_of(view, Node)
    if not filters:
        return known_list_response(view.find(Node), shown_node, problems, manager_of(request).nodes)
    return json_list_response(_fitting(view, filters), partial(shown_node, problems))


def _fitting(view: View, filters: Filters) -> list[Node]:
    roles = _members(NodeRole, filters, "role")
    memberships = _members(_Membership, filters, "membership")
    return [
        node
        for node in view.find(Node)
        if filters.matches_prefix("name", node.description.hostname)
        and filters.matches_prefix("id", node.id)
        and has_labels(node.description.engine.labels, filters["label"])
        and has_labels(node.spec.labels, filters["node.label"])
        and (not roles or node.spec.role in roles)
        and (not memberships or _Membership.ACCEPTED in memberships)
    ]


def _members(cls: type[E], filters: Filters, key: str) -> set[E]:
    members = set()
    for word in filter(None, filters[key]):
        try:
            members.add(cls(word.lower()))
        except ValueError:
            raise Untranslated(f"Invalid {key} filter: '{word}'") from None
    return members


@routes.get("/nodes/{id}")
async def inspect_node(request: web.Request) -> web.StreamResponse:
    """Show one node."""
    view = await current_view(request)
    return json_response(shown_node(problems_of(view, Node), view.resolve(Node, request.match_info["id"])))


@routes.post("/nodes/{id}/update")
async def update_node(request: web.Request) -> web.StreamResponse:
    """Change labels, role and availability of a node."""
    body = await read_json(request, control.NodeUpdateBody)
    version = version_parameter(request, "node")
    spec = control.node_spec(body)
    node = (await current_view(request)).resolve(Node, request.match_info["id"])
    is_drained = spec.availability is Availability.DRAIN
    is_begun = is_drained and node.spec.availability is not Availability.DRAIN
    # Tasks that the drain has kept until then stop as well.
    is_hurried = is_drained and drains_now(spec.labels) and not drains_now(node.spec.labels)
    change = unfrozen(request, control.update_node) if is_begun or is_hurried else control.update_node
    await manager_of(request).update(change, node.id, spec, version)
    return web.Response()


@routes.delete("/nodes/{id}")
async def remove_node(request: web.Request) -> web.StreamResponse:
    """Remove a node that is down, or any worker with ``force``."""
    node = (await current_view(request)).resolve(Node, request.match_info["id"])
    manager, now_ns = manager_of(request), manager_of(request).clock.now_ns()
    await manager.update(control.remove_node, node.id, force=flag(request, "force"), now_ns=now_ns)
    return web.Response()
