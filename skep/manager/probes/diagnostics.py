"""Runs the probes of all nodes on demand, for ``skep doctor network``.

Each manager sends the request to the nodes that have their sessions with it, and to the other managers over the link,
so any manager can serve it.  Results are passed on as they arrive.  Nodes without a result in time are named.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil

import structlog

from skep.aio.clock import Clock
from skep.errors import InvalidArgument, RetryLater, SkepError, Unavailable
from skep.manager.probes.streams import ProbeStreams
from skep.model.networks.data_planes import is_docker_node, probes_paths
from skep.model.networks.paths import DiagnosticsResult
from skep.model.node import Node, NodeState
from skep.model.node_reports.rootless import is_rootless_node
from skep.model.values.ids import NodeId
from skep.rpc.errors import LOST_PEER
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from skep.wire.convert.paths import reports_from_pb, reports_to_pb
from skep.wire.service import Handler, duplex

log = structlog.get_logger(__name__)

RESPONSE_SECONDS_MAX = 25.0
"""Seconds to wait for the nodes.  Longer than a node takes (``agent.session.probe_stream``)."""
AT_ONCE = 64
"""Nodes of one manager that run their probes at the same time.  Each probes some tens of other nodes."""


PAUSE_PER_S = 1.0
"""Seconds without a throughput test after each second of one.  At most half of the time is spent on tests."""

SendResult = Callable[[DiagnosticsResult], Awaitable[None]]
Send = Callable[[skep.RelayedDiagnostics], Awaitable[None]]


class Diagnostics:
    """Serves users of this manager, and other managers for the nodes of this one."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        streams: ProbeStreams,
        channel: Callable[[NodeId], ManagerChannel],
        clock: Clock,
    ) -> None:
        """``channel`` returns the link's connection to another manager, or raises Unavailable."""
        self._store = store
        self._own = own
        self._streams = streams
        self._channel = channel
        self._throughput_tests = _ThroughputTests(clock)

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (duplex(methods.RELAY_DIAGNOSTICS, self._relay),)

    def require_throughput(self) -> None:
        """Raise RetryLater while a throughput test runs on the nodes of this manager, and for a short time after it."""
        self._throughput_tests.require_free()

    async def run_all(
        self, send: SendResult, *, throughput: bool = False, within_s: float = RESPONSE_SECONDS_MAX
    ) -> None:
        """Send the result of every Skep node once, as it arrives.

        At the end, send an error for each node without a result after ``within_s``.  Exceptions of ``send`` are raised
        in a group.
        """
        nodes = {node.id: node for node in self._store.view().find(Node) if not is_docker_node(node)}
        waiting = {node.id: node for node in nodes.values() if _is_probing(node)}
        errors: dict[NodeId, str] = {}

        async def receive(result: DiagnosticsResult) -> None:
            if waiting.pop(result.node_id, None) is not None:
                await send(result)

        try:
            async with asyncio.timeout(within_s), asyncio.TaskGroup() as group:
                group.create_task(self._run_own(receive, throughput=throughput))
                for node in nodes.values():
                    if node.manager_status is not None and node.id != self._own:
                        group.create_task(self._run_remote(node.id, receive, errors, throughput=throughput))
        except TimeoutError:
            log.info("diagnostics incomplete", silent=len(waiting))
        for id in sorted(nodes):
            if id in waiting:
                await send(DiagnosticsResult(node_id=id, error=_why_silent(waiting[id], errors, within_s)))
            elif not _is_probing(nodes[id]):
                await send(DiagnosticsResult(node_id=id, error=_why_not_probing(nodes[id])))

    async def _run_remote(
        self, manager: NodeId, send: SendResult, errors: dict[NodeId, str], *, throughput: bool
    ) -> None:
        """Run the probes of another manager's nodes.  If it cannot be reached, add its error to ``errors``."""
        try:
            async with self._channel(manager).stream(methods.RELAY_DIAGNOSTICS) as call:
                await call.send(skep.DiagnosticsRelay(throughput=throughput), end=True)
                async for message in call:
                    reports = reports_from_pb(message.reports)
                    await send(
                        DiagnosticsResult(
                            node_id=NodeId(message.node_id), reports=reports, error=message.error
                        )
                    )
        except SkepError as error:
            errors[manager] = str(error)

    # -- the nodes here -------------------------------------------------------------------------------------------

    async def _relay(
        self, requests: AsyncIterator[skep.DiagnosticsRelay], send: Send, _caller: Caller
    ) -> None:
        request = await anext(requests, None)
        if request is None:
            raise InvalidArgument("the request is missing")

        async def send_result(one: DiagnosticsResult) -> None:
            reports = reports_to_pb(one.reports)
            await send(skep.RelayedDiagnostics(node_id=one.node_id, reports=reports, error=one.error))

        try:
            async with asyncio.timeout(RESPONSE_SECONDS_MAX):
                await self._run_own(send_result, throughput=request.throughput)
        except* (TimeoutError, *LOST_PEER):
            log.info("diagnostics for another manager incomplete")

    async def _run_own(self, send: SendResult, *, throughput: bool) -> None:
        """Send the results of the nodes with a stream to this manager, each as soon as it arrives.

        Each node has its stream with one manager, so no node takes part in two throughput tests at a time, whichever
        managers receive the requests.
        """
        try:
            with self._throughput_tests.running() if throughput else nullcontext():
                await self._run_nodes(send, throughput=throughput)
        except RetryLater as refusal:
            for id in self._streams.nodes():
                await send(DiagnosticsResult(node_id=id, error=str(refusal)))

    async def _run_nodes(self, send: SendResult, *, throughput: bool) -> None:
        at_once = asyncio.Semaphore(AT_ONCE)
        one_at_a_time = asyncio.Lock()

        async def run_one(id: NodeId) -> None:
            async with at_once:
                try:
                    reports, error = await self._streams.run_diagnostics(id, throughput=throughput)
                    result = DiagnosticsResult(node_id=id, reports=reports, error=error)
                except Unavailable as failure:
                    result = DiagnosticsResult(node_id=id, error=str(failure))
                async with one_at_a_time:
                    await send(result)

        async with asyncio.TaskGroup() as group:
            for id in self._streams.nodes():
                group.create_task(run_one(id))


class _ThroughputTests:
    """Throughput tests of one manager's nodes: one at a time, with a pause as long as the test after each.

    A test keeps every link full, so a client that repeats it would take the network from the services.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_running = False
        self._free_at = float("-inf")

    def require_free(self) -> None:
        """Raise RetryLater while a test runs, and for a short time after it."""
        wait_s = RESPONSE_SECONDS_MAX if self._is_running else self._free_at - self._clock.monotonic()
        if wait_s > 0:
            raise RetryLater(
                f"a throughput test {'is running' if self._is_running else 'has just ended'}, "
                f"and each fills every link: try again in {ceil(wait_s)} s",
                wait_s,
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark a test as running for the block.  Raises: RetryLater."""
        self.require_free()
        started_at, self._is_running = self._clock.monotonic(), True
        try:
            yield
        finally:
            self._is_running = False
            ended_at = self._clock.monotonic()
            self._free_at = ended_at + PAUSE_PER_S * (ended_at - started_at)


def _is_probing(node: Node) -> bool:
    return node.status.state is NodeState.READY and probes_paths(node)


def _why_not_probing(node: Node) -> str:
    if node.status.state is not NodeState.READY:
        return f"it is {node.status.state.value}"
    return "" if is_rootless_node(node) else "its version of Skep does not probe paths"


def _why_silent(node: Node, errors: dict[NodeId, str], within_s: float) -> str:
    manager = node.session.manager_id if node.session is not None else NodeId("")
    if manager in errors:
        return f"its manager is not reachable: {errors[manager]}"
    return f"no response within {within_s:g} s"
