"""Probe stream of a session: receives the nodes to probe and sends the measurements."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from skep.aio.failures import describe_error, log_error
from skep.dataplane.dns.checks import NameChecks
from skep.dataplane.probe.prober import PathProber
from skep.errors import SkepError, Unavailable
from skep.model.networks.paths import DiagnosticsRequest, PathPeer, PathReport, ProbeTargets
from skep.model.values.ids import NodeId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel, StreamCall
from skep.wire.convert.paths import diagnostics_from_pb, reports_to_pb, targets_from_pb

DIAGNOSTICS_SECONDS_MAX = 20.0
"""Time limit for diagnostics in seconds.  Shorter than the manager's limit, so that it always receives a response."""


class ProbeSource(Protocol):
    """Probes other nodes, and checks the names that containers resolve."""

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """Latest report about each peer."""

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Probe ``targets`` from now on, or stop probing if None."""

    async def next_reports(self) -> tuple[PathReport, ...]:
        """Wait for changed reports and return them."""

    async def diagnose(self, own: PathPeer | None, request: DiagnosticsRequest) -> tuple[PathReport, ...]:
        """Probe now.  ``own`` is this node as a target of others, or None if unknown."""


class NodeProbes:
    """The probes of this node, and the checks of its containers' names."""

    def __init__(
        self, probes: PathProber, names: NameChecks, on_peers: Callable[[frozenset[str]], None]
    ) -> None:
        """``on_peers`` is called with the addresses of the other nodes whenever a manager sends them."""
        self._probes = probes
        self._on_peers = on_peers
        self._names = names

    @property
    def reports(self) -> Mapping[NodeId, PathReport]:
        """Latest report about each peer."""
        return self._probes.reports

    def set_targets(self, targets: ProbeTargets | None) -> None:
        """Probe ``targets`` from now on, or stop probing if None."""
        self._probes.set_targets(targets)
        if targets is not None:
            self._on_peers(targets.addresses)

    async def next_reports(self) -> tuple[PathReport, ...]:
        """Wait for changed reports and return them."""
        return await self._probes.next_reports()

    async def diagnose(self, own: PathPeer | None, request: DiagnosticsRequest) -> tuple[PathReport, ...]:
        """Probe now.  Findings about names become a report of this node about itself."""
        reports = await self._probes.diagnose(request.peers, throughput=request.throughput)
        findings = await self._names.check(request.names)
        if own is None or not findings:
            return reports
        return (*reports, PathReport(peer=own.node_id, findings=findings))


class ProbeStream:
    """Probe stream of one session.  Runs once."""

    def __init__(self, channel: ManagerChannel, source: ProbeSource) -> None:
        self._channel = channel
        self._source = source
        self._targets: ProbeTargets | None = None
        self._sending = asyncio.Lock()

    async def run(self, session_id: str) -> None:
        """Probe and report until the stream ends.

        Probing continues between sessions, and the next session sends the reports.

        Raises:
            SkepError: The reason why the stream ended.
            Unimplemented: The manager requests no probes.
        """
        async with self._channel.stream(methods.PATHS) as call, asyncio.TaskGroup() as group:
            await call.send(skep.ProbeUpdate(session_id=session_id))
            diagnosing: asyncio.Task[None] | None = None
            reporting: asyncio.Task[None] | None = None
            async for order in call:
                if order.HasField("targets"):
                    self._targets = targets_from_pb(order.targets)
                    self._source.set_targets(self._targets)
                if reporting is None:
                    # Report only about this manager's targets, so wait for its first list before sending earlier
                    # reports.
                    reporting = group.create_task(self._report(call), name="probe reports")
                if order.HasField("diagnostics"):
                    if diagnosing is not None:
                        diagnosing.cancel()  # the client that requested it has disconnected
                    diagnosing = group.create_task(
                        self._diagnose(call, order.diagnostics), name="diagnostics"
                    )
            raise Unavailable(f"{self._channel.address} ended the probe stream")

    async def _report(self, call: StreamCall[skep.ProbeUpdate, skep.ProbeOrder]) -> None:
        """Send all reports, then the changed ones."""
        reports = tuple(self._source.reports.values())
        while True:
            if reports:
                await self._send(call, skep.ProbeUpdate(reports=reports_to_pb(reports)))
            reports = await self._source.next_reports()

    async def _diagnose(
        self, call: StreamCall[skep.ProbeUpdate, skep.ProbeOrder], message: skep.DiagnosticsRequest
    ) -> None:
        own = self._targets.node if self._targets is not None else None
        response = skep.ProbeUpdate(diagnostics=message.number)
        try:
            async with asyncio.timeout(DIAGNOSTICS_SECONDS_MAX):
                reports = await self._source.diagnose(own, diagnostics_from_pb(message))
            response.reports.extend(reports_to_pb(reports))
        except TimeoutError:
            response.error = f"the diagnostics took longer than {DIAGNOSTICS_SECONDS_MAX:g} s"
        except SkepError as error:
            response.error = str(error)
        except Exception as error:  # the stream also serves other requests
            log_error(error, "diagnostics failed")
            response.error = describe_error(error)
        await self._send(call, response)

    async def _send(
        self, call: StreamCall[skep.ProbeUpdate, skep.ProbeOrder], message: skep.ProbeUpdate
    ) -> None:
        async with self._sending:
            await call.send(message)
