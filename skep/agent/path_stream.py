"""The part of a session that hears whom to probe, and says what was found."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

import structlog

from skep.aio.guard import explain, report
from skep.dataplane.dns.truth import NameChecks
from skep.dataplane.probe.interface import PathProbes
from skep.errors import SkepError, Unavailable, Unimplemented
from skep.model.ids import NodeId
from skep.model.paths import DiagnosticsRequest, PathPeer, PathReport, ProbeTargets
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import Call, Channel
from skep.wire.convert.paths import examination_from_pb, reports_to_pb, wish_from_pb

log = structlog.get_logger(__name__)

EXAMINATION_SECONDS_MAX = 20.0
"""Less than a manager waits: it is told what was found until then, or that nothing was."""


class PathSource(Protocol):
    """Probes others (``node.network.paths``), and looks through names."""

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """The latest of each peer."""

    def wish(self, wish: ProbeTargets | None) -> None:
        """Probe these from now on."""

    async def next_reports(self) -> tuple[PathReport, ...]:
        """What has changed, once it has."""

    async def examine(self, own: PathPeer | None, examination: DiagnosticsRequest) -> tuple[PathReport, ...]:
        """Look now; ``own``: this node as others see it, None if it was not told."""


class NodePaths:
    """The probes of this node, and what its containers are told of names."""

    def __init__(self, probes: PathProbes, names: NameChecks) -> None:
        self._probes = probes
        self._names = names

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        return self._probes.reports

    def wish(self, wish: ProbeTargets | None) -> None:
        self._probes.wish(wish)

    async def next_reports(self) -> tuple[PathReport, ...]:
        return await self._probes.next_reports()

    async def examine(self, own: PathPeer | None, examination: DiagnosticsRequest) -> tuple[PathReport, ...]:
        """What is found of names comes as a report of this node itself."""
        reports = await self._probes.examine(examination.peers, throughput=examination.throughput)
        findings = await self._names.look(examination.names)
        if own is None or not findings:
            return reports
        return (*reports, PathReport(peer=own.node_id, findings=findings))


class PathStream:
    """Runs once, in a session."""

    def __init__(self, channel: Channel, source: PathSource) -> None:
        self._channel = channel
        self._source = source
        self._wish: ProbeTargets | None = None
        self._sending = asyncio.Lock()

    async def run(self, session_id: str) -> None:
        """Probe and tell until the stream ends, which it does at once with a manager that knows no paths.

        The node goes on probing between sessions: what it finds is told in the next one.

        Raises: SkepError: why it ended.
        """
        async with self._channel.stream(methods.PATHS) as call:
            await call.send(skep.PathNews(session_id=session_id))
            try:
                order = await call.receive()
            except Unimplemented:
                log.info("no paths are asked for by this manager", manager=self._channel.address)
                return
            async with asyncio.TaskGroup() as group:
                examining = group.create_task(_nothing(), name="examination")
                telling: asyncio.Task[None] | None = None
                while order is not None:
                    if order.HasField("wish"):
                        self._wish = wish_from_pb(order.wish)
                        self._source.wish(self._wish)
                    if telling is None:
                        # What is known already counts for peers that the manager wishes, so not before the first.
                        telling = group.create_task(self._tell(call), name="tell of paths")
                    if order.HasField("examination"):
                        examining.cancel()  # who asked for it has gone
                        examining = group.create_task(
                            self._examine(call, order.examination), name="examination"
                        )
                    order = await call.receive()
                raise Unavailable(f"{self._channel.address} ended the paths")

    async def _tell(self, call: Call[skep.PathNews, skep.PathOrder]) -> None:
        """Everything, then what changes."""
        news = tuple(self._source.reports.values())
        while True:
            if news:
                await self._send(call, skep.PathNews(reports=reports_to_pb(news)))
            news = await self._source.next_reports()

    async def _examine(self, call: Call[skep.PathNews, skep.PathOrder], message: skep.Examination) -> None:
        own = self._wish.node if self._wish is not None else None
        answer = skep.PathNews(examination=message.number)
        try:
            async with asyncio.timeout(EXAMINATION_SECONDS_MAX):
                reports = await self._source.examine(own, examination_from_pb(message))
            answer.reports.extend(reports_to_pb(reports))
        except TimeoutError:
            answer.error = f"the examination took longer than {EXAMINATION_SECONDS_MAX:g} s"
        except SkepError as error:
            answer.error = str(error)
        except (
            Exception
        ) as error:  # asked again, it may meet it again: the stream is for other questions, too
            report(error, "examination failed")
            answer.error = explain(error)
        await self._send(call, answer)

    async def _send(self, call: Call[skep.PathNews, skep.PathOrder], news: skep.PathNews) -> None:
        async with self._sending:
            await call.send(news)


async def _nothing() -> None:
    """No examination has been asked for."""
