"""All nodes look at their paths now, because somebody asks: the doctor.

Each manager asks the nodes that have their sessions with it, and the others over the link, so any manager answers.
Answers are passed on as they come; whoever has not answered in time is named.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import structlog

from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.manager.paths.streams import PathStreams
from skep.model.ids import NodeId
from skep.model.node import Node, NodeState
from skep.model.paths import DiagnosticsResult
from skep.model.planes import is_docker_node, probes_paths
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import Channel
from skep.wire.convert.paths import reports_from_pb, reports_to_pb
from skep.wire.errors import LOST_PEER
from skep.wire.service import Handler, duplex

log = structlog.get_logger(__name__)

RESPONSE_SECONDS_MAX = 25.0
AT_ONCE = 64
"""Nodes of one manager that are under way together; each probes some tens of others."""


Tell = Callable[[DiagnosticsResult], Awaitable[None]]
Send = Callable[[skep.RelayedExamination], Awaitable[None]]


class Examinations:
    """Asked by a user of this manager, or by another manager for the nodes here."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        streams: PathStreams,
        channel: Callable[[NodeId], Channel],
    ) -> None:
        """``channel``: the link's connection to another manager; raises Unavailable."""
        self._store = store
        self._own = own
        self._streams = streams
        self._channel = channel

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (duplex(methods.RELAY_EXAMINATIONS, self._relay),)

    async def examine_all(
        self, tell: Tell, *, throughput: bool = False, within_s: float = RESPONSE_SECONDS_MAX
    ) -> None:
        """Tell of every node of ours once, as it answers; of those that have not within ``within_s`` at the end, why.

        What ``tell`` raises is raised in a group.
        """
        nodes = {node.id: node for node in self._store.view().find(Node) if not is_docker_node(node)}
        waiting = {node.id: node for node in nodes.values() if _takes_part(node)}
        troubles: dict[NodeId, str] = {}

        async def take(answer: DiagnosticsResult) -> None:
            if waiting.pop(answer.node_id, None) is not None:
                await tell(answer)

        try:
            async with asyncio.timeout(within_s), asyncio.TaskGroup() as group:
                group.create_task(self._ask_own(take, throughput=throughput))
                for node in nodes.values():
                    if node.manager_status is not None and node.id != self._own:
                        group.create_task(self._ask_manager(node.id, take, troubles, throughput=throughput))
        except TimeoutError:
            log.info("examination incomplete", silent=len(waiting))
        for id in sorted(nodes):
            if id in waiting:
                await tell(DiagnosticsResult(node_id=id, error=_why_silent(waiting[id], troubles, within_s)))
            elif not _takes_part(nodes[id]):
                await tell(DiagnosticsResult(node_id=id, error=_why_not_asked(nodes[id])))

    async def _ask_manager(
        self, manager: NodeId, tell: Tell, troubles: dict[NodeId, str], *, throughput: bool
    ) -> None:
        """``troubles``: is told of a manager that cannot be asked."""
        try:
            async with self._channel(manager).stream(methods.RELAY_EXAMINATIONS) as call:
                await call.send(skep.ExaminationRelay(throughput=throughput), end=True)
                async for message in call:
                    reports = reports_from_pb(message.reports)
                    await tell(
                        DiagnosticsResult(
                            node_id=NodeId(message.node_id), reports=reports, error=message.error
                        )
                    )
        except SkepError as error:
            troubles[manager] = str(error)

    # -- the nodes here -------------------------------------------------------------------------------------------

    async def _relay(
        self, requests: AsyncIterator[skep.ExaminationRelay], send: Send, _caller: Caller
    ) -> None:
        request = await anext(requests, None)
        if request is None:
            raise InvalidArgument("the request is missing")

        async def tell(one: DiagnosticsResult) -> None:
            reports = reports_to_pb(one.reports)
            await send(skep.RelayedExamination(node_id=one.node_id, reports=reports, error=one.error))

        try:
            async with asyncio.timeout(RESPONSE_SECONDS_MAX):
                await self._ask_own(tell, throughput=request.throughput)
        except* (TimeoutError, *LOST_PEER):
            log.info("examination for another manager incomplete")

    async def _ask_own(self, tell: Tell, *, throughput: bool) -> None:
        """Tell what the nodes with a stream here find, each as soon as it is there."""
        at_once = asyncio.Semaphore(AT_ONCE)
        one_at_a_time = asyncio.Lock()

        async def ask(id: NodeId) -> None:
            async with at_once:
                try:
                    reports, error = await self._streams.examine(id, throughput=throughput)
                    answer = DiagnosticsResult(node_id=id, reports=reports, error=error)
                except Unavailable as trouble:
                    answer = DiagnosticsResult(node_id=id, error=str(trouble))
                async with one_at_a_time:
                    await tell(answer)

        async with asyncio.TaskGroup() as group:
            for id in self._streams.nodes():
                group.create_task(ask(id))


def _takes_part(node: Node) -> bool:
    return node.status.state is NodeState.READY and probes_paths(node)


def _why_not_asked(node: Node) -> str:
    if node.status.state is not NodeState.READY:
        return f"it is {node.status.state.value}"
    return "its version of Skep does not probe paths"


def _why_silent(node: Node, troubles: dict[NodeId, str], within_s: float) -> str:
    manager = node.session.manager_id if node.session is not None else NodeId("")
    if manager in troubles:
        return f"its manager cannot be asked: {troubles[manager]}"
    return f"no answer within {within_s:g} s"
