"""``/_skep/warnings``: the warnings of ``docker info``, on the manager's own socket only.  A Skep extension."""

from collections.abc import Iterable, Iterator

from aiohttp import web

from skep.api.http.server import Routes, json_response
from skep.errors import Unavailable
from skep.manager.acme.showing import certificate_warnings
from skep.manager.ca.expiry_warnings import expiring
from skep.manager.ca.rotation import rotation_warnings
from skep.manager.control.tasks import damage_of
from skep.manager.failover.editing import address_warnings
from skep.manager.notify.showing import backup_warnings, delivery_warnings
from skep.manager.routes.access import manager_of
from skep.manager.verify.records import warning as violation_warning
from skep.model.networks.data_planes import (
    DATA_PATH_LABEL,
    REFUSED_DATA_PATH_LABEL,
    REFUSED_TUNNEL_LABEL,
    claimed_underlay,
    holder,
    is_docker_node,
    usable_address,
)
from skep.model.node import Node, NodeState
from skep.model.options.freezes import CLUSTER
from skep.model.swarm import Swarm
from skep.model.values.times import moment
from skep.store.interface import Store, View
from skep.store.schema import SCHEMAS
from skep.store.space import warning

routes = Routes()

_DAMAGED_SHOWN = 10
"""Unreadable objects that the warnings name."""


@routes.get("/_skep/warnings")
async def warnings(request: web.Request) -> web.Response:
    """Return warnings, the most urgent first.  They use local state, so they work without a leader."""
    manager = manager_of(request)
    return json_response(await warnings_of(manager.store, manager.clock.now_ns()))


async def warnings_of(store: Store, now_ns: int) -> list[str]:
    """Return the warnings that follow from one manager's replica."""
    view = store.view()
    return [
        *(expiry.warning for expiry in expiring(view, moment(now_ns))),
        *damage_warnings(view),
        *rotation_warnings(view),
        *await _space_warnings(store),
        *delivery_warnings(view),
        *backup_warnings(view),
        *certificate_warnings(view, now_ns),
        *address_warnings(view),
        *data_path_warnings(view.find(Node)),
        *freeze_warnings(view),
        *(f"WARNING: {one}" for one in [violation_warning(view)] if one),
    ]


def freeze_warnings(view: View) -> Iterator[str]:
    """Yield warnings about freezes.  They name no stacks, because every user reads them."""
    for swarm in view.find(Swarm):
        if (freeze := swarm.change_freezes.get(CLUSTER)) is not None:
            yield f"WARNING: {freeze.words(CLUSTER)}"
        if number := len(swarm.change_freezes.keys() - {CLUSTER}):
            yield f"WARNING: {number} {'stack is' if number == 1 else 'stacks are'} frozen (skep cluster freeze)"


async def _space_warnings(store: Store) -> list[str]:
    try:
        space = await store.space()
    except Unavailable:
        return []  # the manager's status shows the reason
    sentence = warning(space) if space is not None else ""
    return [f"WARNING: {sentence}"] if sentence else []


def damage_warnings(view: View) -> Iterator[str]:
    """Yield a warning about each of the first few objects that cannot be read."""
    found = [
        (schema.name, id, damage_of(view, schema.type, id))
        for schema in SCHEMAS
        for id in sorted({*view.unreadable(schema.type), *view.damaged(schema.type)})
    ]
    for kind, id, damage in found[:_DAMAGED_SHOWN]:
        yield f"WARNING: {kind} {id} in this manager's store: {damage}; it is not changed (docs/guide/recovery.md)"
    if len(found) > _DAMAGED_SHOWN:
        yield f"WARNING: {len(found) - _DAMAGED_SHOWN} further objects in this manager's store cannot be read"


def data_path_warnings(nodes: Iterable[Node]) -> list[str]:
    """Return a warning for each node whose address belongs to another node, or cannot be a machine's address."""
    up = [node for node in nodes if node.status.state is not NodeState.DOWN and not is_docker_node(node)]
    claiming: dict[str, list[Node]] = {}
    for node in up:
        if (claimed := claimed_underlay(node)) is not None:
            claiming.setdefault(claimed, []).append(node)
    owners = {address: holder(here) for address, here in claiming.items()}
    names = {node.id: node.shown_name for node in up}
    found = []
    for node in up:
        labels, claimed = node.description.engine.labels, claimed_underlay(node)
        announced = labels.get(DATA_PATH_LABEL, "")
        if REFUSED_DATA_PATH_LABEL in labels:
            found.append(
                f"node {names[node.id]}: its data path address {labels[REFUSED_DATA_PATH_LABEL]!r} belongs to "
                "another node and is not used"
            )
        elif REFUSED_TUNNEL_LABEL in labels:
            found.append(
                f"node {names[node.id]}: its key of tunnels through NAT belongs to another node and is not used: "
                "restart its machine, which makes a new one"
            )
        elif claimed is not None and (owner := owners[claimed]) is not None and owner != node.id:
            found.append(
                f"node {names[node.id]}: its data path address {claimed} belongs to node "
                f"{names[owner]}, so its overlay networks reach no other node"
            )
        elif announced and not usable_address(announced):
            found.append(
                f"node {names[node.id]}: its data path address {announced!r} is not a machine's address and is not used"
            )
    return found
