"""Excludes unreachable peers from the tables while the node has no session with a manager.

A manager removes a failed node from the tables within seconds.  Without a manager, the failed node would stay in the
tables, and its share of connections would fail.  But nodes probe each other continuously.  So this node excludes the
endpoints of a peer that does not respond from its own tables: from published ports, virtual addresses and names.

* A service whose endpoints are all unreachable keeps them: some may still respond.
* If no peer responds at all, this node's own link is down, and nothing is excluded.
* A peer is included again after its first response, or when there is a session with a manager.

A node that was removed from its cluster publishes no ports any more, unless its containers keep running.  Its tables
show what has since moved, and the addresses in them soon belong to other tasks.

Services with ``skep.near`` also leave out tasks at other sites than the node's own (``model.options.labels.site_of``),
with or without a manager.  Virtual addresses, published ports, routes of the front door and the names ``SERVICE`` and
``tasks.SERVICE`` then lead to the tasks at this node's site.  If none of them serves, or this node has no site, they
lead to all.  Names of single tasks always resolve.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.race import LostRace, run_unless
from skep.model.networks.paths import PathCheck, PathReport
from skep.model.networks.tables import NetworkTable, TableEndpoint
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.values.ids import NodeId, ServiceId

log = structlog.get_logger()

URGENT_SECONDS = 2.0
"""Seconds without a manager's response before peers are probed more often.  A settled verdict needs two rounds."""
LOST_SECONDS = 5.0
"""Seconds without a manager's response before peers are excluded.  A change of managers takes less."""
FRESH_SECONDS = 35.0
"""Age of a session in seconds at which peers are included again.

Its manager first has to detect failed nodes itself.  A leader that was without a quorum, for example before
``skep cluster recover``, waits up to 30 seconds to register (``grace_after_absence``).  Changed tables follow.
"""
LOOK_SECONDS = 1.0
"""Seconds between two checks of the probes' reports."""


class Session(Protocol):
    """The node's session with a manager (``agent.session.session_state``)."""

    @property
    def has_session(self) -> bool:
        """Whether the node has a session now."""

    @property
    def removal(self) -> NodeRemoval | None:
        """Set while managers refuse this node because it was removed from the cluster."""

    def silence_s(self) -> float:
        """Return the seconds since a manager's last response."""

    async def wait_session(self) -> None:
        """Wait until the node has a session."""

    async def wait_no_session(self) -> None:
        """Wait until the node has no session."""


class Peers(Protocol):
    """Results of probing other nodes (``probe.prober``)."""

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """The latest report of each peer."""

    def set_urgent(self, is_urgent: bool) -> None:
        """Probe all peers now and more often, or return to the usual rate."""


class Unreachable(msgspec.Struct, frozen=True):
    """Peers that do not respond to probes, on unencrypted and on encrypted networks."""

    plain: frozenset[NodeId] = frozenset()
    encrypted: frozenset[NodeId] = frozenset()
    is_removed: bool = False
    """Whether this node was removed from the cluster, so that it publishes no ports."""

    def of(self, table: NetworkTable) -> frozenset[NodeId]:
        """Return the unreachable peers of one network."""
        return self.encrypted if table.head.is_encrypted else self.plain

    def hides(self, table: NetworkTable) -> bool:
        """Return whether this node does not serve what ``table`` publishes."""
        return self.is_removed and table.head.is_ingress

    def shown(self, table: NetworkTable) -> NetworkTable:
        """Return ``table`` as this node uses it."""
        if self.hides(table):
            return msgspec.structs.replace(table, services={}, endpoints={})
        left_out = self.of(table)
        return without(table, left_out) if left_out else table


NONE_UNREACHABLE = Unreachable()


def unreachable_peers(
    reports: Mapping[NodeId, PathReport], before: Unreachable = NONE_UNREACHABLE
) -> Unreachable:
    """Return the peers that do not respond, by their latest reports.

    Peers that were unreachable ``before`` stay so until they respond.  Others need a settled verdict.  A verdict also
    becomes unsettled if another check changes, for example because the peer stops being a manager.
    """
    return Unreachable(
        _failing(reports, PathCheck.OVERLAY, before.plain),
        _failing(reports, PathCheck.ENCRYPTED, before.encrypted),
    )


def _failing(
    reports: Mapping[NodeId, PathReport], check: PathCheck, before: frozenset[NodeId]
) -> frozenset[NodeId]:
    checked = {
        id: one.is_failing and (report.is_settled or id in before)
        for id, report in reports.items()
        for one in report.findings
        if one.check is check
    }
    found = frozenset(id for id, fails in checked.items() if fails)
    return found if len(found) < len(checked) else frozenset()


def without(table: NetworkTable, unreachable: frozenset[NodeId]) -> NetworkTable:
    """Return ``table`` without serving endpoints on ``unreachable`` nodes.

    A service that no other node serves keeps its endpoints."""
    reachable = {
        one.service_id
        for one in table.endpoints.values()
        if one.is_serving and one.node_id not in unreachable
    }
    changed = {
        id: msgspec.structs.replace(one, is_serving=False, is_left_out=True)
        for id, one in table.endpoints.items()
        if _is_excluded(one, unreachable, reachable)
    }
    return msgspec.structs.replace(table, endpoints={**table.endpoints, **changed}) if changed else table


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


def restored(table: NetworkTable) -> NetworkTable:
    """Return ``table`` as the managers sent it.  Undoes ``without`` and ``with_far_tasks``."""
    changed = {
        id: msgspec.structs.replace(
            one, is_serving=one.is_serving or one.is_left_out, is_left_out=False, is_far=False
        )
        for id, one in table.endpoints.items()
        if one.is_left_out or one.is_far
    }
    return msgspec.structs.replace(table, endpoints={**table.endpoints, **changed}) if changed else table


def _is_excluded(
    one: TableEndpoint, unreachable: frozenset[NodeId], reachable: Collection[ServiceId]
) -> bool:
    return (
        one.is_serving and one.node_id in unreachable and bool(one.service_id) and one.service_id in reachable
    )


async def watch(session: Session, peers: Peers, exclude: Callable[[Unreachable], None], clock: Clock) -> None:
    """Exclude unreachable peers whenever no manager responds, until cancelled."""
    while True:
        await session.wait_no_session()
        try:
            await _while_without_manager(session, peers, exclude, clock)
        finally:
            peers.set_urgent(False)
            exclude(NONE_UNREACHABLE)


async def _while_without_manager(
    session: Session,
    peers: Peers,
    exclude: Callable[[Unreachable], None],
    clock: Clock,
) -> None:
    gained_at: float | None = None
    before = NONE_UNREACHABLE
    while gained_at is None or clock.monotonic() - gained_at < FRESH_SECONDS:
        is_lost = not session.has_session
        if is_lost or gained_at is None:
            gained_at = None if is_lost else clock.monotonic()
        peers.set_urgent(is_lost and session.silence_s() >= URGENT_SECONDS)
        if session.silence_s() >= LOST_SECONDS or before != NONE_UNREACHABLE:
            found = unreachable_peers(peers.reports, before)
            if found != msgspec.structs.replace(before, is_removed=False):
                log.warning("unreachable peers excluded from network tables", peers=sorted(found.plain))
            removal = session.removal
            if removal is not None and not removal.keeps_containers:
                found = msgspec.structs.replace(found, is_removed=True)
            exclude(found)
            before = found
        try:
            changed = session.wait_session() if is_lost else session.wait_no_session()
            await run_unless(clock.sleep(LOOK_SECONDS), changed)
        except LostRace:
            if before == NONE_UNREACHABLE and is_lost:
                return  # nothing was excluded
