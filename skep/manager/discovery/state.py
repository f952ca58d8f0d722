"""State of discovery: the tables of all networks, and what this manager's nodes have applied of them."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from skep.manager.discovery.acknowledgements import Acknowledgements
from skep.manager.discovery.derive import overlay_attachments
from skep.manager.discovery.network_tables import AffectedStreams, TableBuilder
from skep.manager.discovery.versioned_table import names_in
from skep.model.networks.paths import NetworkNames
from skep.model.task import Task
from skep.model.values.ids import NetworkId, NodeId
from skep.store.interface import Commit, View, WatchLagged

COMMITS_MAX = 10_000
"""Maximum commits that wait to be handled.  If there are more, everything is loaded again."""
NAMED_NETWORKS_MAX = 16
"""Maximum networks of a node whose names its diagnostics compare."""


class DiscoveryState:
    """Network tables, as of the last handled commit."""

    def __init__(self, own: NodeId) -> None:
        self._own = own
        self._commits: deque[Commit] = deque()
        self.tables = TableBuilder()
        self.acknowledgements = Acknowledgements()
        self.handled = 0
        """The store revision that the tables and ``acknowledgements`` have reached."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Start over from a snapshot, which is valid until the first pause."""
        self.handled = 0
        self._commits.clear()
        self.tables = TableBuilder()
        return self.tables.begin(snapshot)

    def on_commit(self, commit: Commit) -> None:
        """Queue a commit."""
        if len(self._commits) >= COMMITS_MAX:
            raise WatchLagged(f"{COMMITS_MAX} commits wait to be handled by the network tables")
        self._commits.append(commit)

    def changes(self) -> Iterator[AffectedStreams]:
        """Apply the queued commits to the tables, and yield the streams that each of them affects."""
        while self._commits:
            yield self.tables.note(self._commits.popleft())

    def count(self, id: NodeId) -> None:
        """Update the networks of a node in ``acknowledgements`` from the tables."""
        session_id = self.tables.session_with(self._own, id)
        if session_id is None:
            self.acknowledgements.remove_node(id)
        else:
            self.acknowledgements.set_networks(id, session_id, self.tables.networks_of(id))

    # -- for the probes between nodes ----------------------------------------------------------------------------

    def networks_of(self, node_id: NodeId) -> Sequence[NetworkId]:
        """Return the networks that carry tasks of the node, or its published ports."""
        return self.tables.networks_of(node_id)

    def is_encrypted(self, network_id: NetworkId) -> bool:
        """Return whether the network is encrypted.  False for a network without a table."""
        table = self.tables.tables.get(network_id)
        return table is not None and table.head is not None and table.head.is_encrypted

    def names_for(self, node_id: NodeId) -> tuple[NetworkNames, ...]:
        """Return the expected addresses of names on some of the node's networks, from the store."""
        tables = (self.tables.tables[id] for id in self.tables.networks_of(node_id))
        return tuple(islice(filter(None, map(names_in, tables)), NAMED_NETWORKS_MAX))

    # -- for the draining of tasks ------------------------------------------------------------------------------

    def not_serving(self, task: Task, revision: int) -> Mapping[NetworkId, int] | None:
        """Return since which revision the task serves in none of its networks.

        None if it does, or if the tables have not reached ``revision``.
        """
        tables = [self.tables.tables[id] for id in overlay_attachments(task) if id in self.tables.tables]
        found = (table.endpoints.get(task.id) for table in tables)
        is_serving = any(endpoint is not None and endpoint.is_serving for endpoint in found)
        if is_serving or self.tables.revision < revision:
            return None
        # After a restart from a snapshot the change's revision is unknown: it is this one or an earlier one.
        return {table.id: min(table.endpoint_changed_at(task.id), revision) for table in tables}

    @property
    def sessions_changed_at(self) -> int:
        """The revision of the last change of the sessions over which nodes receive tables."""
        return self.tables.table_sessions.changed_at

    def managers_on(self, network_id: NetworkId) -> Collection[NodeId]:
        """Return the managers that send the network's table to nodes."""
        return self.tables.managers_on(network_id)

    def managers_of_moved(self, network_id: NetworkId, revision: int) -> frozenset[NodeId]:
        """Return the managers of nodes on the network whose sessions changed after ``revision``."""
        return self.tables.managers_of_moved(network_id, revision)
