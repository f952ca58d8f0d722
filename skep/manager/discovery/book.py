"""One network's table as it stands, and when each of its entries changed last.

Whoever knows the table as of some revision is told what changed since, each thing once and as it is now.  Nothing is
kept per reader; the memory of changes is bounded, and who is further behind is told everything.
"""

from collections.abc import Collection
from typing import TypeAlias, TypeVar

from skep.model.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.model.network import Network
from skep.model.tables import NetworkHead, Table, TableChange, TableEndpoint, TableNode, TableService, whole

K = TypeVar("K", bound=str)
V = TypeVar("V")

Entry: TypeAlias = tuple[str, str]
"""What kind of thing, and its id."""

HEAD: Entry = ("head", "")
NODE, ENDPOINT, SERVICE = "node", "endpoint", "service"

REMEMBERED_MIN = 1000
"""Changes that are remembered however small the table is; else as many as it has entries."""


class Book:
    """The table of one network, kept up to date by ``Ledger``; times are revisions of the store."""

    def __init__(self, id: NetworkId, revision: int, unread: Collection[ServiceId] = ()) -> None:
        """A table that is empty as of ``revision``.  ``unread``: services that cannot be read, as of now."""
        self._unread = unread
        self.id = id
        self.network: Network | None = None
        """As the store has it; None: it was removed while tasks still use it."""
        self.head: NetworkHead | None = None
        self.nodes: dict[NodeId, TableNode] = {}
        self.endpoints: dict[TaskId, TableEndpoint] = {}
        self.services: dict[ServiceId, TableService] = {}
        self.tasks: dict[TaskId, None] = {}
        """Those with a place here, wherever they run."""
        self.tasks_of_node: dict[NodeId, int] = {}
        self.changed_at = revision
        self._floor = revision
        """Everything that changed after this is in ``_changes``."""
        self._changes: dict[Entry, int] = {}
        """When each thing changed last, the earliest first."""

    # -- by the ledger ------------------------------------------------------------------------------------------

    def set_head(self, head: NetworkHead, revision: int) -> bool:
        """Whether that is news; so do the others."""
        if head == self.head:
            return False
        self.head = head
        return self._note(HEAD, revision)

    def set_node(self, id: NodeId, node: TableNode | None, revision: int) -> bool:
        return _set(self.nodes, id, node) and self._note((NODE, id), revision)

    def set_endpoint(self, id: TaskId, endpoint: TableEndpoint | None, revision: int) -> bool:
        return _set(self.endpoints, id, endpoint) and self._note((ENDPOINT, id), revision)

    def set_service(self, id: ServiceId, service: TableService | None, revision: int) -> bool:
        return _set(self.services, id, service) and self._note((SERVICE, id), revision)

    def begin_at(self, revision: int) -> None:
        """What is here now is how it was at ``revision``: when the parts of it changed is not known."""
        self._changes.clear()
        self._floor = self.changed_at = revision

    def _note(self, entry: Entry, revision: int) -> bool:
        self._changes.pop(entry, None)
        self._changes[entry] = self.changed_at = revision
        remembered = max(REMEMBERED_MIN, len(self.nodes) + len(self.endpoints) + len(self.services))
        while len(self._changes) > remembered:
            first = next(iter(self._changes))
            self._floor = self._changes.pop(first)
        return True

    # -- by readers ---------------------------------------------------------------------------------------------

    def table(self, revision: int) -> Table:
        """The whole of it, to be called that of ``revision``."""
        assert self.head is not None, "a book has its head before anybody reads it"
        return Table(
            head=self.head,
            revision=revision,
            nodes=dict(self.nodes),
            endpoints=dict(self.endpoints),
            services=dict(self.services),
            unread=tuple(sorted(self._unread)),
        )

    def is_news_for(self, told: int | None) -> bool:
        """Whether there is anything to tell who knows the table as of ``told`` (None: not at all)."""
        return told is None or self.changed_at > told

    def endpoint_changed_at(self, id: TaskId) -> int:
        """When the endpoint became what it is, or went; if that is not remembered, when it was so already."""
        return self._changes.get((ENDPOINT, id), self._floor)

    def since(self, told: int | None, revision: int) -> TableChange:
        """What leads from the table as of ``told`` to the present one, which is called that of ``revision``."""
        if told is None or told < self._floor:
            return whole(self.table(revision))
        assert self.head is not None, "as above"
        nodes: list[TableNode] = []
        endpoints: list[TableEndpoint] = []
        services: list[TableService] = []
        removed: dict[str, list[str]] = {NODE: [], ENDPOINT: [], SERVICE: []}
        for entry, changed_at in reversed(self._changes.items()):
            if changed_at <= told:
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


def counted(counts: dict[K, int], key: K, by: int) -> bool:
    """Add ``by`` to a count; whether the key came or went."""
    before = counts.get(key, 0)
    now = before + by
    assert now >= 0, f"{key} is counted below nothing"
    if now:
        counts[key] = now
    else:
        counts.pop(key, None)
    return bool(before) is not bool(now)


def _set(entries: dict[K, V], key: K, value: V | None) -> bool:
    """Put or remove; whether anything changed."""
    if value is None:
        return entries.pop(key, None) is not None
    if entries.get(key) == value:
        return False
    entries[key] = value
    return True
