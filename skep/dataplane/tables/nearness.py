"""Prefers tasks at this node's own site, for services with ``skep.near``.  Pure.

Nodes have a site by a label (``model.options.labels.site_of``).  Virtual addresses, published ports, routes of the
front door and the names ``SERVICE`` and ``tasks.SERVICE`` then lead to the tasks at this node's site.  If none of them
serves, or this node has no site, they lead to all.  Names of single tasks always resolve.
"""

import msgspec

from skep.model.networks.tables import NetworkTable, TableEndpoint
from skep.model.values.ids import NodeId


def with_far_tasks(table: NetworkTable, own: NodeId) -> NetworkTable:
    """Return ``table`` with the tasks marked that node ``own`` does not use, because others are nearer."""
    near = frozenset(id for id, service in table.services.items() if service.is_near)
    site = table.nodes[own].site if near and own in table.nodes else ""
    if not site:
        return table

    def is_here(one: TableEndpoint) -> bool:
        node = table.nodes.get(one.node_id)
        return node is not None and node.site == site

    serving = [one for one in table.endpoints.values() if one.is_serving and one.service_id in near]
    served_here = frozenset(one.service_id for one in serving if is_here(one))
    far = {
        one.task_id: msgspec.structs.replace(one, is_far=True)
        for one in serving
        if one.service_id in served_here and not is_here(one)
    }
    return msgspec.structs.replace(table, endpoints={**table.endpoints, **far}) if far else table
