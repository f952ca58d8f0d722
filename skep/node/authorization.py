"""Tells the authorization which objects of this node a request is about.

For a cluster network it asks the manager, which knows the network's stack and checks the request again.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import web

from skep.api.access.authorization import stack_label_of
from skep.api.access.identity import IDENTITY_HEADER, identity_of, packed
from skep.api.access.permissions import (
    KnownObject,
    NewObject,
    PermissionRule,
    PermissionScope,
    RequestFacts,
    sees,
)
from skep.api.formats.networks import NetworkBody
from skep.api.http.server import read_json
from skep.engine.engine import Engine
from skep.errors import NotFound, PermissionDenied
from skep.model.permissions.access import Identity
from skep.model.values.stacks import STACK_LABEL
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.visible_containers import visible_container


class NodeObjects:
    """The objects of a node (``api.access.authorization.Objects``).  ``engine``: None on a node without containers."""

    def __init__(self, engine: Engine | None, cluster: ClusterNetworks) -> None:
        self._engine = engine
        self._cluster = cluster

    async def facts(self, request: web.Request, rule: PermissionRule) -> RequestFacts:
        """Return the facts that this node knows about the object of a request (see ``Objects``)."""
        if rule.scope is PermissionScope.NEW:
            body = await read_json(request, NetworkBody)
            if not body.is_of_cluster:
                raise PermissionDenied("only administrators may create networks of one node")
            # The manager that receives the request checks it.  But this node first compares the word with its own
            # networks' names, and a user must not be able to try names of other stacks there.
            return RequestFacts(new=(NewObject(name=body.name, stack=body.labels.get(STACK_LABEL, "")),))
        key = "id" if "id" in request.match_info else "name"
        word = request.match_info[key]
        match rule.kind:
            case "container":
                container = visible_container(self._engine, identity_of(request), word)
                known = KnownObject(id=container.id, stack=container.stack)
            case "volume":
                known = self._volume(identity_of(request), word)
            case "network":
                known = await self._network(request, word)
            case kind:
                raise PermissionDenied(f"only administrators may access a {kind} through a worker")
        request.match_info[key] = known.id
        return RequestFacts(known=known)

    def stack_of(self, kind: str, item: Mapping[str, Any]) -> str:
        """Return the stack of an object (see ``Objects``)."""
        if kind != "container":
            return stack_label_of(item)
        try:
            return self._engine.get(str(item.get("Id"))).stack if self._engine is not None else ""
        except NotFound:  # it was removed meanwhile
            return ""

    def _volume(self, identity: Identity, word: str) -> KnownObject:
        """Return the facts about a volume.  Raises: NotFound: ``identity`` may see no volume of that name."""
        labels = self._engine.volumes.labels(word) if self._engine is not None else None
        stack = labels.get(STACK_LABEL, "") if labels is not None else ""
        if labels is None or not sees(identity, stack):
            raise NotFound(f"get {word}: no such volume")
        return KnownObject(id=word, stack=stack)

    async def _network(self, request: web.Request, word: str) -> KnownObject:
        """Ask the manager for a network.

        Raises: the manager's error.  It is NotFound for one of the node's own networks.
        """
        headers = {IDENTITY_HEADER: packed(identity_of(request)).decode()}
        path = f"/networks/{quote(word, safe='')}"
        response = await self._cluster.request_manager("GET", path, b"", headers)
        if response.status >= 300:
            raise response.error()
        found = msgspec.json.decode(response.body)
        return KnownObject(id=found["Id"], stack=stack_label_of(found))
