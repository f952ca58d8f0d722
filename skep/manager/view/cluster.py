"""The row of the cluster as a whole, from the stored state and this manager's own, without requests to others."""

from collections.abc import Callable

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.cluster import known_cluster
from skep.manager.control.swarm import frozen_message
from skep.manager.quorum import Quorum
from skep.manager.routes.warnings import warnings_of
from skep.manager.view.rows import ClusterRow, ManagersRow
from skep.model.node import Node, Reachability
from skep.store.interface import Store, View

_WARNINGS_MAX = 20
"""Maximum number of warnings in the cluster's row."""


class ClusterRows:
    """``quorum`` returns whether a leader exists, as seen by this manager."""

    def __init__(self, store: Store, clock: Clock, quorum: Callable[[], Quorum]) -> None:
        self._store = store
        self._clock = clock
        self._quorum = quorum

    async def row(self, view: View) -> ClusterRow:
        """Return the row for ``view``."""
        managers = [node for node in view.find(Node) if node.manager_status is not None]
        quorum = self._quorum()
        leaders = [
            node.id for node in managers if node.manager_status is not None and node.manager_status.leader
        ]
        answering = {
            one.id for one in quorum.managers if (one.has_quorum if quorum.has_leader else one.is_reachable)
        }
        led = any(one.has_quorum for one in quorum.managers)
        leaderless = "this manager has" if led else "the managers have"
        warnings = [
            *([] if quorum.has_leader else [f"WARNING: {leaderless} no leader since {quorum.since}"]),
            *([f"WARNING: {quorum.own_error}"] if quorum.own_error else []),
            *await warnings_of(self._store, self._clock.now_ns()),
        ]
        return replace(
            stored_cluster_row(view),
            managers=ManagersRow(
                total=len(managers),
                reachable=sum(node.id in answering for node in managers),
                leader=leaders[0] if leaders and quorum.has_leader else "",
            ),
            warnings=tuple(warnings[:_WARNINGS_MAX]),
        )


def stored_cluster_row(view: View) -> ClusterRow:
    """Return the row of a state, which may be an earlier one.  Warnings exist only for the current state."""
    swarm = known_cluster(view)
    managers = {node.id: node.manager_status for node in view.find(Node) if node.manager_status is not None}
    freeze = swarm.freeze if swarm is not None else None
    return ClusterRow(
        id=swarm.id if swarm is not None else "",
        name=swarm.spec.name if swarm is not None else "",
        managers=ManagersRow(
            total=len(managers),
            reachable=sum(one.reachability is Reachability.REACHABLE for one in managers.values()),
            leader=next((id for id, one in managers.items() if one.leader), ""),
        ),
        warnings=(),
        replacement_suspended=frozen_message(freeze) if freeze is not None else "",
    )
