"""A network's table, with the revision of the last change of each entry.

A reader that has the table of some revision gets the entries that have changed since, each once and in its current
state.  The table keeps no data about readers, and a bounded number of changes.  A reader that is further behind gets
the whole table.
"""

from collections.abc import Collection
from typing import TypeAlias, TypeVar

from skep.model.network import Network
from skep.model.networks.paths import NetworkNames
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    TableChange,
    TableEndpoint,
    TableNode,
    TableService,
    whole,
)
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

K = TypeVar("K", bound=str)
V = TypeVar("V")

Entry: TypeAlias = tuple[str, str]
"""Kind of entry, and its id."""

HEAD: Entry = ("head", "")
NODE, ENDPOINT, SERVICE = "node", "endpoint", "service"

NAMES_MAX = 200
"""Maximum service names of one network that diagnostics check."""
KEPT_MIN = 1000
"""Minimum number of kept changes.  More are kept if the table has more entries."""


class VersionedTable:
    """The table of one network, updated by ``NetworkTables``.  Versions are revisions of the store."""

    def __init__(self, id: NetworkId, revision: int, unread: Collection[ServiceId] = ()) -> None:
        """Create an empty table as of ``revision``.  ``unread`` has the services that are unreadable now."""
        self._unread = unread
        self.id = id
        self.network: Network | None = None
        """The network object, or None if it was removed while tasks still use it."""
        self.head: NetworkHead | None = None
        self.nodes: dict[NodeId, TableNode] = {}
        self.endpoints: dict[TaskId, TableEndpoint] = {}
        self.services: dict[ServiceId, TableService] = {}
        self.tasks: dict[TaskId, None] = {}
        """Tasks attached to the network, on any node."""
        self.tasks_of_node: dict[NodeId, int] = {}
        self.managers: dict[NodeId, int] = {}
        """Managers that send tables to nodes with tasks on the network, with the number of these nodes."""
        self.changed_at = revision
        self._floor = revision
        """All changes after this revision are in ``_changes``."""
        self._changes: dict[Entry, int] = {}
        """Revision of each entry's last change, the earliest first."""

    # -- for NetworkTables ---------------------------------------------------------------------------------------

    def set_head(self, head: NetworkHead, revision: int) -> bool:
        """Set the head.  Returns whether it changed, as the other setters do."""
        if head == self.head:
            return False
        self.head = head
        return self._record_change(HEAD, revision)

    def set_node(self, id: NodeId, node: TableNode | None, revision: int) -> bool:
        """Set a node's entry, or remove it with None."""
        return _set(self.nodes, id, node) and self._record_change((NODE, id), revision)

    def set_endpoint(self, id: TaskId, endpoint: TableEndpoint | None, revision: int) -> bool:
        """Set a task's entry, or remove it with None."""
        return _set(self.endpoints, id, endpoint) and self._record_change((ENDPOINT, id), revision)

    def set_service(
        self, id: ServiceId, service: TableService | None, revision: int, *, is_forced: bool
    ) -> bool:
        """Set a service's entry, or remove it with None.  With ``is_forced``, readers may have another entry."""
        is_changed = _set(self.services, id, service) or is_forced
        return is_changed and self._record_change((SERVICE, id), revision)

    def reset_changes(self, revision: int) -> None:
        """Treat the current table as new at ``revision``, and forget the revisions of its entries."""
        self._changes.clear()
        self._floor = self.changed_at = revision

    def _record_change(self, entry: Entry, revision: int) -> bool:
        self._changes.pop(entry, None)
        self._changes[entry] = self.changed_at = revision
        kept_max = max(KEPT_MIN, len(self.nodes) + len(self.endpoints) + len(self.services))
        while len(self._changes) > kept_max:
            first = next(iter(self._changes))
            self._floor = self._changes.pop(first)
        return True

    # -- for readers ---------------------------------------------------------------------------------------------

    def table(self, revision: int) -> NetworkTable:
        """Return the whole table, with ``revision`` as its revision."""
        assert self.head is not None, "the head is set before the table is read"
        return NetworkTable(
            head=self.head,
            revision=revision,
            nodes=dict(self.nodes),
            endpoints=dict(self.endpoints),
            services=dict(self.services),
            unread=tuple(sorted(self._unread)),
        )

    def has_changed_since(self, sent: int | None) -> bool:
        """Return whether the table differs from the table of revision ``sent`` (None if nothing was sent)."""
        return sent is None or self.changed_at > sent

    def endpoint_changed_at(self, id: TaskId) -> int:
        """Return the revision of the endpoint's last change or removal.  If that is unknown by now, return a later
        revision.
        """
        return self._changes.get((ENDPOINT, id), self._floor)

    def since(self, sent: int | None, revision: int) -> TableChange:
        """Return the change from revision ``sent`` of the table to the current table, whose revision is
        ``revision``.
        """
        if sent is None or sent < self._floor:
            return whole(self.table(revision))
        assert self.head is not None, "as above"
        nodes: list[TableNode] = []
        endpoints: list[TableEndpoint] = []
        services: list[TableService] = []
        removed: dict[str, list[str]] = {NODE: [], ENDPOINT: [], SERVICE: []}
        for entry, changed_at in reversed(self._changes.items()):
            if changed_at <= sent:
                break
            kind, id = entry
            if node := self.nodes.get(NodeId(id)) if kind == NODE else None:
                nodes.append(node)
            elif endpoint := self.endpoints.get(TaskId(id)) if kind == ENDPOINT else None:
                endpoints.append(endpoint)
            elif service := self.services.get(ServiceId(id)) if kind == SERVICE else None:
                services.append(service)
            elif entry != HEAD:
                removed[kind].append(id)
        return TableChange(
            head=self.head,
            revision=revision,
            nodes=tuple(nodes),
            removed_nodes=tuple(map(NodeId, removed[NODE])),
            endpoints=tuple(endpoints),
            removed_endpoints=tuple(map(TaskId, removed[ENDPOINT])),
            services=tuple(services),
            removed_services=tuple(map(ServiceId, removed[SERVICE])),
        )


def names_in(table: VersionedTable) -> NetworkNames | None:
    """Return the names of services with virtual addresses, for comparison with a node's DNS responses.

    None if names are not resolved on the network.  A name of several services, or of a service without a virtual
    address, is left out: its addresses change with each task.
    """
    if table.head is None or table.head.is_ingress:
        return None
    found: dict[str, tuple[str, ...]] = {}
    several: set[str] = set()
    for service in table.services.values():
        for name in dict.fromkeys((service.name, *service.aliases)):
            if name in found:
                several.add(name)
            found[name] = tuple(sorted(service.virtual_ips))
    names = sorted(name for name, addresses in found.items() if addresses and name not in several)
    return NetworkNames(
        network_id=table.id,
        network=table.head.name,
        names={name: found[name] for name in names[:NAMES_MAX]},
    )


def counted(counts: dict[K, int], key: K, by: int) -> bool:
    """Add ``by`` to a count.  Returns whether the key appeared or disappeared."""
    before = counts.get(key, 0)
    now = before + by
    assert now >= 0, f"{key} is counted below nothing"
    if now:
        counts[key] = now
    else:
        counts.pop(key, None)
    return bool(before) is not bool(now)


def _set(entries: dict[K, V], key: K, value: V | None) -> bool:
    """Set or remove an entry.  Returns whether anything changed."""
    if value is None:
        return entries.pop(key, None) is not None
    if entries.get(key) == value:
        return False
    entries[key] = value
    return True
