"""The services that nodes use: sessions and tasks, tables of networks, probes, logs, tunnels and images."""

from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from typing import Any

from skep.manager.autoscaling.waking import Wakes
from skep.manager.control.quotas import check_quota
from skep.manager.discovery.draining import Draining
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.dispatcher.node_sessions.sessions import LiveSession
from skep.manager.environment import ManagerEnvironment
from skep.manager.failover.keeper import FailoverKeeper
from skep.manager.gossip.relay import GossipRelay
from skep.manager.link.loop import ManagerLink
from skep.manager.logbroker.broker import LogBroker
from skep.manager.nodes.attachment_service import AttachmentService
from skep.manager.nodes.image_directory import ImageDirectory
from skep.manager.nodes.tunnels import NodeTunnels
from skep.manager.nodes.worker_reads import WorkerReads
from skep.manager.peer_reports import PeerReports
from skep.manager.probes.diagnostics import Diagnostics
from skep.manager.probes.streams import ProbeStreams
from skep.model.logs import LogQuery
from skep.model.values.ids import NodeId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.convert.logs import query_to_pb
from skep.wire.service import Handler


class LinkRelays:
    """Implements ``logbroker.broker.Relays``."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link

    async def relay_logs(
        self, manager: NodeId, query: LogQuery, nodes: Sequence[NodeId]
    ) -> AsyncGenerator[skep.RelayedLogs, None]:
        """Yield the logs of ``nodes`` as relayed by ``manager``.  Ends when all of them have ended.

        A manager that falls silent loses the link, which ends this stream.  Raises: Unavailable.
        """
        selector, options = query_to_pb(query)
        async with self._link.channel_beside(manager) as channel, channel.stream(methods.RELAY_LOGS) as call:
            await call.send(skep.LogRelay(selector=selector, options=options, node_ids=nodes), end=True)
            async for message in call:
                yield message


class NodeFacingServices:
    """Serves the nodes that have their session with this manager."""

    def __init__(self, environment: ManagerEnvironment, link: ManagerLink, reports: PeerReports) -> None:
        config, store, clock, new_id, random = environment
        own, channel_to = config.node_id, link.channel
        self._environment = environment
        self._discovery = Discovery(store, own, self._session, clock)
        self._draining = Draining(store, own, self._discovery, channel_to, clock, random)
        peer = ManagerPeer(node_id=own, addr=config.advertise_addr)
        self.dispatcher = Dispatcher(
            store, peer, clock, new_id, random, wait_unused=self._draining.wait_unused, reports=reports
        )
        self._probes = ProbeStreams(store, own, self._session, self._discovery.state, clock)
        self.diagnostics = Diagnostics(store, own, self._probes, channel_to, clock)
        self.tunnels = NodeTunnels(store, own, self._session, channel_to)
        self.logs = LogBroker(store, new_id, clock, own, LinkRelays(link))
        self._addresses = FailoverKeeper(store, own, self._session, clock)
        self._wakes = Wakes(store, self._session, clock, check_quota)
        self._attachments = AttachmentService(store, clock, new_id)
        self._images = ImageDirectory(store, config.cluster_id, clock, random)
        self._reads = WorkerReads(store.view, config.paths.manager_socket)

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            *self.dispatcher.services(),
            *self._discovery.services(),
            *self._draining.services(),
            *self._probes.services(),
            *self.diagnostics.services(),
            *self.logs.services(),
            *self.tunnels.services(),
            *self._addresses.services(),
            *self._wakes.services(),
            *self._attachments.services(),
            *self._images.services(),
            *self._reads.services(),
        )

    def tasks(self, host: str) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Yield the work that runs on every manager, with its names.

        Args:
            host: Address on which the manager serves nodes.
        """
        _, store, clock, _, random = self._environment
        yield "dispatcher", self.dispatcher.run()
        yield "discovery", self._discovery.run()
        yield "probes", self._probes.run()
        yield "failover addresses", self._addresses.run()
        yield "log broker", self.logs.run()
        yield "gossip relay", GossipRelay(store, host, clock, random).run()

    def _session(self, node_id: NodeId, session_id: str) -> LiveSession:
        return self.dispatcher.session(node_id, session_id)
