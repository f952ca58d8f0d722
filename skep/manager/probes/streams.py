"""Streams of probes, with targets to the nodes and results back.  Active on every manager.

The results stay in the memory of the manager that has the node's session.  Only settled failures are written, and only
when they change.  So a cluster without failures writes nothing, whatever its size.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.time_slices import TimeSlices
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.manager.control_loops.informer import run_informer
from skep.manager.nodes.node_session import NodeSession, StreamWaker
from skep.manager.nodes.node_streams import NodeStream, NodeStreams, run_stream, session_named
from skep.manager.probes.directory import (
    NodeDirectory,
    changes_directory,
    directory_of,
    managers_for,
    targets_for,
)
from skep.manager.probes.nat import NatPlan
from skep.manager.probes.plan import ALL_PAIRS_MAX, ProbePlan
from skep.manager.probes.records import WRITTEN_MAX, PathRecord, record_paths
from skep.model.networks.data_planes import data_path_port, probes_paths
from skep.model.networks.paths import (
    DiagnosticsRequest,
    NetworkNames,
    PathCheck,
    PathPeer,
    PathReport,
    ProbeTargets,
)
from skep.model.node import FailingPath, Node
from skep.model.swarm import Swarm
from skep.model.values.ids import NetworkId, NodeId
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.convert.paths import diagnostics_to_pb, reports_from_pb, targets_to_pb
from skep.wire.service import Handler, duplex

log = structlog.get_logger(__name__)

CHECK_S = 0.5
"""Seconds between two checks for work to plan or write."""
PLAN_PAUSE_S = 5.0
"""Minimum seconds between two plans of a large cluster, so that thousands of joining nodes cause few plans."""
PLAN_AGAIN_S = 30.0
"""Seconds between two plans of a large cluster, which take 0.2 s for 5,000 nodes."""
PLAN_AGAIN_SMALL_S = 5.0
"""Seconds between two plans without a change of nodes, in large and small clusters.

The networks of nodes change with their tasks.
"""
AT_ONCE = 200
"""Nodes written per check.  The others wait for the next check."""
REPORTS_MAX = 256
"""Reports in one message.  More than any node has peers."""

Send = Callable[[skep.ProbeOrder], Awaitable[None]]


class Networks(Protocol):
    """The networks of nodes (``discovery.state.DiscoveryState``)."""

    def networks_of(self, node_id: NodeId) -> Sequence[NetworkId]:
        """Return the networks that carry the node's tasks or published ports."""

    def is_encrypted(self, network_id: NetworkId) -> bool:
        """Return whether the network is encrypted.  False for a network without a table."""

    def names_for(self, node_id: NodeId) -> tuple[NetworkNames, ...]:
        """Return the expected addresses of names on some of the node's networks."""


class ProbeStreams:
    """The probe streams of this manager's nodes."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        session: Callable[[NodeId, str], NodeSession],
        networks: Networks,
        clock: Clock,
    ) -> None:
        """``session`` returns a node's session here by its id, or raises SkepError."""
        self._store = store
        self._own = own
        self._session = session
        self._networks = networks
        self._clock = clock
        self.streams: NodeStreams[_Stream] = NodeStreams("paths")
        self.directory = NodeDirectory(peers={})
        self._plan = ProbePlan((), {})
        self._is_stale = True
        self._planned_at = float("-inf")

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (duplex(methods.PATHS, self._paths),)

    def nodes(self) -> tuple[NodeId, ...]:
        """Return the nodes with an open stream."""
        return tuple(sorted(self.streams))

    async def run_diagnostics(
        self, node_id: NodeId, *, throughput: bool
    ) -> tuple[tuple[PathReport, ...], str]:
        """Run a node's probes now.  Returns the reports, and why they are incomplete, if so.  The caller limits the
        time.

        Raises:
            Unavailable: The node has no stream here, or loses it in the meantime.
        """
        stream = self.streams.get(node_id)
        if stream is None:
            raise Unavailable(f"node {node_id} is not connected to this manager")
        targets = stream.targets.peers if stream.targets is not None else ()
        known = {peer.node_id for peer in targets}
        managers = (peer for peer in managers_for(node_id, self.directory) if peer.node_id not in known)
        peers = (*targets, *managers)
        names = self._networks.names_for(node_id)
        return await stream.run_diagnostics(
            DiagnosticsRequest(peers=peers, throughput=throughput, names=names)
        )

    async def run(self) -> None:
        """Plan and write until cancelled."""
        await run_informer(
            self._store,
            (Node, Swarm),
            on_snapshot=self._on_snapshot,
            on_commit=self._on_commit,
            work=self._work,
        )

    # -- probe targets --------------------------------------------------------------------------------------------

    def _on_snapshot(self, _view: View) -> None:
        self._is_stale = True

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Updated(Node() as old, Node() as new):
                    self._is_stale |= changes_directory(old, new)
                case Created() | Deleted() | Updated(Swarm(), Swarm()):
                    self._is_stale = True

    async def _work(self) -> None:
        while True:
            now = self._clock.monotonic()
            is_small = len(self.directory.peers) <= ALL_PAIRS_MAX
            pause_s = 0.0 if is_small else PLAN_PAUSE_S
            again_s = PLAN_AGAIN_SMALL_S if is_small else PLAN_AGAIN_S
            if now - self._planned_at >= (pause_s if self._is_stale else again_s):
                self._is_stale = False
                self._planned_at = now
                await self._update_plan()
            await self._write()
            await tick(self._clock, CHECK_S)

    async def _update_plan(self) -> None:
        view = self._store.view()
        nodes, swarms = view.find(Node), view.find(Swarm)
        slices = TimeSlices(self._clock)
        if len(nodes) <= ALL_PAIRS_MAX:
            self.directory, self._plan = _planned(nodes, swarms, {}, self.directory.nat)
        else:
            networks: dict[NodeId, Sequence[NetworkId]] = {}
            for node in nodes:
                networks[node.id] = self._networks.networks_of(node.id)
                await slices.yield_if_due()
            # Pure computation: 0.2 s for 5,000 nodes.
            self.directory, self._plan = await asyncio.to_thread(
                _planned, nodes, swarms, networks, self.directory.nat
            )
        for stream in tuple(self.streams.values()):
            self._update_targets(stream)
            await slices.yield_if_due()
        without_probes = [node for node in nodes if node.failing_paths and not probes_paths(node)]
        for node in without_probes:
            await self._clear_failing(node)

    def _update_targets(self, stream: "_Stream") -> None:
        """Send the stream's current targets if they changed."""
        targets = targets_for(stream.node_id, self.directory, self._plan, self._encrypted)
        if targets != stream.targets:
            stream.set_targets(targets)

    def _encrypted(self, node_id: NodeId) -> Sequence[NetworkId]:
        networks = self._networks.networks_of(node_id)
        return [id for id in networks if self._networks.is_encrypted(id)]

    # -- stored failures ------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        view = self._store.view()
        due: list[PathRecord] = []
        for stream in self.streams.values():
            if not stream.is_dirty:
                continue
            node = view.lookup(Node, stream.node_id)
            failing = stream.results.failing()
            if node is None or node.failing_paths == failing:
                stream.is_dirty = False
            elif len(due) < AT_ONCE:
                due.append(PathRecord(node_id=stream.node_id, session_id=stream.session.id, failing=failing))
        if not due:
            return
        results = await self._store.update_each(record_paths, due)
        for record, result in zip(due, results, strict=True):
            words = ", ".join(path.summary for path in record.failing)
            if isinstance(result, SkepError):
                log.warning("failing paths not written, will retry", node=record.node_id, error=str(result))
            elif result and record.failing:
                log.warning("node cannot reach others", node=record.node_id, paths=words)
            elif result:
                log.info("node reaches all others", node=record.node_id)

    async def _clear_failing(self, node: Node) -> None:
        """Clear the failing paths of a node that now runs an older version, which would never report their recovery."""
        if node.session is None or node.session.manager_id != self._own:
            return
        record = PathRecord(node_id=node.id, session_id=node.session.session_id, failing=())
        try:
            await self._store.update(record_paths, record)
        except SkepError as error:
            self._is_stale = True
            log.warning("failing paths not written, will retry", node=node.id, error=str(error))

    # -- streams --------------------------------------------------------------------------------------------------

    async def _paths(self, requests: AsyncIterator[skep.ProbeUpdate], send: Send, caller: Caller) -> None:
        session = self._session(caller.node_id, await session_named(requests))
        node = self._store.view().lookup(Node, caller.node_id)
        results = ProbeResults(node.failing_paths if node is not None else ())
        with (
            session.signal() as signal,
            self.streams.open(_Stream(caller.node_id, session, signal, results)) as stream,
        ):
            self._update_targets(stream)
            await run_stream(stream, requests, stream.receive, stream.send_orders(send))


def _planned(
    nodes: Iterable[Node],
    swarms: Iterable[Swarm],
    networks: Mapping[NodeId, Sequence[NetworkId]],
    tunnels: NatPlan,
) -> tuple[NodeDirectory, ProbePlan]:
    directory = directory_of(nodes, data_path_port(swarms), tunnels)
    return directory, ProbePlan(directory.peers, networks)


_RANK: dict[str, int] = {
    PathCheck.OVERLAY: 0,
    PathCheck.ENCRYPTED: 1,
    PathCheck.CONTROL: 2,
    PathCheck.ETCD: 3,
}
"""Priority in which failing paths are written if there are too many."""


class ProbeResults:
    """The results of one node in one session.

    ``stored`` are the failing paths that were written before.  They count until the node reports something else.
    """

    def __init__(self, stored: Iterable[FailingPath]) -> None:
        self._failing: dict[NodeId, tuple[FailingPath, ...]] = {}
        for path in stored:
            self._failing[path.peer] = (*self._failing.get(path.peer, ()), path)

    def record(self, reports: Iterable[PathReport], peers: Mapping[NodeId, PathPeer]) -> None:
        """Record reports.  Reports of a first round, or about other nodes than ``peers``, are ignored."""
        for report in reports:
            peer = peers.get(report.peer)
            if peer is None or not report.is_settled:
                continue
            self._failing[peer.node_id] = tuple(
                FailingPath(
                    peer=peer.node_id, hostname=peer.hostname, check=finding.check.value, port=finding.port
                )
                for finding in report.failing
            )

    def retain(self, peers: Collection[NodeId]) -> None:
        """Forget all nodes but ``peers``.  The others are not probed now."""
        self._failing = {id: paths for id, paths in self._failing.items() if id in peers}

    def failing(self) -> tuple[FailingPath, ...]:
        """Return the failing paths to write: at most ``WRITTEN_MAX``, containers' traffic first."""
        paths = [path for paths in self._failing.values() for path in paths]
        paths.sort(key=lambda path: (_RANK.get(path.check, len(_RANK)), path.peer, path.check))
        return tuple(paths[:WRITTEN_MAX])


class _Stream(NodeStream):
    """One node's stream."""

    def __init__(
        self, node_id: NodeId, session: NodeSession, signal: StreamWaker, results: ProbeResults
    ) -> None:
        super().__init__(node_id, session, signal)
        self.results = results
        self.targets: ProbeTargets | None = None
        self.is_dirty = False
        """Whether the written failures may be out of date."""
        self._sent: ProbeTargets | None = None
        self._peers: Mapping[NodeId, PathPeer] = {}
        self._one_at_a_time = asyncio.Lock()
        self._diagnostics: tuple[int, DiagnosticsRequest] | None = None
        """A request that was not sent yet."""
        self._numbers = 0
        self._result: asyncio.Future[tuple[tuple[PathReport, ...], str]] | None = None

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Replace the node's probe targets."""
        self.targets = targets
        self._peers = {peer.node_id: peer for peer in targets.peers} if targets is not None else {}
        self.results.retain(self._peers)
        self.is_dirty = True
        self.signal.wake()

    def receive(self, message: skep.ProbeUpdate) -> None:
        """Record a node's message.  Raises: InvalidArgument: it has more reports than any node."""
        if len(message.reports) > REPORTS_MAX:
            raise InvalidArgument(f"more than {REPORTS_MAX} reports of paths at once")
        reports = reports_from_pb(message.reports)
        if not message.diagnostics:
            self.results.record(reports, self._peers)
            self.is_dirty = True
        elif message.diagnostics == self._numbers and self._result is not None and not self._result.done():
            self._result.set_result((reports, message.error))

    async def run_diagnostics(self, diagnostics: DiagnosticsRequest) -> tuple[tuple[PathReport, ...], str]:
        """Run diagnostics, one request at a time.  Raises: the error that ended the stream."""
        async with self._one_at_a_time:
            self.require_open()
            self._numbers += 1
            self._result = asyncio.get_running_loop().create_future()
            self._diagnostics = (self._numbers, diagnostics)
            self.signal.wake()
            try:
                return await self._result
            finally:
                self._result = self._diagnostics = None

    async def send_orders(self, send: Send) -> None:
        """Send targets whenever they change, and requests for diagnostics.  Raises: the error that ended the stream."""
        while True:
            self.require_open()
            order = skep.ProbeOrder()
            if self.targets is not None and self.targets != self._sent:
                order.targets.CopyFrom(targets_to_pb(self.targets))
                self._sent = self.targets
            if self._diagnostics is not None:
                order.diagnostics.CopyFrom(diagnostics_to_pb(*self._diagnostics))
                self._diagnostics = None
            if order.ByteSize():
                await send(order)
            del order
            await self.signal.wait()

    def end(self, error: Exception) -> None:
        """End the stream and pending diagnostics."""
        super().end(error)
        if self._result is not None and not self._result.done():
            self._result.set_exception(Unavailable(str(self.error)))
